"""NACL (arXiv:2408.03675): the best by the attention of proxy tokens, and a random sample of the rest."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from locret.methods.base import ChunkView, Method, register, within
from locret.select import draws, ranks, select


@register("nacl")
@dataclass(frozen=True)
class NACL(Method):
    """Proxies are the last `proxy_share` of the tokens read so far, as far as they lie in the chunk.

    Of the units that are not pinned, 1 - `random_share` are the best ones; the rest are drawn without replacement with
    p = softmax(scores), as the largest of score + Gumbel noise, which is the same law. Published: 12 % best and 7 %
    drawn. The noise belongs to the position, so a unit that was drawn is not drawn anew after every chunk. The
    published code lets proxies see later tokens; here they are causal.
    """

    paper: ClassVar[str] = "arXiv:2408.03675"
    summary: ClassVar[str] = "attention of the last 1 % of the tokens votes; a part of the budget is drawn at random"
    variant: ClassVar[str] = "published: once, over the whole prompt; here at every chunk's end, causal"
    query_aware: ClassVar[bool] = True
    rescoring: ClassVar[bool] = True
    memoryless: ClassVar[bool] = True

    proxy_share: float = 0.01
    random_share: float = 0.37
    seed: int = 0

    def __post_init__(self) -> None:
        within("nacl", 0.0, 1.0, proxy_share=self.proxy_share, random_share=self.random_share)

    def score(self, view: ChunkView) -> Tensor:
        probe, count = view.all.attention, view.q.shape[2]
        proxies = max(1, round(self.proxy_share * (view.start + count)))
        return probe.per_kv_head(probe.column_sums(min(proxies, count)))

    def select(self, scores: Tensor, budget: int, pinned: Tensor, view: ChunkView) -> Tensor:
        fixed = pinned.sum(-1, keepdim=True)
        drawn = ((budget - fixed) * self.random_share).long()
        best = ranks(scores.masked_fill(pinned, float("inf"))) < budget - drawn
        noise = -torch.log(-torch.log(draws(self.seed, view.layer, view.all.units.position)))
        return select(scores + noise, budget, best | pinned)
