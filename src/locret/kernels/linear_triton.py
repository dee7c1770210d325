"""`project` and `gated` of one row in Triton. Meaning and shapes: linear.py.

A program takes BLOCK_N outputs and walks all inputs: products of numbers, summed lane by lane and at the end across
lanes, so that nothing but loads of the weights is on the way. The norm is a factor, so it is gathered on the same walk
and multiplied in at the end.
"""

# mypy: disable-error-code="no-untyped-def"
# a kernel's parameters are pointers, numbers and compile-time constants

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from locret.kernels.linear import Norm
from locret.kernels.sizes import cdiv, next_power_of_2


@dataclass(frozen=True)
class Tile:
    """Outputs and inputs of a program's step; results differ in rounding only."""

    n: int
    k: int
    warps: int = 4
    stages: int = 1


@triton.jit
def _walk(x_ptr, w_ptr, w_n, v_ptr, v_n, norm_ptr, n, inside, e, eps,
          TWO: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """x' W^T and, if TWO, x' V^T for outputs n, fp32: [BLOCK_N]."""
    one = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    two = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, e, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        real = k < e
        mask = inside[:, None] & real[None, :]
        w = tl.load(w_ptr + n[:, None] * w_n + k[None, :], mask=mask, other=0.0)
        if TWO:
            v = tl.load(v_ptr + n[:, None] * v_n + k[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + k, mask=real, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + k, mask=real, other=0.0).to(tl.float32)
        one += w.to(tl.float32) * x[None, :]
        if TWO:
            two += v.to(tl.float32) * x[None, :]
    first, second = tl.sum(one, 1), tl.sum(two, 1)
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 0) / e + eps)
        first, second = first * factor, second * factor
    return first, second


