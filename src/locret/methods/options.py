"""Options of a method as texts: `key=value`, read as the type that the method's field has.

`base.window=8` is the option `window` of the method that `base` names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args, get_origin, get_type_hints

from locret.errors import ConfigError, unknown
from locret.methods.base import BASE, find_method, option_fields

_BOOLS = {"true": True, "false": False}


def parse_options(method: str, texts: Iterable[str]) -> dict[str, Any]:
    """What `get_method` takes, from texts.

    >>> parse_options("snapkv", ["window=64", "pooling=avg"])
    {'window': 64, 'pooling': 'avg'}

    Raises: ConfigError: no `=`, an option twice, an unknown option, or a value of another type.
    """
    given: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"method option {text!r} is not understood; write key=value, e.g. window=64")
        if key in given:
            raise ConfigError(f"method option {key!r} is given twice: {given[key]!r} and {value!r}")
        given[key] = value
    kinds = option_types(method)
    base = given.get("base", kinds.get("base", (str, ""))[1])
    inner = {BASE + key: kind for key, kind in option_types(base).items()} if isinstance(base, str) and base else {}
    return {key: _read(method, key, value, kinds | inner) for key, value in given.items()}


def option_types(method: str) -> dict[str, tuple[Any, Any]]:
    """(type, default) of every option of a method."""
    cls = find_method(method)
    hints = get_type_hints(cls)
    return {field.name: (hints[field.name], field.default) for field in option_fields(cls)}


def _read(method: str, key: str, text: str, kinds: dict[str, tuple[Any, Any]]) -> Any:
    if key not in kinds:
        raise unknown(f"option of method {method}", key, kinds)
    kind = kinds[key][0]
    try:
        if kind is bool:
            return _BOOLS[text.lower()]
        if kind in (int, float):
            return kind(text)
        if get_origin(kind) is tuple:
            return tuple(get_args(kind)[0](part) for part in text.split(",") if part.strip())
    except (KeyError, ValueError):
        raise ConfigError(f"method option {key}={text}: {method} wants {_words(kind)}") from None
    return text


def _words(kind: Any) -> str:
    if kind is bool:
        return "true or false"
    return {int: "a whole number", float: "a number"}.get(kind, "whole numbers with commas between them")
