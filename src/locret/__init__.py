"""Locret: long-context inference in a fixed KV-cache budget."""
