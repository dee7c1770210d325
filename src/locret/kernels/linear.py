"""A few rows times large matrices, as decoding needs it, with what stands around the product in the same pass.

    project:  out = x' W^T (+ bias) (+ residual)          for one or several W with the same input, side by side
    gated:    out = silu(x' G^T) * (x' U^T)
    x' = x, or RMSNorm(x) = weight * x / sqrt(mean(x^2) + eps)

With so few rows a product costs what its matrix weighs: each weight is read once, and nothing else is worth a launch of
its own. The torch paths round where a transformers module would; the kernel keeps fp32 to the end.

CUDA: Triton, up to `MOST_ROWS` rows (`switch`). Elsewhere, and for more rows: torch.

Shapes: M rows, E inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from locret.kernels.switch import use_triton

MOST_ROWS = 16


class Norm(NamedTuple):
    """RMSNorm of the input."""

    weight: Tensor  # [E]
    eps: float


def project(
    x: Tensor, weights: Sequence[Tensor], *, biases: Sequence[Tensor | None] | None = None, norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The definition above.

    Args:
        x: [M, E].
        weights: up to three, each [N_i, E], rows contiguous.
        biases: one a weight, [N_i] or None.
        residual: [M, N], added at the end.
    Returns: [M, N] in x's dtype; N is the sum of the N_i.
    """
    if _takes(x, weights):
        from locret.kernels.linear_triton import project_triton

        return project_triton(x, weights, biases, norm, residual)
    return torch_project(x, weights, biases=biases, norm=norm, residual=residual)


def gated(x: Tensor, gate: Tensor, up: Tensor, *, norm: Norm | None = None) -> Tensor:
    """The definition above. x: [M, E]; gate, up: [N, E]; returns [M, N]."""
    if _takes(x, (gate, up)):
        from locret.kernels.linear_triton import gated_triton

        return gated_triton(x, gate, up, norm)
    return torch_gated(x, gate, up, norm=norm)


def torch_project(
    x: Tensor, weights: Sequence[Tensor], *, biases: Sequence[Tensor | None] | None = None, norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`project` in torch."""
    x = rms_norm(x, norm)
    parts = [functional.linear(x, w, b) for w, b in zip(weights, biases or [None] * len(weights), strict=True)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return out if residual is None else residual + out


def torch_gated(x: Tensor, gate: Tensor, up: Tensor, *, norm: Norm | None = None) -> Tensor:
    """`gated` in torch."""
    x = rms_norm(x, norm)
    return functional.silu(functional.linear(x, gate)) * functional.linear(x, up)


def rms_norm(x: Tensor, norm: Norm | None) -> Tensor:
    """As transformers' LlamaRMSNorm: normalised in fp32, rounded, then scaled."""
    if norm is None:
        return x
    wide = x.float()
    return norm.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)).to(x.dtype)


def _takes(x: Tensor, weights: Sequence[Tensor]) -> bool:
    fits = x.shape[0] <= MOST_ROWS and x.dtype in (torch.bfloat16, torch.float16)
    return fits and all(w.dtype == x.dtype and w.stride(1) == 1 for w in weights) and use_triton("linear", x)
