"""CORM (arXiv:2404.15949), with a budget: keep what a recent query found more important than the average.

The published method has no budget: a key stays while one of the last `window` queries gives it at least the average
weight, 1 / (number of visible keys). In a fixed cache the same flags are an order: the units flagged last stay.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from locret.methods.base import ChunkView, Method, positive, register
from locret.select import ranks, select

_NEVER = 2.0**23  # queries ago, exact in fp32


@register("corm")
@dataclass(frozen=True)
class CORM(Method):
    """Score: minus the number of queries since one of the group's flagged the unit. All units with a score above
    -window are what the paper keeps; they come first, and more than the budget are cut by age.
    """

    paper: ClassVar[str] = "arXiv:2404.15949"
    summary: ClassVar[str] = "what a recent query gave more than average attention stays"
    variant: ClassVar[str] = "published: as many as are flagged; here the budget's number, flagged last first"
    query_aware: ClassVar[bool] = True
    rescoring: ClassVar[bool] = True

    window: int = 256

    def __post_init__(self) -> None:
        positive("corm", window=self.window)

    def score(self, view: ChunkView) -> Tensor:
        probe, scores = view.all.attention, view.all.units.score
        count, total = view.q.shape[2], scores.shape[-1]
        age = torch.cat(
            (count - scores[..., : total - count], torch.full_like(scores[..., total - count :], _NEVER)), -1
        )
        for start, weights in probe.blocks(self.window):
            row = torch.arange(start, start + weights.shape[-2], device=age.device)
            average = 1.0 / (total - count + row + 1.0)
            flagged = (weights >= average[:, None] * (1 - 1e-5)).any(2)  # [B, Hkv, rows, S]; equal weights all pass
            since = (count - 1.0 - row)[:, None].expand_as(flagged).masked_fill(~flagged, _NEVER)
            age = torch.minimum(age, since.amin(-2).to(age.dtype))
        return -age.clamp(max=_NEVER)

    def select(self, scores: Tensor, budget: int, pinned: Tensor, view: ChunkView) -> Tensor:
        return select(-ranks(scores).float(), budget, pinned)  # ages tie: of equal ones the older stay
