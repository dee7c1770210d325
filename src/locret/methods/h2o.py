"""H2O, the heavy-hitter oracle (arXiv:2306.14048): keep what has got the most attention so far.

Published per decode step, with the softmax over what is cached; here a chunk's queries are added up first.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from locret.methods.base import ChunkView, Method, register


@register("h2o")
@dataclass(frozen=True)
class H2O(Method):
    """A unit's score is the sum of the attention weights that all queries since have given it, mean over the group.

    The score moves with the unit, so the sum survives evictions. The recent units that the paper keeps are the cache's
    pins (`num_stabilizers`, `local_window`).
    """

    paper: ClassVar[str] = "arXiv:2306.14048"
    summary: ClassVar[str] = "units with the most accumulated attention stay"
    variant: ClassVar[str] = "published: an eviction per token; here one at every chunk's end"
    query_aware: ClassVar[bool] = True
    rescoring: ClassVar[bool] = True

    def score(self, view: ChunkView) -> Tensor:
        probe = view.all.attention
        return view.all.units.score + probe.per_kv_head(probe.column_sums())  # new units start at 0
