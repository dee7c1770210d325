"""RoPE of many tokens at consecutive positions, in one pass over them.

    out[b, h, t] = R(x[b, h, t]) at position first + t
    out[b, h, slots[b, h, t]] = R(x[b, h, slots[b, h, t]]) at position first + t, if tokens lie in slots (`fill`)

CUDA: Triton (`switch`). Elsewhere: torch.

Shapes: B batch, H heads, T tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from locret.kernels.decode_attention import Angles
from locret.kernels.switch import use_triton


def rotate(x: Tensor, angles: Angles, first: int, out: Tensor, slots: Tensor | None = None) -> Tensor:
    """The definition above, into `out` [B, H, T, D], any strides with numbers of a head side by side; returns it.

    x: the same shape; may be `out` itself. angles: tables that reach first + T - 1. slots: int32, [B, H, T].
    """
    if use_triton("rotate", x):
        from locret.kernels.rotate_triton import rotate_triton

        return rotate_triton(x, angles, first, out, slots)
    at = torch.arange(first, first + x.shape[2], device=x.device).expand(1, 1, -1)
    return out.copy_(angles.rotate(x, at if slots is None else by_slot(at, slots)))


def by_slot(at: Tensor, slots: Tensor) -> Tensor:
    """Positions `at` [1, 1, T] of tokens that lie in slots [B, H, T], slot by slot: int64, [B, H, T]."""
    found = torch.empty(slots.shape, dtype=torch.int64, device=slots.device)
    return found.scatter_(2, slots.long(), at.expand(slots.shape))
