"""Uniformly random units: the floor that a score has to beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from locret.methods.base import ChunkView, Method, register


@register("random")
@dataclass(frozen=True)
class Random(Method):
    """A unit's draw depends on the seed, the layer and its position: a row in a batch gets what it gets alone."""

    summary: ClassVar[str] = "random units stay"

    seed: int = 0

    def score(self, view: ChunkView) -> Tensor:
        b, h, c, _ = view.k.shape
        generator = torch.Generator().manual_seed(hash((self.seed, view.layer, view.start)) % 2**63)
        return torch.rand(1, h, c, generator=generator).to(view.k.device).expand(b, h, c)
