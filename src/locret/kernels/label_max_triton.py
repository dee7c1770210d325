"""`label_max` in Triton: one program holds a block of keys on the chip and walks over all answer rows of its KV head.

Shapes as in label_max.py. Grid: (blocks of keys, B Hkv). No two programs write the same place.
"""

# mypy: disable-error-code="no-untyped-def"
# a kernel's parameters are pointers, numbers and compile-time constants

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from locret.kernels.sizes import cdiv, next_power_of_2

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # its dot multiplies the bits of bf16 as if they were numbers


@triton.jit
def _label_max(
    q_ptr, k_ptr, out_ptr, num_rows, num_keys, num_kv, scale,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // num_kv, pair % num_kv
    key = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    dim = tl.arange(0, BLOCK_D)
    k_at = k_ptr + b * k_b + h * k_h + key[None, :] * k_t + dim[:, None] * k_d
    keys = tl.load(k_at, mask=(dim[:, None] < DIM) & (key[None, :] < num_keys), other=0.0)  # [BLOCK_D, BLOCK_K]
    keys = keys.to(tl.float32) if UPCAST else keys
    best = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    for g in range(GROUP):
        base = q_ptr + b * q_b + (h * GROUP + g) * q_h
        for start in range(0, num_rows, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R).to(tl.int64)
            q_at = base + row[:, None] * q_t + dim[None, :] * q_d
            rows = tl.load(q_at, mask=(row[:, None] < num_rows) & (dim[None, :] < DIM), other=0.0)
            rows = rows.to(tl.float32) if UPCAST else rows
            logits = tl.dot(rows, keys, input_precision=PRECISION)  # [BLOCK_R, BLOCK_K], fp32
            logits = tl.where(row[:, None] < num_rows, logits, float("-inf"))
            best = tl.maximum(best, tl.max(logits, axis=0))
    tl.store(out_ptr + pair * num_keys + key, best * scale, mask=key < num_keys)


def label_max_triton(rows: Tensor, keys: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """rows [B, Hq, A, D], keys [B, Hkv, P, D] of one dtype, any strides -> fp32 [B, Hkv, P], in `out` if given."""
    batch, num_q, num_rows, dim = rows.shape
    num_kv, num_keys = keys.shape[1:3]
    if out is None:
        out = torch.empty(batch, num_kv, num_keys, dtype=torch.float32, device=rows.device)
    block_d, block_k, block_r = block_sizes(dim, rows.element_size())
    grid = (cdiv(num_keys, block_k), batch * num_kv)
    _label_max[grid](
        rows, keys, out, num_rows, num_keys, num_kv, scale, *rows.stride(), *keys.stride(),
        GROUP=num_q // num_kv, DIM=dim, BLOCK_D=block_d, BLOCK_K=block_k, BLOCK_R=block_r,
        PRECISION="ieee", UPCAST=INTERPRETED and rows.dtype == torch.bfloat16, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def block_sizes(dim: int, element_size: int) -> tuple[int, int, int]:
    """Head dim padded, keys and rows of a block: at most 32 KB of keys on the chip."""
    block_d = max(16, next_power_of_2(dim))
    row_bytes = block_d * element_size
    block_k = 128 if row_bytes <= 256 else 64 if row_bytes <= 512 else 32
    return block_d, block_k, 64 if row_bytes <= 256 else 32
