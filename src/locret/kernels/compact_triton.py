"""`kept` and `compact` in Triton. Meaning and shapes: compact.py.

`_kept`: one program a row [S], which may lie in two pieces. The threshold is built bit by bit from the top, each time
counting the keys that reach it (32 counts at most; a row of up to HELD units stays in registers meanwhile), then one
walk with a prefix sum writes.

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

from locret.kernels.compact import Candidates, Column, in_place
from locret.kernels.sizes import cdiv, next_power_of_2

HELD = 32_768  # keys of one row in registers: 32 a thread
WALK = 8192  # keys at once while kept units are written
SLICE_BYTES = 32  # of a unit's K or V per program in place: one sector
TILE_BYTES = 32_768  # that a program has loaded at once


@triton.jit
def _at(old, new, strides, batch, head, unit, held, s, NEW: tl.constexpr):
    """Numbers of units of old ++ new."""
    old_b, old_h, old_t, new_b, new_h, new_t = strides
    found = tl.load(old + batch * old_b + head * old_h + unit * old_t, mask=unit < held, other=0)
    if NEW:
        at = new + batch * new_b + head * new_h + (unit - held) * new_t
        found = tl.load(at, mask=(unit >= held) & (unit < s), other=found)  # into the same registers
    return found


@triton.jit
def _keys(olds, news, strides, batch, head, unit, held, s, first, newest, NEW: tl.constexpr):
    """Signed keys in the order of the scores, and scores; what is no unit gets the least key of all, below -inf's."""
    score = _at(olds[0], news[0], strides[0], batch, head, unit, held, s, NEW).to(tl.float32)
    pin = _at(olds[1], news[1], strides[1], batch, head, unit, held, s, NEW) != 0
    pin |= (unit < first) | (unit >= s - newest)
    ordered = tl.where(score == 0.0, 0.0, score)  # -0 is +0
    bits = ordered.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(score != score, 0x7FFFFFFE, key)
    key = tl.where(pin, 0x7FFFFFFF, key)
    return tl.where(unit < s, key, -0x7FFFFFFF), score


