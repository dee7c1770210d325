"""One file per published method. Importing this package registers them all."""

from locret.methods import full, knorm, locret, random, recency, snapkv
from locret.methods.base import ChunkView, Method, MethodInfo, get_method, list_methods, register

__all__ = [
    "ChunkView", "Method", "MethodInfo", "full", "get_method", "knorm", "list_methods", "locret", "random", "recency",
    "register", "snapkv",
]  # fmt: skip
