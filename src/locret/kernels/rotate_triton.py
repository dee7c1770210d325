"""`rotate` in Triton: a program takes some tokens of a head; both channels of a pair are loaded, turned and stored."""

# mypy: disable-error-code="no-untyped-def"
# a kernel's parameters are pointers, numbers and compile-time constants

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from locret.kernels.decode_attention import Angles
from locret.kernels.sizes import cdiv, next_power_of_2

TOKENS = 32


@triton.jit
def _turn(
    x_ptr, cos_ptr, sin_ptr, out_ptr, slots_ptr, heads, tokens, first, table_t, x_b, x_h, x_t, out_b, out_h, out_t,
    DIM: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr, SECOND: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    x_ptr += row // heads * x_b + row % heads * x_h
    out_ptr += row // heads * out_b + row % heads * out_h
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    pair = tl.arange(0, BLOCK_P)
    mask = (t < tokens)[:, None] & (pair < PAIRS)[None, :]
    at = (first + t)[:, None] * table_t + pair[None, :]
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=mask, other=0.0).to(tl.float32)
    own = t  # where the tokens lie
    if SLOTS:
        own = tl.load(slots_ptr + row * tokens + t, mask=t < tokens, other=0).to(tl.int64)
    a_at, b_at = pair[None, :] * STEP, pair[None, :] * STEP + SECOND
    a = tl.load(x_ptr + own[:, None] * x_t + a_at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + own[:, None] * x_t + b_at, mask=mask, other=0.0).to(tl.float32)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + own[:, None] * out_t + a_at, (a * cos - b * sin).to(kind), mask=mask)
    tl.store(out_ptr + own[:, None] * out_t + b_at, (b * cos + a * sin).to(kind), mask=mask)
    if DIM > 2 * PAIRS:  # channels that are not turned
        rest = 2 * PAIRS + tl.arange(0, BLOCK_R)
        mask = (t < tokens)[:, None] & (rest < DIM)[None, :]
        same = tl.load(x_ptr + own[:, None] * x_t + rest[None, :], mask=mask, other=0.0)
        tl.store(out_ptr + own[:, None] * out_t + rest[None, :], same, mask=mask)


def rotate_triton(x: Tensor, angles: Angles, first: int, out: Tensor, slots: Tensor | None = None) -> Tensor:
    """`rotate`; the last dimensions of x, out and the tables are contiguous, and so are slots."""
    batch, heads, tokens, dim = x.shape
    pairs = angles.cos.shape[1]
    rest = dim - 2 * pairs
    _turn[(cdiv(tokens, TOKENS), batch * heads)](
        x, angles.cos, angles.sin, out, x if slots is None else slots, heads, tokens, first, angles.cos.stride(0),
        *x.stride()[:3], *out.stride()[:3],
        DIM=dim, PAIRS=pairs, STEP=2 if angles.interleaved else 1, SECOND=1 if angles.interleaved else pairs,
        BLOCK_P=next_power_of_2(pairs), BLOCK_R=next_power_of_2(max(1, rest)), BLOCK_T=TOKENS,
        SLOTS=slots is not None, num_warps=4,
    )  # fmt: skip
    return out
