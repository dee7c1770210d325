"""One new unit a row into slots that only the device knows, as a replayed decode step needs it.

    k_slab[b, h, at[b, h]] = k[b, h];  v_slab likewise;  q_stash[b, :, slot] = q[b]  if there is a stash

CUDA: one Triton launch (`switch`). Elsewhere: scatter.

Shapes: B rows, Hq/Hkv heads, S slots, R slots of the stash, D head dim.
"""

from __future__ import annotations

from torch import Tensor

from locret.kernels.switch import use_triton


def append(
    q: Tensor, k: Tensor, v: Tensor, k_slab: Tensor, v_slab: Tensor, at: Tensor, stash: Tensor | None, slot: Tensor
) -> None:
    """The definition above.

    Args:
        q, k, v: [B, H, 1, D].
        k_slab, v_slab: [B, Hkv, S, D].
        at: int64, [B, Hkv], contiguous.
        stash: [B, Hq, R, D] or None.
        slot: int64, [1].
    """
    if use_triton("append", q):
        from locret.kernels.append_triton import append_triton

        append_triton(q, k, v, k_slab, v_slab, at, stash, slot)
        return
    where = at[..., None, None].expand_as(k)
    k_slab.scatter_(2, where, k)
    v_slab.scatter_(2, where, v)
    if stash is not None:
        stash.index_copy_(2, slot, q)
