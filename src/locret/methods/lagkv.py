"""LagKV (arXiv:2504.04704): keep the units that stand out from the text that follows them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from locret.config import CachePlan
from locret.errors import ConfigError
from locret.methods.base import ChunkView, Method, positive, register
from locret.select import ranks, select


@register("lagkv")
@dataclass(frozen=True)
class LagKV(Method):
    """Text behind the sinks is cut into pieces of `lag` tokens. A piece's keys and values are scaled, per channel, by
    the range that the next piece has; a unit's rank within its piece is that of the deviation over channels.

    Scores are ranks / lag, in [0, 1). A piece whose next one is not complete yet has score 1 and waits: up to 2 * lag
    of the newest units. Sinks have score 1.
    """

    paper: ClassVar[str] = "arXiv:2504.04704"
    summary: ClassVar[str] = "keys and values that deviate from the range of the next piece of text stay"
    rescoring: ClassVar[bool] = True

    lag: int = 128
    num_sinks: int = 4

    def __post_init__(self) -> None:
        positive("lagkv", lag=self.lag)

    def check(self, plan: CachePlan) -> None:
        assert plan.decode_target is not None
        room = plan.decode_target - plan.num_sinks - self.num_sinks
        if 2 * self.lag > room:
            raise ConfigError(f"lagkv: lag {self.lag} keeps up to {2 * self.lag} units waiting, which a budget "
                              f"of {plan.budget} cannot hold; allowed are 1 to {room // 2}, or raise it")  # fmt: skip

    def score(self, view: ChunkView) -> Tensor:
        units, end = view.all.units, view.start + view.q.shape[2]
        first = max(0, (view.start - self.num_sinks) // self.lag - 1)  # the first piece that is not scored yet
        pieces = (end - self.num_sinks) // self.lag - 1 - first  # that can be scored now
        old = len(units) - view.q.shape[2]
        scores = torch.cat((units.score[..., :old], torch.ones_like(units.score[..., old:])), -1)
        if pieces < 1:
            return scores
        low = len(units) - (end - self.num_sinks - first * self.lag)  # waiting units are the newest, without a gap
        span = slice(low, low + (pieces + 1) * self.lag)
        deviation = self._deviation(view.all.keys[:, :, span]) + self._deviation(units.v[:, :, span])
        order = deviation.argsort(-1).argsort(-1).float() / self.lag  # [B, Hkv, pieces, lag]
        scores[..., low : low + pieces * self.lag] = order.flatten(2)
        return scores

    def select(self, scores: Tensor, budget: int, pinned: Tensor, view: ChunkView) -> Tensor:
        return select(-ranks(scores).float(), budget, pinned)  # ranks within pieces tie: of equal ones the older stay

    def _deviation(self, x: Tensor) -> Tensor:
        """[B, Hkv, (pieces + 1) * lag, D] -> [B, Hkv, pieces, lag], summing to 1 in each piece."""
        parts = x.float().unflatten(2, (-1, self.lag))
        low, high = parts[:, :, 1:].amin(3, keepdim=True), parts[:, :, 1:].amax(3, keepdim=True)
        scaled = (parts[:, :, :-1] - low) / (high - low).clamp(min=1e-6)
        return scaled.std(-1).softmax(-1)
