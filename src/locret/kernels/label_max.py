"""The largest logit that the rows of an answer give each prompt key: attention's matrix, reduced before it exists.

    out[b, j, t] = max over p in rows, g in group j of  scale * q[b, g, p] . k[b, j, t]

Reads q's rows once per block of keys and every key once, writes [B, Hkv, P]; nothing of size rows x keys is allocated
beyond one block. CUDA with 32- or 16-bit inputs: the Triton kernel, where blocks never leave the chip. Elsewhere: plain
matmuls over blocks of at most `block_elements` logits.

Shapes: B batch, Hq / Hkv query / KV heads, G = Hq // Hkv, A answer rows, P prompt keys, D head dim.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24  # logits alive at once outside the kernel: 64 MB in fp32


def label_max(rows: Tensor, keys: Tensor, scale: float, *, block_elements: int = BLOCK_ELEMENTS) -> Tensor:
    """The definition above. rows [B, Hq, A, D], keys [B, Hkv, P, D], any strides -> [B, Hkv, P], fp32 (fp64 for fp64).

    `scale` must be positive: it is applied after the maximum. Products are summed in fp32 at least.
    """
    assert scale > 0, scale
    assert (rows.shape[1] % keys.shape[1], rows.shape[3]) == (0, keys.shape[3]), (rows.shape, keys.shape)
    if rows.is_cuda and rows.dtype in _KERNEL_DTYPES and rows.dtype == keys.dtype and kernel_works(rows.device):
        from locret.kernels.label_max_triton import label_max_triton

        return label_max_triton(rows, keys, scale)
    return blocked_label_max(rows, keys, scale, block_elements=block_elements)


def blocked_label_max(rows: Tensor, keys: Tensor, scale: float, *, block_elements: int = BLOCK_ELEMENTS) -> Tensor:
    """`label_max` by matmuls over blocks of rows and keys, all heads together."""
    batch, num_kv, num_keys, _ = keys.shape
    dtype = torch.promote_types(rows.dtype, torch.float32)
    grouped = rows.unflatten(1, (num_kv, -1)).flatten(2, 3).to(dtype)  # [B, Hkv, G A, D]
    row_step, key_step = block_shape(grouped.shape[2], num_keys, block_elements // (batch * num_kv))
    parts = [_largest(grouped, part, row_step) for part in keys.to(dtype).split(key_step, dim=2)]
    return torch.cat(parts, dim=2) * scale


def block_shape(num_rows: int, num_keys: int, elements: int) -> tuple[int, int]:
    """Rows and keys of one block of at most `elements`: as many keys as leave room for 256 rows, then more rows."""
    num_block_keys = max(1, min(num_keys, elements // min(num_rows, 256)))
    return max(1, elements // num_block_keys), num_block_keys


def _largest(rows: Tensor, keys: Tensor, step: int) -> Tensor:
    """max over rows of rows . keys^T, a block of rows at a time: [.., R, D], [.., N, D] -> [.., N]."""
    best: Tensor | None = None
    for part in rows.split(step, dim=2):
        largest = (part @ keys.mT).amax(dim=2)
        best = largest if best is None else torch.maximum(best, largest)
    assert best is not None
    return best


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def kernel_works(device: torch.device) -> bool:
    """Whether Triton is there and can compile: some machines lack the C compiler that it needs."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from locret.kernels.label_max_triton import label_max_triton

        one = torch.ones(1, 1, 1, 16, device=device)
        with warnings.catch_warnings():  # triton's own, about its settings, are not ours to pass on
            warnings.simplefilter("ignore")
            return label_max_triton(one, one, 1.0).item() == 16
    except Exception as error:  # the compiler's, the driver's or the operating system's
        first = (str(error).strip().splitlines() or [""])[0]
        warnings.warn(
            f"Triton cannot compile the label kernel here ({type(error).__name__}: {first}); "
            "the slower torch path makes the labels",
            stacklevel=3,
        )
        return False