@triton.jit
def _project(
    x_ptr, weights, strides, biases, norm_ptr, residual_ptr, out_ptr, e, eps,
    SIZES: tl.constexpr, BLOCKS: tl.constexpr, OFFSETS: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr,
    ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weight i is program_id(0) BLOCKS[i] ... BLOCKS[i + 1] - 1; its outputs begin at OFFSETS[i]."""
    part = tl.program_id(0)
    for i in tl.static_range(len(SIZES)):
        if part >= BLOCKS[i] and part < BLOCKS[i + 1]:
            n = (part - BLOCKS[i]).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = n < SIZES[i]
            out, _ = _walk(
                x_ptr, weights[i], strides[i], weights[i], strides[i], norm_ptr, n, inside, e, eps,
                False, NORM, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if BIASED[i]:
                out += tl.load(biases[i] + n, mask=inside, other=0.0).to(tl.float32)
            at = OFFSETS[i] + n
            if ADD:
                out += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated(
    x_ptr, gate_ptr, gate_n, up_ptr, up_n, norm_ptr, out_ptr, e, outputs, eps,
    NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < outputs
    gate, up = _walk(x_ptr, gate_ptr, gate_n, up_ptr, up_n, norm_ptr, n, inside, e, eps, True, NORM, BLOCK_N, BLOCK_K)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=inside)


def project_triton(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None, norm: Norm | None,
    residual: Tensor | None, *, out: Tensor | None = None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """`project` of x [1, E], into `out` [1, N] if given."""
    x = _row(x)
    e = x.shape[1]
    sizes = tuple(len(w) for w in weights)
    tile = tile or default_tile(sum(sizes), e, two=False)
    blocks, offsets = [0], [0]
    for size in sizes:
        blocks.append(blocks[-1] + cdiv(size, tile.n))
        offsets.append(offsets[-1] + size)
    if out is None:
        out = torch.empty(1, offsets[-1], dtype=x.dtype, device=x.device)
    given = list(biases or [None] * len(sizes))
    _project[(blocks[-1],)](
        x, tuple(weights), tuple(w.stride(0) for w in weights),
        tuple(weights[0] if b is None else b for b in given), x if norm is None else norm.weight,
        x if residual is None else residual, out, e, 0.0 if norm is None else norm.eps,
        SIZES=sizes, BLOCKS=tuple(blocks), OFFSETS=tuple(offsets[:-1]), BIASED=tuple(b is not None for b in given),
        ADD=residual is not None, **_constants(norm, tile),
    )  # fmt: skip
    return out


def gated_triton(
    x: Tensor, gate: Tensor, up: Tensor, norm: Norm | None, *, out: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """`gated` of x [1, E], into `out` [1, N] if given."""
    x = _row(x)
    e = x.shape[1]
    tile = tile or default_tile(len(gate), e, two=True)
    if out is None:
        out = torch.empty(1, len(gate), dtype=x.dtype, device=x.device)
    _gated[(cdiv(len(gate), tile.n),)](
        x, gate, gate.stride(0), up, up.stride(0), x if norm is None else norm.weight, out, e, len(gate),
        0.0 if norm is None else norm.eps, **_constants(norm, tile),
    )  # fmt: skip
    return out


@triton.jit
def _rms_norm(x_ptr, x_m, x_h, weight_ptr, out_ptr, heads, e, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    real = k < e
    x = tl.load(x_ptr + row // heads * x_m + row % heads * x_h + k, mask=real, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 0) / e + eps)
    weight = tl.load(weight_ptr + k, mask=real, other=0.0).to(tl.float32)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    rounded = (x * factor).to(kind).to(tl.float32)  # where transformers rounds
    tl.store(out_ptr + row * e + k, (weight * rounded).to(kind), mask=real)


def rms_norm_triton(x: Tensor, norm: Norm) -> Tensor:
    """`rms_norm` of x [..., H, E] whose outer dimensions lie evenly in memory; the result is contiguous."""
    e = x.shape[-1]
    heads = x.shape[-2] if x.dim() > 2 else 1
    flat = x.flatten(0, -3) if x.dim() > 3 else x
    if flat.stride(-1) != 1 or (x.dim() > 3 and flat.data_ptr() != x.data_ptr()):
        flat = flat.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = next_power_of_2(e)
    _rms_norm[(x.numel() // e,)](
        flat, flat.stride(0), flat.stride(-2) if x.dim() > 2 else 0, norm.weight, out, heads, e, norm.eps,
        BLOCK=block, num_warps=min(8, max(1, block // 512)),
    )  # fmt: skip
    return out


@triton.jit
def _silu_mul(gate_ptr, up_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    kind: tl.constexpr = gate_ptr.dtype.element_ty
    rounded = (gate * tl.sigmoid(gate)).to(kind).to(tl.float32)  # where transformers rounds
    tl.store(gate_ptr + at, (rounded * up).to(kind), mask=at < count)


def silu_mul_triton(gate: Tensor, up: Tensor) -> Tensor:
    """`silu_mul`, over `gate`; both contiguous."""
    assert gate.is_contiguous(), "written in place"
    _silu_mul[(cdiv(gate.numel(), 4096),)](gate, up.contiguous(), gate.numel(), BLOCK=4096, num_warps=8)
    return gate


@triton.jit
def _silu_scores(x_ptr, w_ptr, w_n, out_ptr, rows, tokens, e, N: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_K: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    mask = (row < rows)[:, None] & (k < e)[None, :]
    x = tl.load(x_ptr + row[:, None] * e + k[None, :], mask=mask, other=0.0).to(tl.float32)
    x = (x * tl.sigmoid(x)).to(x_ptr.dtype.element_ty).to(tl.float32)  # where torch rounds
    at = out_ptr + row // tokens * N * tokens + row % tokens
    for n in tl.static_range(N):
        w = tl.load(w_ptr + n * w_n + k, mask=k < e, other=0.0).to(tl.float32)
        tl.store(at + n * tokens, tl.sum(x * w[None, :], 1), mask=row < rows)


def silu_scores_triton(x: Tensor, weight: Tensor, tokens: int) -> Tensor:
    """`silu_scores`."""
    rows, e = x.shape
    out = torch.empty(rows // tokens, len(weight), tokens, dtype=torch.float32, device=x.device)
    wide = next_power_of_2(e)
    block = max(1, 8192 // wide)
    _silu_scores[(cdiv(rows, block),)](
        x, weight, weight.stride(0), out, rows, tokens, e, N=len(weight), BLOCK_M=block, BLOCK_K=wide, num_warps=4
    )
    return out


def default_tile(outputs: int, inputs: int, *, two: bool) -> Tile:
    """Long rows and few outputs a program: what was fastest on an H200 at Llama-3.1-8B's shapes (docs/kernels.md)."""
    wide = min(1024, next_power_of_2(inputs))
    return Tile(n=4 if two or outputs > 5000 else 8, k=wide)


def _constants(norm: Norm | None, tile: Tile) -> dict[str, int | bool]:
    return dict(NORM=norm is not None, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages)


def _row(x: Tensor) -> Tensor:
    assert len(x) == 1, "more rows are cuBLAS's"
    return x if x.stride(1) == 1 else x.contiguous()
