"""PyramidKV (arXiv:2406.02069): lower layers keep more units than upper ones; scores are SnapKV's."""

from dataclasses import dataclass
from typing import ClassVar

from locret.methods.base import Method, Wrapped, positive, register


@register("pyramidkv")
@dataclass(frozen=True)
class PyramidKV(Wrapped):
    """Budgets fall linearly from 2 * free - free / beta in the first layer to free / beta in the last.

    `free` is a layer's budget without the pinned units, which every layer keeps. Published code rounds the step down
    and spends up to L / 2 units more per layer; here the sum is exact, each layer within one unit of the line. A short
    prompt is not shared out anew: a layer with more budget than tokens leaves it unused.
    """

    paper: ClassVar[str] = "arXiv:2406.02069"
    summary: ClassVar[str] = "as snapkv, with budgets that fall from layer to layer"
    variant: ClassVar[str] = "published: once, over the whole prompt; here at every chunk's end"
    query_aware: ClassVar[bool] = True
    rescoring: ClassVar[bool] = True

    base: str | Method = "snapkv"
    beta: int = 20

    def __post_init__(self) -> None:
        positive("pyramidkv", beta=self.beta)
        super().__post_init__()

    def budgets(self, free: int, layers: int) -> list[int]:
        if layers == 1:
            return [free]
        first, drop = (2 * self.beta - 1) * (layers - 1), 2 * (self.beta - 1)
        return share_out(free * layers, [first - drop * layer for layer in range(layers)])


def share_out(total: int, weights: list[int]) -> list[int]:
    """Whole numbers in proportion to `weights` with this sum: largest remainders, the earlier one first."""
    whole = sum(weights)
    shares = [total * weight // whole for weight in weights]
    rest = sorted(range(len(weights)), key=lambda i: -(total * weights[i] % whole))
    for i in rest[: total - sum(shares)]:
        shares[i] += 1
    return shares
