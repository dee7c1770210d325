"""One file per published method. Importing this package registers them all."""

from locret.methods import fastkvzip, full, knorm, kvzap, locret, random, recency, snapkv
from locret.methods.base import ChunkView, Method, MethodInfo, get_method, list_methods, register

__all__ = [
    "ChunkView", "Method", "MethodInfo", "fastkvzip", "full", "get_method", "knorm", "kvzap", "list_methods", "locret",
    "random", "recency", "register", "snapkv",
]  # fmt: skip
