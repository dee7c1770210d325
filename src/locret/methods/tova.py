"""TOVA (arXiv:2401.06104): drop what the newest query attends to least."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from locret.methods.base import ChunkView, Method, register


@register("tova")
@dataclass(frozen=True)
class TOVA(Method):
    """Attention of the last query, mean over all heads: one keep set for all KV heads of a layer.

    The published code protects nothing; set num_sinks, num_stabilizers and local_window to 0 for that.
    """

    paper: ClassVar[str] = "arXiv:2401.06104"
    summary: ClassVar[str] = "what the newest query attends to stays, one set for all heads"
    variant: ClassVar[str] = "published: an eviction per token; here one at every chunk's end"
    query_aware: ClassVar[bool] = True
    rescoring: ClassVar[bool] = True
    memoryless: ClassVar[bool] = True

    def score(self, view: ChunkView) -> Tensor:
        probe = view.all.attention
        return probe.shared(probe.last_row())
