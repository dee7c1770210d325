"""ThinK (arXiv:2407.21018): cached keys lose the channels that queries make least use of.

    score_j = mean over the observed queries of q_j**2  *  mean over the keys of k_j**2

per KV head, query energy averaged over the group, as in the published code (the paper's Frobenius norm
|| Q_j K_j^T ||_F = ||Q_j|| ||K_j|| ranks channels the same way). The lowest `ratio` of the channels go.

The published method scores rotated queries and keys once, at the prompt's end, and leaves the newest 32 units whole.
Keys that are stored before RoPE lose whole rotation pairs instead (`paired`): a rotation mixes the two channels of a
pair and no others, so a pair may be dropped before it and its energy is the same after it. That is a variant, and so is
when `Think` chooses: once, as soon as a unit has aged, by the keys that are encoded then and the queries of that chunk.

Shapes: B batch, w observed queries, n units, m of them newly aged, Hq/Hkv heads, D head dim, d channels that stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from locret.errors import ConfigError
from locret.storage import Codec, Dense, Stored
from locret.tail import ROW, Aged, Tailed, TailStored, check_residual

OBSERVED = 32  # queries that choose, and newest units that stay whole: the published code's


def channel_scores(q: Tensor, k: Tensor, *, paired: bool = False) -> Tensor:
    """What each key channel contributes to the logits of some queries.

    Args:
        q: observed queries, [B, Hq, w, D].
        k: keys, [B, Hkv, n, D]; q and k both rotated, or both not.
        paired: channels i and i + D / 2 share a score, from both their energies: the same before and after a
            half-rotation RoPE. (GLM and Cohere rotate neighbours; for them this is no pair.)
    Returns: fp32 [B, Hkv, D].
    """
    return _scores(_query_energy(q, k.shape[1]), k.float().pow(2).mean(2), paired=paired)


def _query_energy(q: Tensor, num_heads: int) -> Tensor:
    """[B, Hq, w, D] -> [B, Hkv, D]."""
    return q.unflatten(1, (num_heads, -1)).float().pow(2).mean((2, 3))


def _scores(query: Tensor, key: Tensor, *, paired: bool) -> Tensor:
    """Of energies [B, Hkv, D]."""
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
    check_ratio(ratio)
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


@dataclass(frozen=True)
class Think(Tailed):
    """Keys of a layer in the cache: pruned when they have aged. An encoded unit's row number is 0.

    Attributes:
        ratio: share of the channels that go, in rotation pairs; published 0.3 to 0.5, 0.4 in most of its tables.
        inner: how what is left is stored.
        residual: newest units that stay whole.
    """

    ratio: float = 0.4
    inner: Codec = field(default_factory=Dense)
    residual: int = OBSERVED

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_residual(self.residual)

    @property
    def name(self) -> str:
        return f"think-{self.inner.name}"

    def unit_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        return self.inner.encode(torch.zeros(1, self._width(head_dim), dtype=dtype)).nbytes + 4

    def fixed_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        return super().fixed_bytes(head_dim, dtype) + 2 * self._width(head_dim)

    def blank(self, x: Tensor) -> dict[str, Tensor]:
        one = self.inner.encode(x.new_zeros(1, self._width(x.shape[-1])))
        return {name: part.new_zeros(*x.shape[:-1], part.shape[-1]) for name, part in one.parts.items()}

    def tables(self, x: Tensor) -> dict[str, Tensor]:
        """The channels of every sequence and KV head, int16 [B, Hkv, d]; of width 0 until they are chosen."""
        return {"channels": torch.empty(*x.shape[:-2], 0, dtype=torch.int16, device=x.device)}

    def encode_aged(self, stored: TailStored, aged: Aged) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        channels = stored.tables["channels"]
        if channels.shape[-1] == 0:
            channels = self._choose(aged).to(torch.int16)
        mine = channels[aged.batch, aged.head].long()  # [m, d]
        parts = self.inner.encode(aged.x.gather(-1, mine)).parts
        row = torch.zeros(len(aged.x), 1, dtype=torch.int32, device=aged.x.device)
        return {**parts, ROW: row}, {"channels": channels}

    def decode_aged(self, stored: TailStored) -> Tensor:
        channels, head_dim = stored.tables["channels"], stored.tables["tail"].shape[-1]
        if channels.shape[-1] == 0:
            return stored.tables["tail"].new_zeros(*stored.row.shape, head_dim)
        parts = {name: x for name, x in stored.parts.items() if name != ROW}
        return ChannelPruned(channels.long(), head_dim, self.inner).decode(Stored(parts))

    def _choose(self, aged: Aged) -> Tensor:
        """Channels [B, Hkv, d] by the energy of the aged keys; a head that has none goes by its queries."""
        assert aged.queries is not None, "the layer keeps the chunk's queries until its units are settled"
        batch, num_heads = aged.queries.shape[0], aged.num_heads
        of = aged.batch * num_heads + aged.head
        squares = aged.x.new_zeros(batch * num_heads, aged.x.shape[-1], dtype=torch.float32)
        squares.index_add_(0, of, aged.x.float().pow(2))
        counts = torch.bincount(of, minlength=batch * num_heads)[:, None]
        key = torch.where(counts > 0, squares / counts.clamp(min=1), 1.0).unflatten(0, (batch, num_heads))
        query = _query_energy(aged.queries[:, :, -OBSERVED:], num_heads)
        return kept_channels(_scores(query, key, paired=True), self.ratio, paired=True)

    def _width(self, head_dim: int) -> int:
        """Channels that stay."""
        half = head_dim // 2
        return 2 * (half - int(half * self.ratio))


def check_ratio(ratio: float) -> None:
    """Raise a ConfigError unless 0 <= ratio < 1."""
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio of pruned channels is {ratio!r}; allowed: 0 <= ratio < 1")
