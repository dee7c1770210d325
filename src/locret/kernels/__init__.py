"""Operators: each file states the meaning, holds the torch reference and dispatches to the fastest kernel present."""
