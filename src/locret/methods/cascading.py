"""Cascading KV cache (arXiv:2406.17808): sliding windows one behind the other, each thinner in time than the last.

A unit that falls out of a window is offered to the next. While that one has room it takes everything; once it is full
it takes every second offer, and the offer in between duels with the one just taken: the higher moving average of
attention stays. What falls out of the last window, and losers, are dropped.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from locret.config import CachePlan
from locret.errors import ConfigError
from locret.methods.base import ChunkView, Method, positive, register, within


@register("cascading")
@dataclass(frozen=True)
class Cascading(Method):
    """`cascades` windows of (budget - pinned old units) // cascades units; one decision for all heads of a layer.

    The score is the average s <- decay * s + (1 - decay) * a over queries, a the attention of one, mean over heads. A
    chunk's units are inserted in order after its attention (the paper's strides). The state that moves with a unit:
    its window, and whether it was taken last and its duel is still to come. Where every second offer begins differs
    from the published code, which counts tokens. Room that the windows leave is filled with the newest losers.
    """

    paper: ClassVar[str] = "arXiv:2406.17808"
    summary: ClassVar[str] = "a chain of windows, each keeping half as many as reach it; attention decides duels"
    variant: ClassVar[str] = "duels alternate per window, published: by token count; spare room holds losers"
    rescoring: ClassVar[bool] = True
    state: ClassVar[tuple[str, ...]] = ("window", "open")

    cascades: int = 4
    decay: float = 0.9999

    def __post_init__(self) -> None:
        positive("cascading", cascades=self.cascades)
        within("cascading", 0.0, 1.0, decay=self.decay)

    def check(self, plan: CachePlan) -> None:
        assert plan.decode_target is not None
        most = plan.decode_target - plan.num_sinks
        if self.cascades > most:
            raise ConfigError(f"cascading: {self.cascades} cascades do not fit a budget of {plan.budget}; allowed are "
                              f"1 to {most}, or raise the budget")  # fmt: skip

    def score(self, view: ChunkView) -> Tensor:
        probe, count = view.all.attention, view.q.shape[2]
        recent = probe.shared(probe.column_sums(decay=self.decay))
        return view.all.units.score * self.decay**count + recent * (1 - self.decay)

    def select(self, scores: Tensor, budget: int, pinned: Tensor, view: ChunkView) -> Tensor:
        state = view.all.units.state
        pins = pinned[:, 0]
        newest = pins.flip(-1).cumprod(-1).flip(-1).bool()  # pinned units at the end take part: they are window 0's
        fixed = pins & ~newest
        size = (budget - fixed.sum(-1, keepdim=True)) // self.cascades
        window, opened = cascade(state[:, 0, :, 0], state[:, 0, :, 1], scores[:, 0], ~fixed, size, self.cascades)
        state[..., 0], state[..., 1] = window[:, None], opened[:, None]
        index = torch.arange(pins.shape[-1], device=scores.device)
        order = (index + len(index) * (window < self.cascades)).float().masked_fill(pins, float("inf"))
        keep = order.topk(budget, dim=-1).indices.sort(dim=-1).values
        return keep[:, None].expand(-1, scores.shape[1], -1)


def cascade(
    window: Tensor, opened: Tensor, scores: Tensor, members: Tensor, size: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Push units down a chain of `count` windows until each holds at most `size`.

    Args:
        window: the window each unit lies in, new ones 0, dropped ones `count`; [B, S], oldest first.
        opened: 1 where a unit was taken by its window and has not been in its duel yet, [B, S].
        scores: [B, S];  members: which units take part, bool [B, S];  size: [B, 1].
    Returns: the new window and opened, [B, S].
    """
    for level in range(count):
        inside = members & (window == level)
        over = inside & (inside.sum(-1, keepdim=True) - inside.cumsum(-1) >= size)  # that many newer ones
        if level == count - 1:
            return window.masked_fill(over, count), opened
        below = members & (window == level + 1)
        room = (size - below.sum(-1, keepdim=True)).clamp(min=0)
        single = over & (over.cumsum(-1) <= room)
        rest = over & ~single
        opened = opened.masked_fill(below & single.any(-1, keepdim=True), 0)  # no longer the newest of its window
        line = rest | (below & (opened > 0) & (room == 0))  # the open one first: its duel is with the first offer
        turn = line.cumsum(-1) - 1
        pair = torch.div(turn, 2, rounding_mode="floor").clamp(min=0)
        first, second = line & (turn % 2 == 0), line & (turn % 2 == 1)
        taken = _of_pair(scores, pair, first)
        rival = _of_pair(scores, pair, second)
        lost = (first & (rival > scores)) | (second & (scores <= taken))
        alone = first & (rival == float("-inf"))
        window = window.masked_fill(over, level + 1).masked_fill(lost, count)
        opened = torch.where(line | single, alone.to(opened.dtype), opened)
    raise AssertionError("count is at least 1")


def _of_pair(scores: Tensor, pair: Tensor, which: Tensor) -> Tensor:
    """Every unit's pair's score of `which` of the two, [B, S]; -inf where there is none."""
    spread = torch.full((scores.shape[0], scores.shape[1] + 1), float("-inf"), device=scores.device, dtype=scores.dtype)
    spread.scatter_(1, pair.masked_fill(~which, scores.shape[1]), scores)
    spread[:, -1] = float("-inf")
    return spread.gather(1, pair)
