"""A few rows times large matrices, as decoding needs it, with what stands around the product in the same pass.

    project:  out = x' W^T (+ bias) (+ residual)          for one or several W with the same input, side by side
    gated:    out = silu(x' G^T) * (x' U^T)
    x' = x, or RMSNorm(x) = weight * x / sqrt(mean(x^2) + eps)

With so few rows a product costs what its matrix weighs: each weight is read once, and nothing else is worth a launch of
its own. The torch paths round where a transformers module would; the kernel keeps fp32 to the end.

CUDA: Triton for one row (`switch`). For more rows the products are cuBLAS's, which is as fast or faster from two on
(measured on an H200), and only what stands around them is ours. Elsewhere: torch.

Shapes: M rows, E inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from locret.kernels.sizes import cdiv
from locret.kernels.switch import use_triton

_HALF = (torch.bfloat16, torch.float16)


class Norm(NamedTuple):
    """RMSNorm of the input."""

    weight: Tensor  # [E]
    eps: float


def project(
    x: Tensor, weights: Sequence[Tensor], *, biases: Sequence[Tensor | None] | None = None, norm: Norm | None = None,
    residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The definition above.

    Args:
        x: [M, E].
        weights: up to three, each [N_i, E], rows contiguous.
        biases: one a weight, [N_i] or None.
        residual: [M, N] of a single weight, contiguous; it is overwritten with the result.
    Returns: [M, N_i] of every weight, in x's dtype.
    """
    if _takes(x, weights):
        from locret.kernels.linear_triton import project_triton

        out = project_triton(x, weights, biases, norm, residual, out=residual)
        return list(out.split([len(w) for w in weights], -1))
    return torch_project(x, weights, biases=biases, norm=norm, residual=residual)


def gated(x: Tensor, weights: Sequence[Tensor], *, norm: Norm | None = None) -> Tensor:
    """The definition above. x: [M, E]; weights: G and U, [N, E] each, or one [2 N, E] of both; returns [M, N]."""
    if len(weights) == 1:
        weights = weights[0].chunk(2)
    if _takes(x, weights):
        from locret.kernels.linear_triton import gated_triton

        return gated_triton(x, weights[0], weights[1], norm)
    return torch_gated(x, weights, norm=norm)


def torch_project(
    x: Tensor, weights: Sequence[Tensor], *, biases: Sequence[Tensor | None] | None = None, norm: Norm | None = None,
    residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """`project` in torch."""
    x = rms_norm(x, norm)
    given = biases or [None] * len(weights)
    if residual is None:
        return [functional.linear(x, w, b) for w, b in zip(weights, given, strict=True)]
    assert len(weights) == 1, "a residual belongs to one weight"
    if given[0] is not None:
        residual += given[0]
    return [residual.addmm_(x, weights[0].t())]  # in the product's own epilogue: no pass of its own


def torch_gated(x: Tensor, weights: Sequence[Tensor], *, norm: Norm | None = None) -> Tensor:
    """`gated` in torch, many rows a piece at a time: x' U^T of a piece lies where the next one's x' G^T will be.

    Both products whole would be the most that a chunk ever takes.
    """
    gate, up = (w.t() for w in weights)
    rows, outputs = len(x), gate.shape[1]
    size = piece(rows, outputs)
    starts = range(0, rows, size)
    last = rows - starts[-1]
    place = x.new_empty(rows + max(last, min(size, rows) - last), outputs)  # the last two pieces' ends decide
    for start in starts:
        stop = min(start + size, rows)
        part = rms_norm(x[start:stop], norm)
        torch.mm(part, gate, out=place[start:stop])
        torch.mm(part, up, out=place[stop : stop + len(part)])
        silu_mul(place[start:stop], place[stop : stop + len(part)])
        del part  # before the next one is made
    return place[:rows]


_TILE, _WAVE = (128, 256), 132  # rows and outputs of a usual tile of cuBLAS's on Hopper, and its multiprocessors
_MOST = 8  # tiles of rows in a piece


def piece(rows: int, outputs: int) -> int:
    """How many rows at once: as few waves of tiles as possible in all, and of equals the fewest pieces."""
    tiles, across = cdiv(rows, _TILE[0]), cdiv(outputs, _TILE[1])

    def waves(size: int) -> int:
        whole, rest = divmod(tiles, size)
        return whole * cdiv(size * across, _WAVE) + cdiv(rest * across, _WAVE)

    return _TILE[0] * min(range(_MOST, _MOST // 2 - 1, -1), key=waves)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [M, N] each, written over `gate`."""
    if use_triton("linear", gate) and gate.dtype in _HALF:
        from locret.kernels.linear_triton import silu_mul_triton

        return silu_mul_triton(gate, up)
    return functional.silu(gate, inplace=True).mul_(up)


def silu_scores(x: Tensor, weight: Tensor, tokens: int) -> Tensor:
    """silu(x) W^T summed in fp32, for a few outputs: the second half of a retaining head.

    Args:    x: [B T, E], contiguous; weight: [N, E], rows contiguous; tokens: T.
    Returns: fp32, [B, N, T].
    """
    if use_triton("linear", x) and x.dtype in _HALF and not torch.is_grad_enabled():
        from locret.kernels.linear_triton import silu_scores_triton

        return silu_scores_triton(x, weight, tokens)
    scores = functional.silu(x).float() @ weight.float().t()  # [B T, N]
    return scores.view(-1, tokens, len(weight)).transpose(1, 2)


def rms_norm(x: Tensor, norm: Norm | None) -> Tensor:
    """As transformers' LlamaRMSNorm over the last dimension: normalised in fp32, rounded, then scaled."""
    if norm is None:
        return x
    if use_triton("linear", x) and x.dtype in _HALF:
        from locret.kernels.linear_triton import rms_norm_triton

        return rms_norm_triton(x, norm)
    wide = x.float()
    return norm.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)).to(x.dtype)


def _takes(x: Tensor, weights: Sequence[Tensor]) -> bool:
    fits = x.shape[0] == 1 and x.dtype in _HALF
    return fits and all(w.dtype == x.dtype and w.stride(1) == 1 for w in weights) and use_triton("linear", x)
