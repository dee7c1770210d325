"""PrefixKV (arXiv:2412.03409): every layer keeps so many units that all keep the same share of attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from locret.backbone import AttentionCall, Backbone, Rope
from locret.errors import ConfigError
from locret.kernels.attention import prefix_causal_attention
from locret.methods.base import ChunkView, Method, register
from locret.methods.pyramidkv import share_out
from locret.observe import AttentionProbe


@register("prefixkv")
@dataclass(frozen=True)
class PrefixKV(Method):
    """Accumulated attention, mean over all heads, ranks; layers share the total in proportion to `profile`.

    As in the published code the profile is measured beforehand (`measure`), on texts like the ones to come. Without
    one, all layers keep the same number.
    """

    paper: ClassVar[str] = "arXiv:2412.03409"
    summary: ClassVar[str] = "accumulated attention; layers' budgets from a measured profile of equal attention mass"
    variant: ClassVar[str] = "published: once, over the whole prompt; here at every chunk's end"
    query_aware: ClassVar[bool] = True
    rescoring: ClassVar[bool] = True

    profile: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "profile", tuple(self.profile))
        if any(not isinstance(n, int) or n < 0 for n in self.profile) or (self.profile and not any(self.profile)):
            raise ConfigError(
                f"prefixkv: profile is {self.profile}; it must be whole numbers >= 0, one a layer, not all 0"
            )

    def budgets(self, free: int, layers: int) -> list[int]:
        if self.profile and len(self.profile) != layers:
            raise ConfigError(f"prefixkv: the profile has {len(self.profile)} numbers; this model has {layers} layers "
                              "that take a budget; measure one for it")  # fmt: skip
        return share_out(free * layers, list(self.profile) or [1] * layers)

    def score(self, view: ChunkView) -> Tensor:
        probe = view.all.attention
        return view.all.units.score + probe.shared(probe.column_sums())


def measure(backbone: Backbone, ids: Tensor, keep: float) -> tuple[int, ...]:
    """A profile from one text read with full attention: units per layer, `keep` of all in the mean.

    Args: ids: int64, [1, T];  keep: share of the units, in (0, 1].
    """
    watch = _Masses(backbone.rope(ids.shape[1], ids.shape[1]), [spec.window for spec in backbone.layers])
    with torch.inference_mode():
        backbone.run(ids, watch, logits=0)
    return equal_mass(torch.stack(watch.masses), keep)


def equal_mass(masses: Tensor, keep: float) -> tuple[int, ...]:
    """Per layer the fewest units that hold a share p of its mass, p such that keep * T of them stay on average.

    masses: attention that each unit got, [L, T].
    """
    ranked = masses.double().sort(dim=-1, descending=True).values
    shares = ranked.cumsum(-1) / ranked.sum(-1, keepdim=True)  # of the best 1, 2, ... units
    low, high = 0.0, 1.0
    for _ in range(50):
        p = (low + high) / 2
        low, high = (p, high) if int((shares < p).sum() + len(shares)) <= keep * masses.numel() else (low, p)
    return tuple(((shares < low).sum(-1) + 1).clamp(max=masses.shape[1]).tolist())


class _Masses:
    """A `LayerContext` with full attention that adds up what each unit gets, in layers that take a budget."""

    def __init__(self, rope: Rope, windows: list[int | None]) -> None:
        self.rope, self.windows, self.masses = rope, windows, list[Tensor]()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        at = torch.arange(q.shape[2], device=q.device)
        q, k = self.rope.rotate(layer, q, at), self.rope.rotate(layer, k, at)
        window = self.windows[layer]
        if window is None:
            self.masses.append(AttentionProbe(q, k, call.scale, call.softcap).column_sums().mean(1)[0])
        return prefix_causal_attention(q, k, v, scale=call.scale, softcap=call.softcap, window=window)
