"""Attention of a few queries over fixed slots, as decoding needs it: one pass over K and V as they are stored.

Slots `first_unit .. stop - 1` of a head hold its units, the last T of them the queries' own; what lies before and
behind is never looked at. So one call reads slabs that are filled from the left (`stop` differs by row), heads padded
on the left (`first_unit`, as `cache.RaggedLayer` has them), and both.

    position of slot s = first_position + s - first_unit
    logits = scale * R(q_t) . R(k_s);  softcap;  + bias_s          R: RoPE at the position, if tables are given
    query t of T sees the slots before stop - (T - 1 - t)

Keys lie in the cache before RoPE. Here they are rotated on the way into the product, so no rotated copy of a layer is
written and read again: K costs what it weighs. Units of `storage.Affine` with 8 or 4 bits are decoded on the same way.

CUDA, if asked for (`switch`): split-KV Triton kernel, one program a (row, KV head, stretch of slots), whose query heads
are one tile; a second one merges the stretches by their log-sum-exps. Elsewhere: decode, rotate, and the fused calls of
`kernels.attention`, or plain matmuls where slots are hidden.

Shapes: B batch, T queries, S slots, Hq/Hkv heads, G = Hq // Hkv, D head dim, R rotated channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from locret.kernels.attention import prefix_causal_attention
from locret.kernels.scattered import Scattered
from locret.kernels.switch import use_triton

Slab: TypeAlias = "Tensor | Codes | Scattered"
ApplyRope = Callable[..., tuple[Tensor, Tensor]]
MOST_ROWS = 64  # G * T of one tile in the kernel


@dataclass(frozen=True)
class Codes:
    """K or V as `storage.Affine` stores it: numbers are code * scale + zero.

    4 bits: byte j holds channel j in its low and channel j + D / 2 in its high half.
    """

    codes: Tensor  # uint8, [B, Hkv, S, D * bits / 8]
    scale: Tensor  # [B, Hkv, S, D / group size]
    zero: Tensor  # like scale
    bits: int  # 8 or 4
    table: Tensor | None = None  # where kernels look for every head's codes, scales and zeros: int64, [3, B, Hkv],
    # contiguous (`scattered.addresses`); then a captured kernel reads other slabs of the same size as well

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of `table`."""
        return self.codes, self.scale, self.zero

    @property
    def head_dim(self) -> int:
        return self.codes.shape[3] * 8 // self.bits

    def decode(self) -> Tensor:
        """[B, Hkv, S, D] in the scale's dtype, as `storage.Affine.decode` gives it."""
        codes = self.codes if self.bits == 8 else torch.cat((self.codes & 15, self.codes >> 4), -1)
        wide = torch.float64 if self.scale.dtype == torch.float64 else torch.float32
        groups = codes.unflatten(-1, (self.scale.shape[-1], -1)).to(wide)
        numbers = torch.addcmul(self.zero.to(wide)[..., None], groups, self.scale.to(wide)[..., None])
        return numbers.to(self.scale.dtype).flatten(-2)


