"""`kept` and `compact` in Triton. Meaning and shapes: compact.py.

`_kept`: one program a row [S]. The threshold is built bit by bit from the top, each time counting the keys that reach
it (32 counts; a row of up to HELD units stays in registers meanwhile), then one walk with two prefix sums writes.

`_move`: a program takes some channels of some rows and copies them in blocks of units. Out of place the blocks are
spread over programs; in place one program walks them from the left, with a barrier between a block's loads and its
stores: keep[j] >= j, so a later block reads nothing that an earlier one wrote. Units that stay where they are are not
touched. Every column is a few programs of the same launch.
"""

# mypy: disable-error-code="no-untyped-def"
# a kernel's parameters are pointers, numbers and compile-time constants

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from locret.kernels.compact import Column, in_place

HELD = 32_768  # keys of one row in registers: 32 a thread
WALK = 8192  # keys at once while kept units are written
SLICE_BYTES = 32  # of a unit's K or V per program in place: one sector
TILE_BYTES = 32_768  # that a program has loaded at once


@triton.jit
def _keys(scores_ptr, pinned_ptr, unit, s):
    """Signed keys in the order of the scores; what is no unit gets the least key of all, below that of -inf."""
    score = tl.load(scores_ptr + unit, mask=unit < s, other=0.0).to(tl.float32)
    pin = tl.load(pinned_ptr + unit, mask=unit < s, other=0)
    score = tl.where(score == 0.0, 0.0, score)  # -0 is +0
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(score != score, 0x7FFFFFFE, key)
    key = tl.where(pin != 0, 0x7FFFFFFF, key)
    return tl.where(unit < s, key, -0x7FFFFFFF)


@triton.jit
def _kept(
    scores_ptr, pinned_ptr, out_ptr, s, budget,
    BLOCK: tl.constexpr, ONE: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * s
    pinned_ptr += row * s
    out_ptr += row * budget
    lane = tl.arange(0, BLOCK)
    held = _keys(scores_ptr, pinned_ptr, lane, s)  # all there is, if ONE

    # the largest threshold that at least `budget` keys reach: -2**31 with bits flipped from the top
    threshold = tl.full((), -0x80000000, tl.int32)
    for i in range(32):
        candidate = threshold ^ (tl.full((), -0x80000000, tl.int32) if i == 0 else tl.full((), 1, tl.int32) << (31 - i))
        if ONE:
            count = tl.sum((held >= candidate).to(tl.int32))
        else:
            counts = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, s, BLOCK):
                counts += (_keys(scores_ptr, pinned_ptr, start + lane, s) >= candidate).to(tl.int32)
            count = tl.sum(counts)
        threshold = tl.where(count >= budget, candidate, threshold)

    if ONE:
        above = tl.sum((held > threshold).to(tl.int32))
    else:
        counts = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, s, BLOCK):
            counts += (_keys(scores_ptr, pinned_ptr, start + lane, s) > threshold).to(tl.int32)
        above = tl.sum(counts)

    # the keys again, from the cache, in shorter blocks: the two sums need registers as well
    ties_before = above * 0
    kept_before = above * 0
    for start in range(0, s, WALK):
        unit = start + tl.arange(0, WALK)
        key = _keys(scores_ptr, pinned_ptr, unit, s)
        tie = ((key == threshold) & (unit < s)).to(tl.int32)
        oldest = ties_before + tl.cumsum(tie, 0) <= budget - above
        stays = ((key > threshold) | ((tie != 0) & oldest)).to(tl.int32)
        slot = kept_before + tl.cumsum(stays, 0) - 1
        tl.store(out_ptr + slot, unit.to(tl.int64), mask=(stays != 0) & (slot < budget))
        ties_before += tl.sum(tie)
        kept_before += tl.sum(stays)


