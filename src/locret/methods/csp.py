"""CSP, cross-self pruning (arXiv:2412.04652): keys rank among their own kind, and each kind has a share.

Made for images and text; the two kinds of a plain text are here the chunk being read (self) and what was read before
(cross).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from locret.config import CachePlan
from locret.methods.base import ChunkView, Method, positive, register, window_fits, within
from locret.select import ranks, select


@register("csp")
@dataclass(frozen=True)
class CSP(Method):
    """Attention of the chunk's last `window` queries with the paper's softmax, exp(x) / (1 + sum exp(x)), summed.

    Of the units that are not pinned, `cross_share` are the best older ones and the others the chunk's best; what one
    kind cannot fill the best of all fill. The published code stores a key that is best of both kinds twice; no key is
    of both kinds here.
    """

    paper: ClassVar[str] = "arXiv:2412.04652"
    summary: ClassVar[str] = "attention of each chunk's last queries votes; old and new units have a share each"
    variant: ClassVar[str] = "published: image and text, once per prompt; here old units and the chunk's, per chunk"
    query_aware: ClassVar[bool] = True
    rescoring: ClassVar[bool] = True
    memoryless: ClassVar[bool] = True

    window: int = 32
    cross_share: float = 0.5

    def __post_init__(self) -> None:
        positive("csp", window=self.window)
        within("csp", 0.0, 1.0, cross_share=self.cross_share)

    def check(self, plan: CachePlan) -> None:
        window_fits(self.name, self.window, plan)

    def score(self, view: ChunkView) -> Tensor:
        probe = view.all.attention
        return probe.per_kv_head(probe.column_sums(min(self.window, view.q.shape[2]), null=True))

    def select(self, scores: Tensor, budget: int, pinned: Tensor, view: ChunkView) -> Tensor:
        old = scores.shape[-1] - view.q.shape[2]
        free = budget - pinned.sum(-1, keepdim=True)
        cross = (free * self.cross_share).long()
        ranked = scores.masked_fill(pinned, float("-inf"))
        best = pinned.clone()
        best[..., :old] |= ranks(ranked[..., :old]) < cross
        best[..., old:] |= ranks(ranked[..., old:]) < free - cross
        return select(scores, budget, best)
