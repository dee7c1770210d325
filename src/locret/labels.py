"""Training targets of the retaining heads, from queries and keys, without an attention matrix.

Shapes: B batch, T tokens, Hq / Hkv query / KV heads, G = Hq // Hkv, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from locret.errors import DataError

BLOCK_ELEMENTS = 1 << 24  # logits alive at once: 64 MB in fp32


def importance_labels(
    q: Tensor,
    k: Tensor,
    prompt_len: int,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> Tensor:
    """Causal importance labels: the largest logit any answer query gives each prompt key.

    Locret (arXiv:2410.01805), CIS label: S[k]_j = max over answer p of (Q_j K_j^T)[p, k], also over the G query heads
    sharing KV head j. The paper's formula has no scale; the released code scales by D**-0.5, and so do we (`scale`).
    A softcap is monotone, so it is applied once, after the maximum.

    The logits are made in blocks of at most `block_elements` (answer rows x prompt keys, all heads together) and
    reduced at once: memory does not grow with answer x prompt. Products are summed in fp32 (fp64 for fp64 inputs).

    Args:    q: post-RoPE, [B, Hq, T, D];  k: post-RoPE, [B, Hkv, T, D];  prompt_len: in 1..T-1;
             scale: None is D**-0.5. The answer is q[:, :, prompt_len:].
    Returns: fp32 pre-softmax logits, [B, Hkv, prompt_len].
    Raises:  DataError: no prompt or no answer tokens, so no label exists.
    """
    batch, num_q, length, dim = q.shape
    num_kv = k.shape[1]
    assert (num_q % num_kv, *k.shape[2:]) == (0, length, dim), (q.shape, k.shape)
    if not 0 < prompt_len < length:
        raise DataError(
            f"prompt_len is {prompt_len} of {length} tokens; labels need 1 to {length - 1}: "
            "at least one prompt token, and one answer token that looks back at it"
        )
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = dim**-0.5 if scale is None else scale
    rows = q[:, :, prompt_len:].unflatten(1, (num_kv, -1)).flatten(2, 3).to(dtype)  # [B, Hkv, G A, D]
    keys = k[:, :, :prompt_len].to(dtype)  # [B, Hkv, P, D]
    row_step, key_step = _block(rows.shape[2], prompt_len, block_elements // (batch * num_kv))
    parts = [_largest(rows, part, row_step) for part in keys.split(key_step, dim=2)]
    labels = torch.cat(parts, dim=2) * scale  # [B, Hkv, P]; the maximum of scaled logits, as scale > 0
    if softcap is not None:
        labels = softcap * torch.tanh(labels / softcap)
    return labels.float()


def _block(num_rows: int, num_keys: int, elements: int) -> tuple[int, int]:
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
