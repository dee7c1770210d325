"""Uniformly random units: the floor that a score has to beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from locret.methods.base import ChunkView, Method, register
from locret.select import draws


@register("random")
@dataclass(frozen=True)
class Random(Method):
    """A unit's draw depends on the seed, the layer and its position: a row in a batch gets what it gets alone."""

    summary: ClassVar[str] = "random units stay"
    per_token: ClassVar[bool] = True

    seed: int = 0

    def score(self, view: ChunkView) -> Tensor:
        b, h, c, _ = view.k.shape
        positions = torch.arange(view.start, view.start + c, device=view.k.device)
        return draws(self.seed, view.layer, positions.expand(b, h, c))