@dataclass(frozen=True)
class Angles:
    """RoPE of the first R channels in pairs; the others stay.

    Pair j is channels (j, j + R / 2), or (2 j, 2 j + 1) if `interleaved`; it becomes (a cos - b sin, b cos + a sin).
    """

    cos: Tensor  # [positions, R / 2]: column j is pair j's
    sin: Tensor
    interleaved: bool = False

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, H, T, D] at positions [B, H, T]."""
        pairs = self.cos.shape[1]
        turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        cos, sin = self.cos[positions].to(x.dtype), self.sin[positions].to(x.dtype)
        if self.interleaved:
            a, b = turned[..., ::2], turned[..., 1::2]
            return torch.cat((torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2), rest), -1)
        a, b = turned[..., :pairs], turned[..., pairs:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def angles_of(apply: ApplyRope, cos: Tensor, sin: Tensor, head_dim: int) -> Angles | None:
    """The same rotation as a transformers family's, or None if it is none of the kinds that `Angles` can say.

    Families differ in their pairs and in how their tables repeat an angle; so each kind is tried on random numbers.

    Args:
        apply: the family's apply_rotary_pos_emb(q, k, cos, sin).
        cos, sin: its tables, [positions, R].
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, min(len(cos), 64), head_dim, generator=generator).to(cos.device, cos.dtype)
    want = apply(x, x, cos[None, : x.shape[2]], sin[None, : x.shape[2]])[0].float()
    at = torch.arange(x.shape[2], device=cos.device)[None, None]
    allowed = 1e-5 if cos.dtype in (torch.float32, torch.float64) else 4e-2
    half = cos.shape[1] // 2
    for found in (
        Angles(cos[:, :half], sin[:, :half]),
        Angles(cos[:, :half], sin[:, :half], interleaved=True),
        Angles(cos[:, ::2].contiguous(), sin[:, ::2].contiguous(), interleaved=True),
    ):
        if bool(((found.rotate(x, at).float() - want).abs() <= allowed).all()):
            return found
    return None


@dataclass(frozen=True)
class Span:
    """Which slots hold units, and at which positions. Left out: all slots, numbered from 0."""

    first_unit: Tensor | None = None  # int, [B, Hkv]: the first slot in use
    stop: Tensor | None = None  # int, [B, Hkv]: behind the last one, at least first_unit
    first_position: Tensor | None = None  # int, [B]: position of the first unit

    def bounds(self, k: Tensor | Codes) -> tuple[Tensor, Tensor, Tensor]:
        """first_unit and stop [B, Hkv], first_position [B, 1]."""
        like = k.codes if isinstance(k, Codes) else k
        batch, heads, slots, _ = like.shape
        zeros = torch.zeros(batch, heads, dtype=torch.int64, device=like.device)
        first = zeros if self.first_unit is None else self.first_unit
        stop = zeros + slots if self.stop is None else self.stop
        position = zeros[:, :1] if self.first_position is None else self.first_position[:, None]
        return first, stop, position

    def row(self, i: int) -> Span:
        """Of one row."""
        own = (None if x is None else x[i : i + 1] for x in (self.first_unit, self.stop, self.first_position))
        return Span(*own)


EVERYTHING = Span()


