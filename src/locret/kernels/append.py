"""One new unit a row into slots that only the device knows, as a replayed decode step needs it.

    k_slab[b, h, at[b, h]] = k[b, h];  v_slab likewise
    stash[b, h's queries, slot[b, h]] = q[b, h's queries]  if there is a stash

CUDA: one Triton launch (`switch`). Elsewhere: scatter.

Shapes: B rows, Hq/Hkv heads, S slots, R slots of the stash, D head dim.
"""

from __future__ import annotations

from torch import Tensor

from locret.kernels.scattered import Scattered
from locret.kernels.switch import use_triton


def append(
    q: Tensor, k: Tensor, v: Tensor, k_slab: Tensor | Scattered, v_slab: Tensor | Scattered, at: Tensor,
    stash: Tensor | None, slot: Tensor,
) -> None:  # fmt: skip
    """The definition above.

    Args:
        q, k, v: [B, H, 1, D].
        k_slab, v_slab: [B, Hkv, S, D] of one kind.
        at: int64, [B, Hkv], contiguous.
        stash: [B, Hq, R, D] or None.
        slot: int64, [B, Hkv], contiguous.
    """
    assert isinstance(k_slab, Scattered) == isinstance(v_slab, Scattered), "K and V lie alike"
    if use_triton("append", q):
        from locret.kernels.append_triton import append_triton

        append_triton(q, k, v, k_slab, v_slab, at, stash, slot)
        return
    put(k_slab, at, k)
    put(v_slab, at, v)
    if stash is not None:
        put(stash, slot.repeat_interleave(q.shape[1] // slot.shape[1], 1), q)


def put(slab: Tensor | Scattered, at: Tensor, x: Tensor) -> None:
    """One unit of every row and head, x [B, H, 1, D], to slots at [B, H]."""
    if isinstance(slab, Scattered):
        for row, own in enumerate(slab.slabs):
            put(own, at[row : row + 1], x[row : row + 1])
        return
    slab.scatter_(2, at[..., None, None].expand_as(x), x)
