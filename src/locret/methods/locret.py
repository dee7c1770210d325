"""Locret (arXiv:2410.01805): keep the units that trained retaining heads score highest."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from locret.heads import RetainingHeads
from locret.methods.base import ChunkView, Method, register


@register("locret")
@dataclass(frozen=True)
class Locret(Method):
    """The causal importance score depends on a token's own q, k, v only, so it is computed once and never changes."""

    paper: ClassVar[str] = "arXiv:2410.01805"
    summary: ClassVar[str] = "trained retaining heads score every unit once, when it is read"
    per_token: ClassVar[bool] = True
    replayable: ClassVar[bool] = True
    trained: ClassVar[bool] = True

    heads: RetainingHeads

    @property
    def wants_hidden(self) -> bool:  # type: ignore[override]  # heads decide, not the class
        return self.heads.wants_hidden

    def score(self, view: ChunkView) -> Tensor:
        return self.heads.score(view.layer, view.q, view.k, view.v, view.hidden)

    def score_layers(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        return self.heads.score_layers(q, k, v)
