"""StreamingLLM (arXiv:2309.17453): the first few units, attention sinks, and a sliding window."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from locret.config import CachePlan
from locret.errors import ConfigError
from locret.methods.base import ChunkView, Method, positive, register


@register("streamingllm")
@dataclass(frozen=True)
class StreamingLLM(Method):
    """Units lie in position order, so their index is their age; its sinks rank above all.

    Published with positions renumbered in the cache: `positions="compact"`, the default.
    """

    paper: ClassVar[str] = "arXiv:2309.17453"
    summary: ClassVar[str] = "attention sinks and the newest units stay"
    rescoring: ClassVar[bool] = True  # an index stays exact in fp32 where a position past 2**24 would not
    memoryless: ClassVar[bool] = True

    num_sinks: int = 4

    def __post_init__(self) -> None:
        positive("streamingllm", num_sinks=self.num_sinks)

    def check(self, plan: CachePlan) -> None:
        assert plan.decode_target is not None
        room = plan.decode_target - max(plan.num_stabilizers, plan.local_window)
        if self.num_sinks > room:
            raise ConfigError(f"streamingllm: num_sinks {self.num_sinks} does not fit a budget of {plan.budget} beside "
                              f"the newest units; allowed are 1 to {room}, or raise the budget")  # fmt: skip

    def score(self, view: ChunkView) -> Tensor:
        units = view.all.units
        index = torch.arange(len(units), device=units.score.device, dtype=torch.float32).expand_as(units.score)
        return index + len(units) * (units.position < self.num_sinks)
