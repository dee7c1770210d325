"""RazorAttention (arXiv:2407.15891): few heads fetch things from far back; the others keep the ends and one unit that
stands for all they dropped."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from locret.errors import ConfigError
from locret.methods.base import BIAS, ChunkView, Method, positive, register, within
from locret.methods.pyramidkv import share_out
from locret.profile import HeadProfile, retrieval_heads
from locret.reduce import Merged, compensate
from locret.select import ranks, select_across_heads


@register("razor")
@dataclass(frozen=True)
class Razor(Method):
    """Every head keeps its pins, its newest units and, once it has dropped some, a compensation unit: their mean, with
    the logarithm of their number added to its logits. It takes the place of the oldest of them and counts as a unit.

    Published, retrieval heads keep everything and the others n / ratio of n units (at least 4,000). Under a budget the
    others keep 1 / ratio of what retrieval heads do, at the same total, and retrieval heads too end in a compensation
    unit when their part is full. Means are taken before RoPE (the paper does not say), so they do not depend on where
    units lie. Without profiles all heads are alike.

    Attributes:
        echo, induction: files of `profile.repetition_profiles`, measured on the model that runs.
        ratio: the paper's C.
    """

    paper: ClassVar[str] = "arXiv:2407.15891"
    summary: ClassVar[str] = "retrieval heads keep more; dropped units leave their mean, weighted by their number"
    variant: ClassVar[str] = "published: retrieval heads keep all; here heads share a budget; means before RoPE"
    rescoring: ClassVar[bool] = True
    ragged: ClassVar[bool] = True
    reduces: ClassVar[bool] = True
    state: ClassVar[tuple[str, ...]] = (BIAS,)

    echo: str = ""
    induction: str = ""
    echo_share: float = 0.01
    induction_share: float = 0.14
    ratio: int = 5
    found: list[list[bool]] = field(init=False, repr=False, compare=False)  # per layer and KV head: retrieval heads
    backbone: dict[str, Any] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        positive("razor", ratio=self.ratio)
        within("razor", 0.0, 1.0, echo_share=self.echo_share, induction_share=self.induction_share)
        found, backbone = self._read()
        object.__setattr__(self, "found", found)
        object.__setattr__(self, "backbone", backbone)

    def _read(self) -> tuple[list[list[bool]], dict[str, Any] | None]:
        """Per layer and KV head: is it a retrieval head? And of which model. Without profiles: [], None."""
        if not self.echo and not self.induction:
            return [], None
        if not (self.echo and self.induction):
            raise ConfigError("razor: give both profiles, echo and induction, or none of them")
        profiles = [HeadProfile.load(path) for path in (self.echo, self.induction)]
        if [p.kind for p in profiles] != ["echo", "induction"] or profiles[0].backbone != profiles[1].backbone:
            raise ConfigError(f"razor: {self.echo} and {self.induction} are {profiles[0].kind} and {profiles[1].kind} "
                              "profiles; wanted echo and induction, of one model")  # fmt: skip
        found = retrieval_heads(*(p.per_kv_head() for p in profiles), echo_share=self.echo_share,
                                induction_share=self.induction_share)  # fmt: skip
        return found.tolist(), profiles[0].backbone

    @property
    def made_for(self) -> dict[str, Any] | None:
        return self.backbone

    def describe(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "retrieval": self.found}

    def _weights(self, layer: int) -> list[int]:
        """What the heads of a layer get, in proportion."""
        return [self.ratio if retrieves else 1 for retrieves in self.found[layer]]

    def budgets(self, free: int, layers: int) -> list[int]:
        if not self.found:
            return [free] * layers
        if len(self.found) != layers:
            raise ConfigError(f"razor: the profiles have {len(self.found)} layers, of which {layers} take a budget; it "
                              "does not run models with sliding windows")  # fmt: skip
        return share_out(free * layers, [sum(self._weights(layer)) for layer in range(layers)])

    def score(self, view: ChunkView) -> Tensor:
        scores = view.all.units.score
        return torch.arange(scores.shape[-1], device=scores.device, dtype=torch.float32).expand_as(scores)

    def reduce(self, scores: Tensor, budget: int, pinned: Tensor, view: ChunkView) -> tuple[Tensor, Merged]:
        """A compensation unit finds a place beside the pins: the plan leaves `decode_interval` >= 1 of them free."""
        units, (b, heads, s) = view.all.units, scores.shape
        real = scores > float("-inf")
        free = real & ~pinned
        oldest = free & (free.cumsum(-1) == 1)  # the compensation unit, or the one that becomes it
        age = ranks(scores.masked_fill(~free, float("-inf"))).float()  # 0: the newest that is not pinned
        weights = torch.tensor(self._weights(view.layer) if self.found else [1] * heads, device=scores.device)
        ranked = (-age / weights[:, None]).masked_fill(~real, float("-inf"))
        keep = select_across_heads(ranked, budget, pinned | oldest, floor=1)
        kept = (
            torch.zeros(b, heads * s, dtype=torch.bool, device=scores.device).scatter(1, keep, True).view(b, heads, s)
        )
        bias = units.state[..., 0]
        folded = (real & ~kept) | oldest
        mean = compensate(units.k, units.v, bias.masked_fill(~folded, float("-inf")))
        at = oldest[..., None]
        return keep, Merged(torch.where(at, mean.k, units.k), torch.where(at, mean.v, units.v),
                            torch.where(oldest, mean.bias, bias))  # fmt: skip
