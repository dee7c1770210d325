"""New units in the places of those that go: where as many stay as there were, nothing else moves.

    fill(columns, slots, keep, dropped)    the i-th new unit that stays takes the slot of the i-th old one that goes

Units keep their order by `slots`: the t-th one lies in slot slots[t] of every column. Attention does not ask in which
order its keys lie, so a chunk's units cost their own bytes and not those of the whole cache.

Shapes: B batch, Hkv KV heads, b held units and as many that stay, C new ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from locret.kernels.compact import Column
from locret.kernels.switch import use_triton


def fill(columns: list[Column], slots: Tensor, keep: Tensor, dropped: Tensor) -> Tensor:
    """Write the new units that stay into their slots of every `out`.

    Args:
        columns: each with new units, [B, Hkv, C, ...]; what is old of it is not read.
        slots: int32, [B, Hkv, b], of the old units in their order: a permutation of 0 .. b - 1.
        keep: int64, [B, Hkv, b], ascending: units that stay, of the old ones and the new ones behind them.
        dropped: int64, [B, Hkv, C], ascending: those that go.
    Returns: int32, [B, Hkv, C]: the slot of each new unit that stays; anything for the others.
    """
    assert slots.shape == keep.shape, (slots.shape, keep.shape)
    if use_triton("compact", keep):
        from locret.kernels.fill_triton import fill_triton

        return fill_triton(columns, slots, keep, dropped)
    return reference_fill(columns, slots, keep, dropped)


def reference_fill(columns: list[Column], slots: Tensor, keep: Tensor, dropped: Tensor) -> Tensor:
    """`fill` in torch. Waits for the device: how many units are new decides shapes."""
    held = slots.shape[2]
    going, fresh = dropped < held, keep >= held  # equally many in every row
    unit = keep[fresh] - held
    row, head, _ = fresh.nonzero(as_tuple=True)
    slot = slots[row, head, dropped[going]]
    taken = torch.zeros(dropped.shape, dtype=slots.dtype, device=slots.device)
    taken[row, head, unit] = slot
    for _, new, out in columns:
        assert new is not None, "there are new units"
        out[row, head, slot.long()] = new[row, head, unit]
    return taken
