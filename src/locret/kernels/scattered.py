"""K or V of rows whose slabs lie apart: where each row's heads begin is a table on the device.

A captured kernel has its arguments fixed; what it finds at their addresses may change. So with a table between, rows
come and go, and no new capture is needed.

Shapes: B rows, Hkv KV heads, S_i slots of row i, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes that the kernels load at once


STRETCH = 512  # slots, where it must not depend on how long other rows are where a row is cut


@dataclass(frozen=True)
class Scattered:
    """Stands for a slab [B, Hkv, S, D]. A unit's numbers lie together, and so do a head's units."""

    slabs: Sequence[Tensor]  # of every row, [1, Hkv, S_i, D]: what torch paths read
    table: Tensor  # address of every row's and head's first unit, int64, [B, Hkv], contiguous: what kernels read
    slots: int  # at least the longest row's: decides the launches
    stretch: int | None = STRETCH  # slots that one program reads; None: whatever is fastest for so many slots

    @property
    def heads(self) -> int:
        return self.table.shape[1]

    @property
    def head_dim(self) -> int:
        return self.slabs[0].shape[3]

    @property
    def aligned(self) -> bool:
        """Whether every unit begins at a multiple of `ALIGNMENT` bytes; `addresses` sees to the first ones."""
        return self.head_dim * self.slabs[0].element_size() % ALIGNMENT == 0


def addresses(slabs: Sequence[Tensor]) -> Tensor:
    """Rows for tables, int64 on the host, [len(slabs) B, Hkv]. slabs: [B, Hkv, S, ...] each."""
    rows, heads = slabs[0].shape[:2]
    for slab in slabs:
        assert slab.stride()[2:] == (slab.shape[3], 1), "a head's units lie together"
        whole = slab.shape[3] * slab.element_size() % ALIGNMENT == 0
        assert not whole or slab.data_ptr() % ALIGNMENT == 0, "allocators align more than that"
    found = [(x.data_ptr(), *(step * x.element_size() for step in x.stride()[:2])) for x in slabs]
    first, row, head = torch.tensor(found).T
    return (first[:, None, None] + row[:, None, None] * torch.arange(rows)[:, None]
            + head[:, None, None] * torch.arange(heads)).flatten(0, 1)  # fmt: skip
