"""One file per published method. Importing this package registers them all."""

from locret.methods import (
    adakv,
    attention_gate,
    cascading,
    corm,
    csp,
    expected_attention,
    fastkvzip,
    full,
    h2o,
    keydiff,
    knorm,
    kvmerger,
    kvzap,
    lagkv,
    lococo,
    locret,
    nacl,
    prefixkv,
    pyramidkv,
    random,
    razor,
    recency,
    sirllm,
    snapkv,
    streamingllm,
    tova,
)  # fmt: skip
from locret.methods.base import (
    ChunkView,
    Method,
    MethodInfo,
    find_method,
    get_method,
    list_methods,
    method_options,
    method_slots,
    register,
    wants_heads,
)  # fmt: skip
from locret.methods.options import parse_options

__all__ = [
    "ChunkView", "Method", "MethodInfo", "adakv", "attention_gate", "cascading", "corm", "csp", "expected_attention",
    "fastkvzip", "find_method", "full", "get_method", "h2o", "keydiff", "knorm", "kvmerger", "kvzap", "lagkv",
    "list_methods", "lococo", "locret", "method_options", "method_slots", "nacl", "parse_options", "prefixkv",
    "pyramidkv", "random", "razor", "recency", "register", "sirllm", "snapkv", "streamingllm", "tova", "wants_heads",
]  # fmt: skip
