"""The full cache: nothing is evicted. What every other method is measured against."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from locret.methods.base import ChunkView, Method, register


@register("full")
@dataclass(frozen=True)
class Full(Method):
    """Exact attention; memory grows with the input and the budget is ignored."""

    summary: ClassVar[str] = "exact attention over everything; memory grows with the input"
    bounded_prefill: ClassVar[bool] = False
    evicts: ClassVar[bool] = False

    def score(self, view: ChunkView) -> Tensor:
        return view.k.new_zeros(view.k.shape[:3]).float()
