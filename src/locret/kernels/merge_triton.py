"""Two attention results over disjoint keys made one: out = lerp(a, b, sigmoid(lse_b - lse_a)), over `a`."""

# mypy: disable-error-code="no-untyped-def"
# a kernel's parameters are pointers, numbers and compile-time constants

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from locret.kernels.sizes import cdiv, next_power_of_2

ROWS = 16


@triton.jit
def _merge(a_ptr, b_ptr, a_lse, b_lse, heads, tokens, a_b, a_h, a_t, b_b, b_h, b_t, DIM: tl.constexpr,
           BLOCK: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    mask = (t < tokens)[:, None] & (d < DIM)[None, :]
    first = tl.load(a_lse + row * tokens + t, mask=t < tokens, other=0.0)
    second = tl.load(b_lse + row * tokens + t, mask=t < tokens, other=0.0)
    weight = tl.sigmoid(second - first)[:, None]
    a_at = a_ptr + batch * a_b + head * a_h + t[:, None] * a_t + d[None, :]
    a = tl.load(a_at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + batch * b_b + head * b_h + t[:, None] * b_t + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(a_at, (a + weight * (b - a)).to(a_ptr.dtype.element_ty), mask=mask)


def merge_triton(a: Tensor, b: Tensor, a_lse: Tensor, b_lse: Tensor) -> Tensor:
    """a, b [B, H, T, D], last dimension contiguous; their log-sum-exps fp32 [B, H, T]; returns `a`."""
    batch, heads, tokens, dim = a.shape
    _merge[(cdiv(tokens, ROWS), batch * heads)](
        a, b, a_lse.contiguous(), b_lse.contiguous(), heads, tokens, *a.stride()[:3], *b.stride()[:3],
        DIM=dim, BLOCK=next_power_of_2(dim), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return a
