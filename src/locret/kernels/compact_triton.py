"""`kept` and `compact` in Triton. Meaning and shapes: compact.py.

`_keys`, `_threshold`, `_write`: keys of all units by many programs; one a row builds the threshold, two bits at a time
from the top, each time counting the keys that reach three candidates (16 counts at most; a row of up to HELD units
stays in registers meanwhile), and counts what every part of the row has of it; many programs write.

`_move`: a program takes some channels of some rows and copies them in blocks of units. Out of place the blocks are
spread over programs; in place one program walks them from the left, with a barrier between a block's loads and its
stores: keep[j] >= j, so a later block reads nothing that an earlier one wrote. Units that stay where they are are not
touched. Every column is a few programs of the same launch.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# a kernel's parameters are pointers, numbers and compile-time constants

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from locret.kernels.compact import Candidates, Column, in_place
from locret.kernels.sizes import cdiv, next_power_of_2

PART = 1024  # units of a program that makes keys, or writes
HELD = 32_768  # keys of one row in registers, while the threshold is looked for: 64 a thread
BLOCK = 4096  # of them in one tensor: rows are seldom powers of two
SLICE_BYTES = 32  # of a unit's K or V per program in place: one sector
TILE_BYTES = 32_768  # that a program has loaded at once


@triton.jit
def _at(old, new, strides, batch, head, start, held, s, SIZE: tl.constexpr, NEW: tl.constexpr):
    """Numbers of units start, start + 1, ... of old ++ new; most blocks lie in one of the two."""
    old_b, old_h, old_t, new_b, new_h, new_t = strides
    old += batch * old_b + head * old_h
    new += batch * new_b + head * new_h
    unit = start + tl.arange(0, SIZE)
    if NEW:
        if start >= held:
            found = tl.load(new + (unit - held) * new_t, mask=unit < s, other=0)
        elif start + SIZE <= held:
            found = tl.load(old + unit * old_t)
        else:
            found = tl.load(old + unit * old_t, mask=unit < held, other=0)
            found = tl.load(new + (unit - held) * new_t, mask=(unit >= held) & (unit < s), other=found)
    else:
        found = tl.load(old + unit * old_t, mask=unit < held, other=0)
    return found


@triton.jit(do_not_specialize=["held", "s", "sinks", "newest"])  # numbers that differ from chunk to chunk
def _keys(
    olds, news, strides, work_ptr, heads, held, s, sinks, newest, padded,
    NEW: tl.constexpr, PIN: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Signed keys in the order of the scores; what is no unit gets the least key of all, below -inf's.

    olds, news: scores, pins and, if PIN, positions; strides: (b, h, t) of old and new of each.
    """
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    batch, head = row // heads, row % heads
    first = sinks  # how many units are sinks: they lie in the order of their positions
    if PIN:
        first = sinks * 0
        for start in range(0, sinks, 128):
            unit = start + tl.arange(0, 128)
            position = _at(olds[2], news[2], strides[2], batch, head, start, held, s, 128, NEW)
            first += tl.sum(((position < sinks) & (unit < sinks) & (unit < s)).to(tl.int32))
    score = _at(olds[0], news[0], strides[0], batch, head, part * PART, held, s, PART, NEW).to(tl.float32)
    pin = _at(olds[1], news[1], strides[1], batch, head, part * PART, held, s, PART, NEW) != 0
    unit = part * PART + tl.arange(0, PART)
    pin |= (unit < first) | (unit >= s - newest)
    ordered = tl.where(score == 0.0, 0.0, score)  # -0 is +0
    bits = ordered.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(score != score, 0x7FFFFFFE, key)
    key = tl.where(pin, 0x7FFFFFFF, key)
    tl.store(work_ptr + row * padded + unit, tl.where(unit < s, key, -0x7FFFFFFF))
    if NEW:
        nothing = tl.sum(tl.where(unit >= held, score * 0.0, 0.0))  # NaN for what is not finite
        at = tl.num_programs(0).to(tl.int64) * padded + (2 * row + 1) * parts + part
        tl.store(work_ptr + at, nothing.to(tl.int32, bitcast=True))


