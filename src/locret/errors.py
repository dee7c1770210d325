"""Every error a user can cause, one tree. Messages say what was seen, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LocretError(Exception):
    """Base of all errors that locret raises on purpose."""


class ConfigError(LocretError, ValueError):
    """An option, a budget or a name that cannot be used."""


class BackboneError(LocretError):
    """A model, or one of its layers, that cannot be run faithfully."""


class HeadsError(LocretError):
    """Retaining-head files that are missing, broken or made for another backbone."""


class DataError(LocretError):
    """Input text or training data that cannot be read; the message names the file and the line."""


class ContextError(LocretError):
    """A saved context that is broken, or was made by another model or other heads."""


class CapacityError(LocretError):
    """A request that does not fit into memory; the message has the arithmetic."""


class NumericsError(LocretError):
    """NaN or infinite scores: selecting by them would keep arbitrary units."""


def unknown(kind: str, name: str, valid: Iterable[str]) -> ConfigError:
    """An error for an unknown name: lists the valid ones and suggests the nearest.

    >>> str(unknown("method", "snapvk", ["locret", "snapkv"]))
    "unknown method 'snapvk'; valid: locret, snapkv (did you mean 'snapkv'?)"
    """
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    valid_ones = f"valid: {', '.join(names)}" if names else "it has none"
    return ConfigError(f"unknown {kind} {name!r}; {valid_ones}{hint}")
