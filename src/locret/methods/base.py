"""What an eviction method is: a score per unit. Pins, budgets, positions and bytes are not its job.

Shapes: B batch, C new units (a chunk), P units cached before it, S = P + C, Hq/Hkv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from locret.errors import ConfigError, unknown
from locret.heads import RetainingHeads


@dataclass(frozen=True)
class ChunkView:
    """What a method may look at when a chunk has been appended to a layer."""

    layer: int
    q: Tensor  # the chunk's queries before RoPE, [B, Hq, C, D]
    k: Tensor  # the chunk's keys before RoPE, [B, Hkv, C, D]
    v: Tensor  # [B, Hkv, C, D]
    start: int  # original position of the chunk's first token
    scale: float  # of the attention logits
    hidden: Tensor | None = None  # what the layer's projections read, [B, C, E]; for methods that want it
    # filled in for methods that score again what is cached
    q_rotated: Tensor | None = None  # [B, Hq, C, D]
    keys: Tensor | None = None  # rotated keys of all units, [B, Hkv, S, D]
    old_scores: Tensor | None = None  # [B, Hkv, P]


class Method:
    """A preset of the eviction slots; subclasses are frozen dataclasses whose fields are the method's options."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    summary: ClassVar[str]
    query_aware: ClassVar[bool] = False
    bounded_prefill: ClassVar[bool] = True
    trained: ClassVar[bool] = False
    evicts: ClassVar[bool] = True
    wants_hidden: ClassVar[bool] = False  # True: `ChunkView.hidden` is filled in
    rescoring: ClassVar[bool] = False  # True: `score` returns new scores for cached units too

    def score(self, view: ChunkView) -> Tensor:
        """Scores of the new units, [B, Hkv, C], or of all S units when `rescoring`; higher is kept."""
        raise NotImplementedError


@dataclass(frozen=True)
class MethodInfo:
    """One line of `locret methods`."""

    name: str
    paper: str
    summary: str
    query_aware: bool
    bounded_prefill: bool
    trained: bool


M = TypeVar("M", bound=type[Method])
_METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[M], M]:
    """Class decorator: makes a method known under `name` to the CLI, the docs table and the contract tests."""

    def add(cls: M) -> M:
        assert name not in _METHODS, f"two methods named {name}"
        cls.name = name
        _METHODS[name] = cls
        return cls

    return add


def get_method(name: str, *, heads: RetainingHeads | None = None, **options: Any) -> Method:
    """The method called `name`, with its options.

    Raises: ConfigError: unknown name or option (the nearest is named), or a trained method without heads.
    """
    if name not in _METHODS:
        raise unknown("method", name, _METHODS)
    cls = _METHODS[name]
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for key in options:
        if key not in names:
            raise unknown(f"option of method {name}", key, [n for n in names if n != "heads"])
    if "heads" in names:
        if heads is None:
            raise ConfigError(f"method {name!r} needs heads trained for this model; give --heads FOLDER, train some "
                              "with `locret train`, or choose a training-free method: "
                              + ", ".join(sorted(n for n, c in _METHODS.items() if not c.trained)))  # fmt: skip
        options = {**options, "heads": heads}
    return cls(**options)


def list_methods() -> list[MethodInfo]:
    """All methods, by name."""
    return [
        MethodInfo(*(getattr(cls, field.name) for field in fields(MethodInfo))) for _, cls in sorted(_METHODS.items())
    ]
