"""SnapKV (arXiv:2404.14469), the chunk-local variant: the chunk's last queries vote for the units.

The published method runs once, at the end of a prompt that is cached whole, and its window holds the question. Under
chunked prefill no question is known and the whole prompt is never cached, so each chunk's own last queries vote. That
is a variant and behaves like one: it keeps what the text read last attends to. With one chunk it is the published one.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from locret.config import CachePlan
from locret.errors import ConfigError
from locret.methods.base import ChunkView, Method, one_of, positive, register, window_fits


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(Method):
    """Attention of the chunk's last `window` queries: summed over them, mean over the group, pooled over
    the units before the window.

    `pooling` "avg" counts zeros beyond the edges, as the published code does.
    """

    paper: ClassVar[str] = "arXiv:2404.14469"
    summary: ClassVar[str] = "attention of each chunk's last queries votes, pooled over neighbours"
    variant: ClassVar[str] = "published: once, over the whole prompt; here at every chunk's end"
    query_aware: ClassVar[bool] = True
    rescoring: ClassVar[bool] = True
    memoryless: ClassVar[bool] = True

    window: int = 32
    kernel_size: int = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        positive("snapkv", window=self.window, kernel_size=self.kernel_size)
        one_of("snapkv", ("avg", "max"), pooling=self.pooling)
        if self.kernel_size % 2 == 0:
            raise ConfigError(f"snapkv: kernel_size is {self.kernel_size}; it must be odd: 1, 3, 5, 7 ...")

    def check(self, plan: CachePlan) -> None:
        window_fits(self.name, self.window, plan)

    def score(self, view: ChunkView) -> Tensor:
        probe = view.all.attention
        w = min(self.window, view.q.shape[2])  # a decode step has one query
        votes = probe.per_kv_head(probe.column_sums(w))  # [B, Hkv, S]
        before = votes.shape[-1] - w
        pool = functional.max_pool1d if self.pooling == "max" else functional.avg_pool1d
        if before:
            votes[..., :before] = pool(votes[..., :before], self.kernel_size, stride=1, padding=self.kernel_size // 2)
        votes[..., before:] = float(w)  # the window itself stays: no sum of w softmax rows exceeds w
        return votes
