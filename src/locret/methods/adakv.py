"""Ada-KV (arXiv:2407.11550): the KV heads of a layer share its budget, and those with more to keep keep more."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from locret.errors import ConfigError
from locret.methods.base import ChunkView, Method, Wrapped, register, within
from locret.select import select_across_heads

_BASES = ("h2o", "knorm", "locret", "random", "snapkv", "tova")  # scores that do not read a head's padding


@register("adakv")
@dataclass(frozen=True)
class AdaKV(Wrapped):
    """The best Hkv * budget units of a layer stay, whichever heads they are in; every head keeps at least `floor` of
    the uniform budget, its own best (the paper mixes the two counts with that weight).

    Units lie in one flat slab per layer that is as large as for equal heads: bytes are really the same. While a layer
    works its heads are padded to the longest.
    """

    paper: ClassVar[str] = "arXiv:2407.11550"
    summary: ClassVar[str] = "as snapkv, with one budget for all KV heads of a layer"
    variant: ClassVar[str] = "published: once, over the whole prompt; here at every chunk's end; floor by own best"
    query_aware: ClassVar[bool] = True
    rescoring: ClassVar[bool] = True
    ragged: ClassVar[bool] = True

    base: str | Method = "snapkv"
    floor: float = 0.2

    def __post_init__(self) -> None:
        within("adakv", 0.0, 1.0, floor=self.floor)
        super().__post_init__()
        if self.scores.name not in _BASES:
            raise ConfigError(
                f"adakv: base {self.scores.name!r} cannot be shared among heads; valid: {', '.join(_BASES)}"
            )

    def select(self, scores: Tensor, budget: int, pinned: Tensor, view: ChunkView) -> Tensor:
        return select_across_heads(scores, budget, pinned, floor=max(1, int(self.floor * budget)))
