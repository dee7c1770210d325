"""The newest units, and the sinks that the cache pins: a plain sliding window where num_sinks is 0."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from locret.methods.base import ChunkView, Method, register


@register("recency")
@dataclass(frozen=True)
class Recency(Method):
    """Units lie in position order, so their index is their age; sinks are pinned by the cache, not scored here."""

    summary: ClassVar[str] = "the newest units stay"
    rescoring: ClassVar[bool] = True  # an index stays exact in fp32 where a position past 2**24 would not
    memoryless: ClassVar[bool] = True

    def score(self, view: ChunkView) -> Tensor:
        scores = view.all.units.score
        return torch.arange(scores.shape[-1], device=scores.device, dtype=torch.float32).expand_as(scores)