@triton.jit(do_not_specialize=["budget", "sinks", "newest"])  # numbers that differ from chunk to chunk
def _kept(
    olds, news, strides, out_ptr, sound_ptr, heads, held, s, budget, sinks, newest,
    NEW: tl.constexpr, PIN: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """olds, news: scores, pins and, if PIN, positions; strides: (b, h, t) of old and new of each."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    out_ptr += row * budget
    lane = tl.arange(0, BLOCK)
    first = sinks  # how many units are sinks: they lie in the order of their positions
    if PIN:
        first = sinks * 0
        for start in range(0, sinks, 128):
            unit = start + tl.arange(0, 128)
            position = _at(olds[2], news[2], strides[2], batch, head, unit, held, s, NEW)
            first += tl.sum(((position < sinks) & (unit < sinks) & (unit < s)).to(tl.int32))
    keys, _ = _keys(olds, news, strides, batch, head, lane, held, s, first, newest, NEW)  # all there is, if ONE

    # the largest threshold that at least `budget` keys reach: -2**31 with bits flipped from the top, until it is exact
    threshold = tl.full((), -0x80000000, tl.int32)
    bit = budget * 0
    count = bit
    while (bit < 32) & (count != budget):
        flipped = tl.full((), 1, tl.int32) << (31 - bit)  # the first is the sign
        candidate = threshold ^ flipped
        if ONE:
            reach = tl.sum((keys >= candidate).to(tl.int32))
        else:
            counts = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, s, BLOCK):
                key, _ = _keys(olds, news, strides, batch, head, start + lane, held, s, first, newest, NEW)
                counts += (key >= candidate).to(tl.int32)
            reach = tl.sum(counts)
        if reach >= budget:
            threshold = candidate
            count = reach
        bit += 1

    if ONE:
        above = tl.sum((keys > threshold).to(tl.int32))
    else:
        counts = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, s, BLOCK):
            key, _ = _keys(olds, news, strides, batch, head, start + lane, held, s, first, newest, NEW)
            counts += (key > threshold).to(tl.int32)
        above = tl.sum(counts)

    # the keys again, from the cache, in shorter blocks: the sums need registers as well. One sum of two numbers: units
    # above in the lower 16 bits, ties in the upper ones
    allowed = budget - above
    above_before = above * 0
    ties_before = above * 0
    nothing = tl.zeros((WALK,), tl.float32)
    for start in range(0, s, WALK):
        unit = start + tl.arange(0, WALK)
        key, score = _keys(olds, news, strides, batch, head, unit, held, s, first, newest, NEW)
        nothing += tl.where(unit >= held, score * 0.0, 0.0)  # NaN for what is not finite
        is_above = key > threshold
        is_tie = (key == threshold) & (unit < s)
        both = is_above.to(tl.int32) + (is_tie.to(tl.int32) << 16)
        sums = tl.cumsum(both, 0)
        ties = ties_before + (sums >> 16)
        slot = above_before + (sums & 0xFFFF) + tl.minimum(ties, allowed) - 1
        tl.store(out_ptr + slot, unit.to(tl.int64), mask=is_above | (is_tie & (ties <= allowed)))
        all_ = tl.sum(both)
        above_before += all_ & 0xFFFF
        ties_before += all_ >> 16
    if NEW:
        tl.store(sound_ptr + row, tl.sum(nothing))


def kept_triton(scores: Tensor, pinned: Tensor, budget: int, out: Tensor | None = None) -> Tensor:
    """`kept`, into `out` int64 [B, Hkv, budget] if given."""
    return _choose([scores, pinned], [], budget, 0, 0, out)[0]


def kept_beside_triton(
    old: Candidates, new: Candidates, budget: int, num_sinks: int, num_newest: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`kept_beside`, into `out` int64 [B, Hkv, budget] if given."""
    olds, news = ([x.score, x.protected, x.position] for x in (old, new))
    return _choose(olds, news, budget, num_sinks, num_newest, out)


def _choose(
    olds: list[Tensor], news: list[Tensor], budget: int, num_sinks: int, num_newest: int, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, heads, held = olds[0].shape
    s = held + (news[0].shape[2] if news else 0)
    if out is None:
        out = torch.empty(batch, heads, budget, dtype=torch.int64, device=olds[0].device)
    sound = torch.empty(batch, heads, dtype=torch.float32, device=out.device)
    block, warps = kept_blocks(s)
    behind = news or olds
    _kept[(batch * heads,)](
        _numbers(olds), _numbers(behind), tuple((*x.stride(), *y.stride()) for x, y in zip(olds, behind)),
        out, sound, heads, held, s, budget, num_sinks, num_newest,
        NEW=bool(news), PIN=len(olds) == 3, BLOCK=block, ONE=s <= block, WALK=min(block, WALK), num_warps=warps,
    )  # fmt: skip
    return out, sound


def _numbers(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Flags as bytes; nothing is copied."""
    return tuple(x.view(torch.uint8) if x.dtype == torch.bool else x for x in tensors)


def kept_blocks(s: int) -> tuple[int, int]:
    """Units of a block and warps of a program for rows of `s` units."""
    block = min(max(next_power_of_2(s), 128), HELD)
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
    keep = keep.contiguous()
    rows, heads, b = keep.shape[0] * keep.shape[1], keep.shape[1], keep.shape[2]
    held = columns[0].old.shape[2]
    olds, news, outs, strides, widths, slices, blocks, first = [], [], [], [], [], [], [], [0]
    places, fresh = set(), set()
    for column in columns:
        out = column.out
        if not out.numel():
            continue
        places.add(in_place(column))
        fresh.add(column.new is not None)
        old, out = _flat(column.old), _flat(out)
        new = old if column.new is None else _flat(column.new)
        assert out.data_ptr() == column.out.data_ptr(), "a unit's numbers lie together in the slab"
        width = out.shape[3] if out.dim() == 4 else 1
        slice_, block = move_tile(width, out.element_size(), place=True in places)
        olds.append(old)
        news.append(new)
        outs.append(out)
        strides.append((*old.stride()[:3], *new.stride()[:3], *out.stride()[:3]))
        widths.append(width)
        slices.append(slice_)
        blocks.append(block)
        first.append(first[-1] + cdiv(width, slice_))
    assert len(places) == len(fresh) == 1, "columns of one table"
    _move[(rows, first[-1], 1 if True in places else cdiv(b, min(blocks)))](
        tuple(olds), tuple(news), tuple(outs), tuple(strides), keep, heads, b, held,
        WIDTHS=tuple(widths), SLICES=tuple(slices), BLOCKS=tuple(blocks), FIRST=tuple(first),
        IN_PLACE=True in places, NEW=True in fresh,
        num_warps=8, num_stages=1,  # one stage: no load of the next block may pass this block's barrier
    )  # fmt: skip


def move_tile(width: int, element_size: int, *, place: bool) -> tuple[int, int]:
    """Channels and units of a block: in place thin slices of many units, as only one program may walk them."""
    most = max(1, (SLICE_BYTES if place else 256) // element_size)
    slice_ = min(next_power_of_2(width), most)
    return slice_, max(16, min(1024, TILE_BYTES // (slice_ * element_size)))


def _flat(x: Tensor) -> Tensor:
    """Three axes, or a fourth of numbers that lie together; flags as bytes. A view, if x is laid out so."""
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    if x.dim() > 4:
        x = x.flatten(3)
    return x if x.dim() == 3 or x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