def decode_attention(
    q: Tensor, k: Slab, v: Slab, *, scale: float, span: Span = EVERYTHING,
    angles: Angles | None = None, softcap: float | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The definition above.

    Args:
        q: [B, Hq, T, D], before RoPE if `angles` are given; T small.
        k, v: [B, Hkv, S, D] of one kind, any strides; k before RoPE if `angles` are given. Rows may lie apart
            (`Scattered`), numbers in q's dtype; then without bias.
        scale: factor on the logits.
        angles: tables that reach the last position.
        softcap: logits become softcap * tanh(logits / softcap).
        bias: added to the logits after the softcap, [B, Hkv, S]; -inf hides a slot.
    Returns: [B, Hq, T, D] in q's dtype; zeros for a query that sees no slot.
    """
    assert type(k) is type(v), "K and V are stored alike"
    heads = k.heads if isinstance(k, Scattered) else (k.codes if isinstance(k, Codes) else k).shape[1]
    rows = q.shape[1] // heads * q.shape[2]
    if rows <= MOST_ROWS and q.dtype != torch.float64 and use_triton("decode_attention", q):
        from locret.kernels.decode_attention_triton import decode_attention_triton

        return decode_attention_triton(q, k, v, scale, span, angles, softcap, bias)
    return torch_decode_attention(q, k, v, scale=scale, span=span, angles=angles, softcap=softcap, bias=bias)


def torch_decode_attention(
    q: Tensor, k: Slab, v: Slab, *, scale: float, span: Span = EVERYTHING,
    angles: Angles | None = None, softcap: float | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`decode_attention` in torch: K and V decoded, keys rotated, in memory of their own."""
    if isinstance(k, Scattered) and isinstance(v, Scattered):
        assert bias is None, "rows that lie apart have no bias"
        rows = [_cut(k.slabs[i], v.slabs[i], span.row(i)) for i in range(len(q))]
        return torch.cat([
            torch_decode_attention(q[i : i + 1], *kv, scale=scale, span=own, angles=angles, softcap=softcap)
            for i, (*kv, own) in enumerate(rows)
        ])  # fmt: skip
    assert not isinstance(k, Scattered)
    assert not isinstance(v, Scattered)
    keys, values = (x.decode() if isinstance(x, Codes) else x for x in (k, v))
    if angles is not None:
        q, keys = _rotated(q, keys, span, angles)
    if span.first_unit is None and span.stop is None:
        return prefix_causal_attention(q, keys, values, scale=scale, softcap=softcap, bias=bias)
    return _masked(q.float(), keys.float(), values.float(), scale, span, softcap, bias).to(q.dtype)


def _cut(k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor, Span]:
    """One row's slab up to its last unit, where that is the same for all heads. On a GPU this waits for the device."""
    ends = [] if span.stop is None else span.stop[0].tolist()
    if len(set(ends)) != 1:
        return k, v, span
    return k[:, :, : ends[0]], v[:, :, : ends[0]], Span(span.first_unit, None, span.first_position)


def reference_decode_attention(
    q: Tensor, k: Tensor | Codes, v: Tensor | Codes, *, scale: float, span: Span = EVERYTHING,
    angles: Angles | None = None, softcap: float | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The meaning in float64: what every path must equal."""
    keys, values = ((x.decode() if isinstance(x, Codes) else x).double() for x in (k, v))
    q = q.double()
    if angles is not None:
        q, keys = _rotated(q, keys, span, angles)
    return _masked(q, keys, values, scale, span, softcap, bias)


def _rotated(q: Tensor, keys: Tensor, span: Span, angles: Angles) -> tuple[Tensor, Tensor]:
    t, slots = q.shape[2], keys.shape[2]
    if span.first_unit is span.stop is span.first_position is None:  # one angle a slot for all heads
        at = torch.arange(slots, device=q.device)[None, None]
        return angles.rotate(q, at[..., slots - t :]), angles.rotate(keys, at)
    first, stop, position = span.bounds(keys)
    own = torch.arange(slots, device=q.device) - first[..., None]  # [B, Hkv, S]
    own = torch.minimum(own, (stop - first)[..., None] - 1).clamp(min=0)  # slots without a unit: any angle will do
    at = (stop - first - t)[..., None] + torch.arange(t, device=q.device)
    queries = (at.clamp(min=0) + position[..., None]).repeat_interleave(q.shape[1] // keys.shape[1], 1)
    return angles.rotate(q, queries), angles.rotate(keys, own + position[..., None])


def _masked(
    q: Tensor, k: Tensor, v: Tensor, scale: float, span: Span, softcap: float | None, bias: Tensor | None
) -> Tensor:
    """Plain matmuls in the inputs' dtype. What stands in hidden slots, NaN too, does not matter."""
    first, stop, _ = span.bounds(k)
    t, heads = q.shape[2], k.shape[1]
    slot = torch.arange(k.shape[2], device=q.device)
    used = (slot >= first[..., None]) & (slot < stop[..., None])  # [B, Hkv, S]
    rows = q.unflatten(1, (heads, -1)).flatten(2, 3)  # [B, Hkv, G * T, D]
    logits = rows @ k.mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)[:, :, None]
    ends = stop[..., None] - torch.arange(t - 1, -1, -1, device=q.device)  # [B, Hkv, T]
    seen = (used[:, :, None] & (slot < ends[..., None])).repeat(1, 1, rows.shape[2] // t, 1)
    logits = logits.masked_fill(~seen, float("-inf"))
    weights = logits.softmax(-1).masked_fill(logits.isneginf().all(-1, keepdim=True), 0)
    out = weights @ v.masked_fill(~used[..., None], 0)  # 0 * NaN is NaN
    return out.unflatten(2, (-1, t)).flatten(1, 2)
