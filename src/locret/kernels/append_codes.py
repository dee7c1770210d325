"""`append` where slabs hold codes: a new unit a row is quantised on the device and written as `storage.Affine` has it.

    k_slab[b, h, at[b, h]] = encode(k[b, h]): codes, scale, zero;  v_slab likewise
    stash[b, h's heads, slot[b, h]] = q, k and v as they are  if there is a stash

Scores are made from exact keys and values, which codes do not give back: hence K and V in the stash.

CUDA: one Triton launch (`switch`), the same bytes. Elsewhere: encode, scatter.

Shapes: B rows, Hq/Hkv heads, S slots, R slots of the stash, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from locret.kernels.append import put
from locret.kernels.decode_attention import Codes
from locret.kernels.switch import use_triton

Encode = Callable[[Tensor], Codes]


def append_codes(
    q: Tensor, k: Tensor, v: Tensor, k_slab: Codes, v_slab: Codes, at: Tensor,
    stash: Sequence[Tensor] | None, slot: Tensor, encode: Encode,
) -> None:  # fmt: skip
    """The definition above.

    Args:
        q, k, v: [B, H, 1, D].
        k_slab, v_slab: [B, Hkv, S, D] in codes of the same bits and groups; scale and zero in k's dtype.
        at: int64, [B, Hkv], contiguous.
        stash: [B, Hq, R, D] and twice [B, Hkv, R, D], or None.
        slot: int64, [B, Hkv], contiguous.
        encode: what a unit's codes are (`storage.Affine`, fit "minmax"); the kernel gives the same.
    """
    if k.dtype != torch.float64 and use_triton("append", q):
        from locret.kernels.append_codes_triton import append_codes_triton

        append_codes_triton(q, k, v, k_slab, v_slab, at, stash, slot)
        return
    for slab, x in ((k_slab, k), (v_slab, v)):
        new = encode(x)
        for mine, theirs in ((slab.codes, new.codes), (slab.scale, new.scale), (slab.zero, new.zero)):
            put(mine, at, theirs)
    for place, x in zip(stash or (), (q, k, v), strict=False):
        put(place, slot.repeat_interleave(x.shape[1] // slot.shape[1], 1), x)
