"""Locret: long-context inference in a fixed KV-cache budget.

    import locret
    llm = locret.load(budget=1024)                 # no model: the embedded one
    context = llm.compress(open("report.txt").read())
    print(context.ask("Who signed the report?").text)

Only names listed in `__all__` are public. Those that need torch are imported when first used, so that
`import locret` and `locret --help` answer at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from locret.errors import (
    BackboneError,
    ConfigError,
    ContextError,
    DataError,
    HeadsError,
    LocretError,
    NumericsError,
)

if TYPE_CHECKING:
    from locret.attached import attach
    from locret.config import Sampling
    from locret.context import Context
    from locret.decode import Output, Stats
    from locret.engine import LLM, load

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BackboneError",
    "ConfigError",
    "Context",
    "ContextError",
    "DataError",
    "HeadsError",
    "LocretError",
    "NumericsError",
    "Output",
    "Sampling",
    "Stats",
    "__version__",
    "attach",
    "load",
]

_LAZY = {
    "LLM": "locret.engine",
    "Context": "locret.context",
    "Output": "locret.decode",
    "Stats": "locret.decode",
    "attach": "locret.attached",
    "load": "locret.engine",
    "Sampling": "locret.config",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'locret' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return __all__
