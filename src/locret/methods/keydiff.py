"""KeyDiff (arXiv:2504.15364): keep the keys that differ most from the average key."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from locret.methods.base import ChunkView, Method, register


@register("keydiff")
@dataclass(frozen=True)
class KeyDiff(Method):
    """Score: minus the cosine of a key and the mean of all normalised keys, rotated as they are read.

    The paper evicts block by block, so chunked prefill is its own setting.
    """

    paper: ClassVar[str] = "arXiv:2504.15364"
    summary: ClassVar[str] = "keys least similar to the mean key stay"
    rescoring: ClassVar[bool] = True
    memoryless: ClassVar[bool] = True

    def score(self, view: ChunkView) -> Tensor:
        keys = functional.normalize(view.all.keys.float(), dim=-1)
        anchor = functional.normalize(keys.mean(2, keepdim=True), dim=-1)
        return -(keys * anchor).sum(-1)  # [B, Hkv, S]
