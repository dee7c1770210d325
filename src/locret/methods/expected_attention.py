"""Expected Attention (arXiv:2510.00636): what queries like those seen would attend to from future positions."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from locret.methods.base import ChunkView, Method, positive, register


@register("expected_attention")
@dataclass(frozen=True)
class ExpectedAttention(Method):
    """Queries before RoPE are taken as Gaussian, turned by the mean rotation of the next `num_future` positions; a
    key's weight is then exp(k.mu * scale + (k.cov.k) * scale^2 / 2), normalised over units, times the value's norm.

    The first `num_sinks` tokens are left out of the statistics and rank highest.
    """

    paper: ClassVar[str] = "arXiv:2510.00636"
    summary: ClassVar[str] = "expected attention of future queries, from mean and covariance of the chunk's"
    variant: ClassVar[str] = "published: queries of the whole prompt; here of each chunk (decoding: of one query)"
    rescoring: ClassVar[bool] = True
    memoryless: ClassVar[bool] = True

    num_future: int = 512
    num_sinks: int = 4
    covariance: bool = True
    value_norm: bool = True

    def __post_init__(self) -> None:
        positive("expected_attention", num_future=self.num_future)

    def score(self, view: ChunkView) -> Tensor:
        units, wide = view.all.units, torch.float64 if view.q.dtype == torch.float64 else torch.float32
        mean, covariance = self._queries(view, wide)
        keys = view.all.keys.to(wide)
        groups = mean.shape[1] // keys.shape[1]
        sinks = units.position < self.num_sinks
        total = torch.zeros_like(keys[..., 0])
        d, copies = keys.shape[-1], 3 if keys.dtype != view.q.dtype else 2
        turned = (
            3 * d * d * self.num_future * keys.element_size()
        )  # `ahead` of all axes, and what it takes to get there
        view.all.attention.count_scratch(max(turned, copies * keys.nbytes + 2 * covariance.nbytes))
        for g in range(groups):  # one query head of each group at a time: [B, Hkv, S, D] is the largest temporary
            mu, cov = mean[:, g::groups], covariance[:, g::groups]
            logits = (keys @ mu[..., None])[..., 0] * view.scale
            if self.covariance:
                logits = logits + ((keys @ cov) * keys).sum(-1) * (view.scale**2 / 2)
            total += logits.masked_fill(sinks, float("-inf")).softmax(-1).nan_to_num()  # nothing but sinks: NaN
        scores = total / groups
        if self.value_norm:
            scores = scores * units.v.to(wide).norm(dim=-1)
        return torch.where(sinks, scores.amax(-1, keepdim=True), scores).float()

    def _queries(self, view: ChunkView, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean [B, Hq, D] and covariance [B, Hq, D, D] of the chunk's queries, at future positions."""
        d = view.q.shape[-1]
        q = view.q[:, :, max(0, min(self.num_sinks - view.start, view.q.shape[2] - 1)) :].to(dtype)
        axes = torch.eye(d, dtype=view.q.dtype, device=q.device)[None, :, None].expand(1, d, self.num_future, d)
        turn = view.all.ahead(axes)[0].to(dtype).mean(1)  # [D, D]: what the mean rotation makes of each axis
        mean = q.mean(2, keepdim=True)
        covariance = (q - mean).mT @ (q - mean) / q.shape[2]
        return (mean @ turn)[:, :, 0], turn.mT @ covariance @ turn
