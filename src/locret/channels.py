"""ThinK (arXiv:2407.21018): cached keys lose the channels that queries make least use of.

    score_j = mean over the observed queries of q_j**2  *  mean over the keys of k_j**2

per KV head, query energy averaged over the group, as in the published code (the paper's Frobenius norm
|| Q_j K_j^T ||_F = ||Q_j|| ||K_j|| ranks channels the same way). The lowest `ratio` of the channels go.

The published method scores rotated queries and keys once, at the prompt's end, and leaves the newest 32 units whole.
Keys that are stored before RoPE lose whole rotation pairs instead (`paired`): a rotation mixes the two channels of a
pair and no others, so a pair may be dropped before it and its energy is the same after it. That is a variant.

Shapes: B batch, w observed queries, n units, Hq/Hkv heads, D head dim, d channels that stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from locret.errors import ConfigError
from locret.storage import Codec, Dense, Stored


def channel_scores(q: Tensor, k: Tensor, *, paired: bool = False) -> Tensor:
    """What each key channel contributes to the logits of some queries.

    Args:
        q: observed queries, [B, Hq, w, D].
        k: keys, [B, Hkv, n, D]; q and k both rotated, or both not.
        paired: channels i and i + D / 2 share a score, from both their energies: the same before and after a
            half-rotation RoPE. (GLM and Cohere rotate neighbours; for them this is no pair.)
    Returns: fp32 [B, Hkv, D].
    """
    query = q.unflatten(1, (k.shape[1], -1)).float().pow(2).mean((2, 3))  # [B, Hkv, D]
    key = k.float().pow(2).mean(2)
    if not paired:
        return query * key
    query, key = (x.unflatten(-1, (2, -1)).sum(-2) for x in (query, key))  # [B, Hkv, D / 2]
    return (query * key).repeat(1, 1, 2)


def kept_channels(scores: Tensor, ratio: float, *, paired: bool = False) -> Tensor:
    """The channels that stay when the lowest `ratio` of them go.

    Args:    scores: [B, Hkv, D];  ratio: 0 <= ratio < 1 (published: 0.3 to 0.5);  paired: as in `channel_scores`.
    Returns: int64 [B, Hkv, d], ascending, the same d in every head.
    Raises:  ConfigError: a ratio outside.
    """
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio of pruned channels is {ratio!r}; allowed: 0 <= ratio < 1")
    width = scores.shape[-1] // 2 if paired else scores.shape[-1]
    kept = scores[..., :width].topk(width - int(width * ratio), dim=-1).indices.sort(-1).values
    return torch.cat((kept, kept + width), -1) if paired else kept


@dataclass(frozen=True)
class ChannelPruned:
    """Codec: keys without the channels that went; they decode to zeros, which add nothing to a logit.

    Attributes:
        channels: those that stay, int64 [B, Hkv, d]; 8 bytes each, once, beside the units.
        head_dim: D.
        inner: how what is left is stored.
    """

    channels: Tensor
    head_dim: int
    inner: Codec = field(default_factory=Dense)

    @property
    def name(self) -> str:
        return f"think-{self.inner.name}"

    def encode(self, x: Tensor) -> Stored:
        """x [B, Hkv, n, D]."""
        return self.inner.encode(x.gather(-1, self._index(x.shape[-2])))

    def decode(self, stored: Stored) -> Tensor:
        kept = self.inner.decode(stored)
        return kept.new_zeros(*kept.shape[:-1], self.head_dim).scatter(-1, self._index(kept.shape[-2]), kept)

    def _index(self, units: int) -> Tensor:
        return self.channels[..., None, :].expand(*self.channels.shape[:-1], units, -1)
