"""KVMerger (arXiv:2407.08454): neighbours with similar keys become one unit, weighted by their distance to a pivot."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from locret.methods.base import ChunkView, Method, register, within
from locret.reduce import Merged, merge_runs
from locret.select import select


@register("kvmerger")
@dataclass(frozen=True)
class KVMerger(Method):
    """As many units as are too many are merged away, the most similar neighbours first; where there are too few that
    are similar, the rest is evicted by accumulated attention. A merged unit lies where its pivot lay and keeps the
    pivot's score. Pinned units and the best `heavy` of the budget are left as they are.

    Published once, at the prompt's end: every run of neighbours above the threshold, however many units stay. Keys are
    compared and merged before RoPE (published: after), so that where units lie makes no difference.

    Attributes:
        threshold: cosine similarity above which neighbours may be merged.
        sigma: width of the Gaussian; a fixed 5 is the paper's best or near it.
        heavy: share of the budget; published 12 % of the prompt at a budget of 50 %.
    """

    paper: ClassVar[str] = "arXiv:2407.08454"
    summary: ClassVar[str] = "similar neighbours become one unit; accumulated attention names pivots and heavy units"
    variant: ClassVar[str] = "published: once, all similar runs; here per chunk, down to the budget; keys before RoPE"
    query_aware: ClassVar[bool] = True
    rescoring: ClassVar[bool] = True
    reduces: ClassVar[bool] = True

    threshold: float = 0.75
    sigma: float = 5.0
    heavy: float = 0.24

    def __post_init__(self) -> None:
        within("kvmerger", -1.0, 1.0, threshold=self.threshold)
        within("kvmerger", 1e-3, 1e6, sigma=self.sigma)
        within("kvmerger", 0.0, 1.0, heavy=self.heavy)

    def score(self, view: ChunkView) -> Tensor:
        probe = view.all.attention
        return view.all.units.score + probe.per_kv_head(probe.column_sums())

    def reduce(self, scores: Tensor, budget: int, pinned: Tensor, view: ChunkView) -> tuple[Tensor, Merged]:
        units = view.all.units
        runs = merge_runs(
            units.k, units.v, scores, num_heavy=int(self.heavy * budget), num_recent=0, threshold=self.threshold,
            sigma=self.sigma, fixed=pinned, most=scores.shape[-1] - budget,
        )  # fmt: skip
        return select(scores.masked_fill(~runs.alive, float("-inf")), budget, pinned), runs