def kept_triton(scores: Tensor, pinned: Tensor, budget: int, out: Tensor | None = None) -> Tensor:
    """`kept`, into `out` int64 [B, Hkv, budget] if given. Rows are read contiguous."""
    scores, pinned = scores.contiguous(), pinned.contiguous().view(torch.uint8)
    s = scores.shape[-1]
    if out is None:
        out = torch.empty(*scores.shape[:-1], budget, dtype=torch.int64, device=scores.device)
    block, warps = kept_blocks(s)
    _kept[(scores.numel() // s,)](
        scores, pinned, out, s, budget, BLOCK=block, ONE=s <= block, WALK=min(block, WALK), num_warps=warps
    )
    return out


def kept_blocks(s: int) -> tuple[int, int]:
    """Units of a block and warps of a program for rows of `s` units."""
    block = min(max(triton.next_power_of_2(s), 128), HELD)
    return block, min(max(block // 1024, 4), 32)


@triton.jit
def _move(
    olds, news, outs, strides, keep_ptr, heads, b, held,
    WIDTHS: tl.constexpr, SLICES: tl.constexpr, BLOCKS: tl.constexpr, FIRST: tl.constexpr,
    IN_PLACE: tl.constexpr, NEW: tl.constexpr,
):  # fmt: skip
    """Column i is program_id(1) FIRST[i] ... FIRST[i + 1] - 1, each SLICES[i] channels of WIDTHS[i]."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    part = tl.program_id(1)
    for i in tl.static_range(len(WIDTHS)):
        if part >= FIRST[i] and part < FIRST[i + 1]:
            slice_: tl.constexpr = SLICES[i]
            block: tl.constexpr = BLOCKS[i]
            old_b, old_h, old_t, new_b, new_h, new_t, out_b, out_h, out_t = strides[i]
            old = olds[i] + batch * old_b + head * old_h
            new = news[i] + batch * new_b + head * new_h
            out = outs[i] + batch * out_b + head * out_h
            channel = (part - FIRST[i]) * slice_ + tl.arange(0, slice_)
            inside = channel[None, :] < WIDTHS[i]
            for start in range(tl.program_id(2) * block, b, tl.num_programs(2) * block):
                slot = start + tl.arange(0, block).to(tl.int64)
                source = tl.load(keep_ptr + row * b + slot, mask=slot < b, other=0)
                is_old = source < held
                moves = slot < b
                if IN_PLACE:
                    moves &= (source != slot) | (source >= held)  # a new unit is not there yet, wherever it goes
                at = old + source[:, None] * old_t + channel[None, :]
                units = tl.load(at, mask=(moves & is_old)[:, None] & inside, other=0)
                if NEW:
                    at = new + (source - held)[:, None] * new_t + channel[None, :]
                    fresh = tl.load(at, mask=(moves & (source >= held))[:, None] & inside, other=0)
                    units = tl.where(is_old[:, None], units, fresh)
                if IN_PLACE:
                    tl.debug_barrier()  # every thread has read its units before any is overwritten
                tl.store(out + slot[:, None] * out_t + channel[None, :], units, mask=moves[:, None] & inside)


def compact_triton(columns: list[Column], keep: Tensor) -> None:
    """`compact` in one launch. All columns are in place or none is; all have new units or none has."""
    moved = [_flat(column) for column in columns if column.out.numel()]
    same = {in_place(column) for column in moved}
    fresh = {column.new is not None for column in moved}
    assert len(same) == len(fresh) == 1, "columns of one table"
    keep = keep.contiguous()
    rows, heads, b = keep.shape[0] * keep.shape[1], keep.shape[1], keep.shape[2]
    news = [column.old if column.new is None else column.new for column in moved]
    tiles = [move_tile(column.out.shape[3], column.out.element_size(), place=True in same) for column in moved]
    first = [0]
    for column, (slice_, _) in zip(moved, tiles):
        first.append(first[-1] + triton.cdiv(column.out.shape[3], slice_))
    blocks = 1 if True in same else triton.cdiv(b, min(block for _, block in tiles))
    _move[(rows, first[-1], blocks)](
        tuple(column.old for column in moved), tuple(news), tuple(column.out for column in moved),
        tuple((*column.old.stride()[:3], *new.stride()[:3], *column.out.stride()[:3])
              for column, new in zip(moved, news)),
        keep, heads, b, moved[0].old.shape[2],
        WIDTHS=tuple(column.out.shape[3] for column in moved), SLICES=tuple(slice_ for slice_, _ in tiles),
        BLOCKS=tuple(block for _, block in tiles), FIRST=tuple(first), IN_PLACE=True in same, NEW=True in fresh,
        num_warps=8, num_stages=1,  # one stage: no load of the next block may pass this block's barrier
    )  # fmt: skip


def move_tile(width: int, element_size: int, *, place: bool) -> tuple[int, int]:
    """Channels and units of a block: in place thin slices of many units, as only one program may walk them."""
    most = max(1, (SLICE_BYTES if place else 256) // element_size)
    slice_ = min(triton.next_power_of_2(width), most)
    return slice_, max(16, min(1024, TILE_BYTES // (slice_ * element_size)))


def _flat(column: Column) -> Column:
    """Three leading axes and one of numbers; flags as bytes. Views only: `out` is written."""

    def view(x: Tensor) -> Tensor:
        x = x.view(torch.uint8) if x.dtype == torch.bool else x
        x = x[..., None] if x.dim() == 3 else x.flatten(3)
        return x if x.shape[3] == 1 or x.stride(3) == 1 else x.contiguous()

    old, new, out = column
    flat = view(out)
    assert flat.data_ptr() == out.data_ptr(), "a unit's numbers lie together in the slab"
    return Column(view(old), None if new is None else view(new), flat)
