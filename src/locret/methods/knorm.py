"""KeyNorm (arXiv:2406.11430): keep the units whose keys have the smallest L2 norm."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from locret.methods.base import ChunkView, Method, register


@register("knorm")
@dataclass(frozen=True)
class KeyNorm(Method):
    """Training-free; reads keys only. RoPE is a rotation, so the norm before it is the norm after it."""

    paper: ClassVar[str] = "arXiv:2406.11430"
    summary: ClassVar[str] = "keys with the smallest L2 norm stay"
    per_token: ClassVar[bool] = True
    replayable: ClassVar[bool] = True

    def score(self, view: ChunkView) -> Tensor:
        return -view.k.float().norm(dim=-1)  # [B, Hkv, C]
