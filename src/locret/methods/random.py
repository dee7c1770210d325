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
        position = torch.arange(view.start, view.start + c, device=view.k.device)
        head = torch.arange(h, device=view.k.device)[:, None]
        bits = _mix(_mix(_mix(torch.full_like(head, self.seed) + view.layer) + head) + position)  # [Hkv, C]
        return ((bits & 0xFFFFFF).float() / 2**24).expand(b, h, c)


def _mix(x: Tensor) -> Tensor:
    """Spread 64-bit integers (splitmix64; products wrap around)."""
    x = x + 0x1E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0x3F58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x14D049BB133111EB
    return x ^ (x >> 31)
