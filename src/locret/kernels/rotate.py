"""RoPE of many tokens at consecutive positions, in one pass over them.

    out[b, h, t] = R(x[b, h, t]) at position first + t

CUDA: Triton (`switch`). Elsewhere: torch.

Shapes: B batch, H heads, T tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from locret.kernels.decode_attention import Angles
from locret.kernels.switch import use_triton


def rotate(x: Tensor, angles: Angles, first: int, out: Tensor) -> Tensor:
    """The definition above, into `out` [B, H, T, D], any strides with numbers of a head side by side; returns it.

    x: the same shape; may be `out` itself. angles: tables that reach first + T - 1.
    """
    if use_triton("rotate", x):
        from locret.kernels.rotate_triton import rotate_triton

        return rotate_triton(x, angles, first, out)
    at = torch.arange(first, first + x.shape[2], device=x.device)
    return out.copy_(angles.rotate(x, at.expand(1, 1, -1)))