@triton.jit
def _add(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _reach(keys, first, second, third, a, b, c):
    """Counts of the keys that reach each of three thresholds, element by element."""
    a = tl.where(keys >= first, a + 1, a)
    b = tl.where(keys >= second, b + 1, b)
    c = tl.where(keys >= third, c + 1, c)
    return a, b, c


@triton.jit
def _both(keys, threshold):
    """1 for keys above, 2**16 for equal ones: one sum of two numbers."""
    return (keys > threshold).to(tl.int32) + ((keys == threshold).to(tl.int32) << 16)


@triton.jit(do_not_specialize=["budget"])
def _threshold(
    work_ptr, sound_ptr, budget, padded, parts,
    NEW: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The largest threshold that at least `budget` keys reach, and how many of each part are above and equal.

    BLOCKS: all that there are, their keys lie in registers; 0: keys are read again each time. PARTS: at least parts.
    """
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    keys_ptr = work_ptr + row * padded
    counts_ptr = work_ptr + rows * padded + 2 * row * parts
    lane = tl.arange(0, BLOCK)
    keys = (tl.load(keys_ptr + lane),)
    for i in tl.static_range(1, BLOCKS):
        keys = keys + (tl.load(keys_ptr + i * BLOCK + lane),)  # noqa: RUF005 (a tuple of Triton's)

    # two bits at a time from -2**31 up, until it is exact
    zeros = tl.zeros((BLOCK,), tl.int32)
    threshold = tl.full((), -0x80000000, tl.int32)
    bit = budget * 0 + 30
    count = bit * 0
    while (bit >= 0) & (count != budget):
        one = tl.full((), 1, tl.int32) << bit
        two = threshold + one + one
        a, b, c = zeros, zeros, zeros
        for i in tl.static_range(BLOCKS):
            a, b, c = _reach(keys[i], threshold + one, two, two + one, a, b, c)
        if BLOCKS == 0:
            for start in range(0, padded, BLOCK):
                key = tl.load(keys_ptr + start + lane)
                a, b, c = _reach(key, threshold + one, two, two + one, a, b, c)
        reach1, reach2, reach3 = tl.reduce((a, b, c), 0, _add)
        if reach2 >= budget:
            count = reach2
            threshold = two
            reach1 = reach3
        if reach1 >= budget:
            count = reach1
            threshold += one
        bit -= 2

    of_block = tl.arange(0, BLOCK // PART)
    for i in tl.static_range(BLOCKS):
        sums = tl.sum(tl.reshape(_both(keys[i], threshold), (BLOCK // PART, PART)), 1)
        tl.store(counts_ptr + i * (BLOCK // PART) + of_block, sums)
    if BLOCKS == 0:
        for start in range(0, padded, BLOCK):
            both = _both(tl.load(keys_ptr + start + lane), threshold)
            sums = tl.sum(tl.reshape(both, (BLOCK // PART, PART)), 1)
            tl.store(counts_ptr + start // PART + of_block, sums)
    tl.store(work_ptr + rows * (padded + 2 * parts) + row, threshold)
    if NEW:
        part = tl.arange(0, PARTS)
        sound = tl.load(counts_ptr + parts + part, mask=part < parts, other=0)
        tl.store(sound_ptr + row, tl.sum(sound.to(tl.float32, bitcast=True)))


@triton.jit(do_not_specialize=["s", "budget"])
def _write(
    work_ptr, keep_ptr, dropped_ptr, s, budget, padded, DROP: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr
):
    """The indices of the units that stay and, if DROP, of those that go."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    unit = part * PART + tl.arange(0, PART)
    key = tl.load(work_ptr + row * padded + unit)
    threshold = tl.load(work_ptr + rows * (padded + 2 * parts) + row)
    of_part = tl.arange(0, PARTS)
    counts = tl.load(work_ptr + rows * padded + 2 * row * parts + of_part, mask=of_part < parts, other=0)
    before = tl.where(of_part < part, counts, 0)
    above_before, ties_before = tl.sum(before & 0xFFFF), tl.sum(before >> 16)
    allowed = budget - tl.sum(counts & 0xFFFF)  # so many of the equal ones stay, the first
    sums = tl.cumsum(_both(key, threshold), 0)
    ties = ties_before + (sums >> 16)
    upto = above_before + (sums & 0xFFFF) + tl.minimum(ties, allowed)  # so many stay, up to each
    stays = (key > threshold) | ((key == threshold) & (ties <= allowed))  # what is no unit is neither
    tl.store(keep_ptr + row * budget + upto - 1, unit.to(tl.int64), mask=stays)
    if DROP:
        goes = (unit < s) & (stays == 0)
        tl.store(dropped_ptr + row * (s - budget) + unit - upto, unit.to(tl.int64), mask=goes)


def kept_triton(scores: Tensor, pinned: Tensor, budget: int, out: Tensor | None = None) -> Tensor:
    """`kept`, into `out` int64 [B, Hkv, budget] if given."""
    return _choose([scores, pinned], [], budget, 0, 0, out, None)[0]


def kept_beside_triton(
    old: Candidates, new: Candidates, budget: int, num_sinks: int, num_newest: int,
    out: Tensor | None = None, dropped: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kept_beside`, into `out` int64 [B, Hkv, budget] if given, and `dropped` int64 [B, Hkv, S - budget] if wanted."""
    olds, news = ([x.score, x.protected, x.position] for x in (old, new))
    return _choose(olds, news, budget, num_sinks, num_newest, out, dropped)


def _choose(
    olds: list[Tensor], news: list[Tensor], budget: int, num_sinks: int, num_newest: int, out: Tensor | None,
    dropped: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, held = olds[0].shape
    s = held + (news[0].shape[2] if news else 0)
    if out is None:
        out = torch.empty(batch, heads, budget, dtype=torch.int64, device=olds[0].device)
    sound = torch.empty(batch, heads, dtype=torch.float32, device=out.device)
    rows, (part, block, blocks, warps) = batch * heads, kept_blocks(s)
    padded = cdiv(s, block) * block
    parts = padded // part
    # keys; of each part how many are above and equal, and NaN if scores are; the threshold
    work = torch.empty(rows * (padded + 2 * parts + 1), dtype=torch.int32, device=out.device)
    behind = news or olds
    strides = tuple((*x.stride(), *y.stride()) for x, y in zip(olds, behind))
    _keys[(rows, parts)](
        _numbers(olds), _numbers(behind), strides, work, heads, held, s, num_sinks, num_newest, padded,
        NEW=bool(news), PIN=len(olds) == 3, PART=part, num_warps=4,
    )  # fmt: skip
    _threshold[(rows,)](
        work, sound, budget, padded, parts, NEW=bool(news), PART=part, PARTS=next_power_of_2(parts), BLOCK=block,
        BLOCKS=blocks, num_warps=warps,
    )  # fmt: skip
    _write[(rows, parts)](
        work, out, out if dropped is None else dropped, s, budget, padded, DROP=dropped is not None, PART=part,
        PARTS=next_power_of_2(parts), num_warps=4,
    )  # fmt: skip
    return out, sound


def _numbers(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Flags as bytes; nothing is copied."""
    return tuple(x.view(torch.uint8) if x.dtype == torch.bool else x for x in tensors)


def kept_blocks(s: int) -> tuple[int, int, int, int]:
    """For rows of `s` units: units of a part and of a block, how many blocks lie in registers (0: too many), and warps
    of a program that looks for a threshold."""
    block = min(max(next_power_of_2(s), 128), BLOCK, HELD)
    blocks = cdiv(s, block)
    warps = min(max(next_power_of_2(blocks * block // 1024), 4), 16)
    return min(PART, block), block, blocks if blocks * block <= HELD else 0, warps


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
        old, out = flat(column.old), flat(out)
        new = old if column.new is None else flat(column.new)
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
    return slice_, max(16, min(1024 if width > 1 else 4096, TILE_BYTES // (slice_ * element_size)))


def flat(x: Tensor) -> Tensor:
    """Three axes, or a fourth of numbers that lie together; flags as bytes. A view, if x is laid out so."""
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    if x.dim() > 4:
        x = x.flatten(3)
    return x if x.dim() == 3 or x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
