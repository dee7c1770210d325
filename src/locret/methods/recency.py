"""Sinks and the newest units: StreamingLLM (arXiv:2309.17453) when num_sinks is 4 and positions are compact."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from locret.methods.base import ChunkView, Method, register


@register("recency")
@dataclass(frozen=True)
class Recency(Method):
    """Units lie in position order, so their index is their age; sinks are pinned by the cache, not scored here."""

    paper: ClassVar[str] = "arXiv:2309.17453"
    summary: ClassVar[str] = "attention sinks and the newest units stay (StreamingLLM)"
    rescoring: ClassVar[bool] = True  # an index stays exact in fp32 where a position past 2**24 would not

    def score(self, view: ChunkView) -> Tensor:
        assert view.keys is not None
        b, h, s, _ = view.keys.shape
        return torch.arange(s, device=view.keys.device, dtype=torch.float32).expand(b, h, s)
