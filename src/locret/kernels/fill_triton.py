"""`fill` in Triton: a program takes some of a row's new units that stay, and all columns of these."""

# mypy: disable-error-code="no-untyped-def"
# a kernel's parameters are pointers, numbers and compile-time constants

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from locret.kernels.compact import Column
from locret.kernels.compact_triton import flat
from locret.kernels.sizes import cdiv, next_power_of_2

UNITS = 32  # of a program
COUNTED = 4096  # units at once while those that go are counted


@triton.jit(do_not_specialize=["held", "count"])  # numbers that differ from chunk to chunk
def _fill(
    news, outs, strides, slots_ptr, keep_ptr, dropped_ptr, taken_ptr, heads, held, count,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, UNITS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    slots_ptr += row * held
    keep_ptr += row * held
    dropped_ptr += row * count
    fresh = count * 0  # so many new units stay as old ones go
    for start in range(0, count, COUNTED):
        at = start + tl.arange(0, COUNTED)
        fresh += tl.sum((tl.load(dropped_ptr + at, mask=at < count, other=held) < held).to(tl.int32))
    i = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    mask = i < fresh
    unit = tl.load(keep_ptr + held - fresh + i, mask=mask, other=held) - held
    gone = tl.load(dropped_ptr + i, mask=mask, other=0)
    slot = tl.load(slots_ptr + gone, mask=mask, other=0)
    tl.store(taken_ptr + row * count + unit, slot, mask=mask)
    slot = slot.to(tl.int64)
    for c in tl.static_range(len(WIDTHS)):
        new_b, new_h, new_t, out_b, out_h, out_t = strides[c]
        channel = tl.arange(0, BLOCKS[c])
        inside = mask[:, None] & (channel < WIDTHS[c])[None, :]
        new = news[c] + batch * new_b + head * new_h
        out = outs[c] + batch * out_b + head * out_h
        x = tl.load(new + unit[:, None] * new_t + channel[None, :], mask=inside, other=0)
        tl.store(out + slot[:, None] * out_t + channel[None, :], x, mask=inside)


def fill_triton(columns: list[Column], slots: Tensor, keep: Tensor, dropped: Tensor) -> Tensor:
    """`fill` in one launch."""
    batch, heads, held = keep.shape
    count = dropped.shape[2]
    taken = torch.empty(batch, heads, count, dtype=slots.dtype, device=slots.device)
    news, outs, strides, widths = [], [], [], []
    for column in columns:
        assert column.new is not None, "there are new units"
        new, out = flat(column.new), flat(column.out)
        assert out.data_ptr() == column.out.data_ptr(), "a unit's numbers lie together in the slab"
        news.append(new)
        outs.append(out)
        strides.append((*new.stride()[:3], *out.stride()[:3]))
        widths.append(out.shape[3] if out.dim() == 4 else 1)
    _fill[(batch * heads, cdiv(count, UNITS))](
        tuple(news), tuple(outs), tuple(strides), slots.contiguous(), keep.contiguous(), dropped.contiguous(), taken,
        heads, held, count, WIDTHS=tuple(widths), BLOCKS=tuple(next_power_of_2(width) for width in widths),
        UNITS=UNITS, COUNTED=min(COUNTED, next_power_of_2(count)), num_warps=4,
    )  # fmt: skip
    return taken
