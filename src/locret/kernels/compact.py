"""Order-preserving top-k compaction: which units stay, and the move of their rows, without a sort.

    kept(scores, pinned, b)   the b units that stay, ascending: pinned ones first, then the highest scores; of equal
                              scores the older unit (the smaller index) stays
    kept_beside(old, new, b)  the same of old ++ new, and what is pinned found on the way
    others(keep, S)           those that go
    compact(columns, keep)    out[j] = (old ++ new)[keep[j]] for every column of the units, in place if out is old

`kept` finds the b-th largest key, then counts: a unit stays if its key is larger, or equal and among the oldest that
still fit; where it goes is the number of kept units before it. +0 and -0 are equal. A score of +inf ranks below a pin,
NaN between the two, so that a broken method moves rows of its own units only (`Reader` raises afterwards).

`compact` may work in place because keep is ascending without repeats, so keep[j] >= j: whoever walks from the left
never overwrites what is still to be read.

Shapes: B batch, Hkv KV heads, S = P + C units, P held, C new, b units that stay.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from locret.kernels.switch import use_triton


class Column(NamedTuple):
    """One property of the units: K, V, a score ... New units lie behind the old ones, in memory of their own."""

    old: Tensor  # [B, Hkv, P, ...]
    new: Tensor | None  # [B, Hkv, C, ...]; None: there are only old ones
    out: Tensor  # [B, Hkv, >= b, ...]; the same memory as `old`, from the same unit on, or disjoint from it


class Candidates(NamedTuple):
    """What decides whether units stay, [B, Hkv, n] each, any strides."""

    score: Tensor  # compared in fp32
    position: Tensor  # original position, int32
    protected: Tensor  # bool


class Choice(NamedTuple):
    """Which of S units stay. All ascending."""

    keep: Tensor  # int64, [B, Hkv, b]
    dropped: Tensor | None  # those that go, int64, [B, Hkv, S - b]; None: nobody asked


def pin(protected: Tensor, *, num_sinks: int, num_newest: int, positions: Tensor) -> Tensor:
    """Mask of units that must stay: the first ones of the text, the newest ones, and those the caller protected.

    Args:
        protected: bool, [B, Hkv, S].
        num_sinks: units whose original position is below this are sinks.
        num_newest: the last units of the S.
        positions: original positions, [B, Hkv, S].
    Returns: bool, [B, Hkv, S].
    """
    pinned = protected | (positions < num_sinks)
    if num_newest:
        pinned[..., -num_newest:] = True
    return pinned


def kept_beside(
    old: Candidates, new: Candidates, budget: int, *, num_sinks: int, num_newest: int, drops: bool = False
) -> tuple[Choice, Tensor]:
    """`kept` of old units and new ones behind them, pinned as `pin` says.

    Args:    drops: whether to say which ones go, too.
    Returns: what stays; and fp32 [B, Hkv], finite where all scores of new units are.
    """
    count = old.score.shape[2] + new.score.shape[2]
    assert 1 <= budget <= count, (budget, old.score.shape, new.score.shape)
    if use_triton("compact", old.score):
        from locret.kernels.compact_triton import kept_beside_triton

        room = (*old.score.shape[:2], count - budget)
        dropped = torch.empty(room, dtype=torch.int64, device=old.score.device) if drops else None
        keep, sound = kept_beside_triton(old, new, budget, num_sinks, num_newest, dropped=dropped)
        return Choice(keep, dropped), sound
    score, pinned = candidates(old, new, num_sinks=num_sinks, num_newest=num_newest)
    keep = kept(score, pinned, budget)
    sound = torch.linalg.vector_norm(new.score.float(), math.inf, dim=-1)
    return Choice(keep, others(keep, count) if drops else None), sound


def others(keep: Tensor, count: int) -> Tensor:
    """Of `count` units those that are not among `keep` [B, Hkv, b]: int64, [B, Hkv, count - b], ascending."""
    goes = torch.ones(*keep.shape[:2], count, dtype=torch.bool, device=keep.device).scatter_(2, keep, False)
    return _indices(goes, count - keep.shape[2])


def _indices(flags: Tensor, count: int) -> Tensor:
    """Where the `count` set ones of every row are, ascending. Nothing waits for the device."""
    slot = torch.where(flags, flags.cumsum(-1) - 1, count)  # what is not set is written behind the end
    out = torch.empty(*flags.shape[:-1], count + 1, dtype=torch.int64, device=flags.device)
    unit = torch.arange(flags.shape[-1], device=flags.device).expand_as(flags)
    return out.scatter_(-1, slot, unit)[..., :count]


def candidates(old: Candidates, new: Candidates, *, num_sinks: int, num_newest: int) -> tuple[Tensor, Tensor]:
    """Scores and pins of old units and new ones behind them, [B, Hkv, S]."""
    score, position, protected = (torch.cat(both, 2) for both in zip(old, new, strict=True))
    return score, pin(protected, num_sinks=num_sinks, num_newest=num_newest, positions=position)


def kept(scores: Tensor, pinned: Tensor, budget: int) -> Tensor:
    """Indices of the units that stay.

    Args:    scores: [B, Hkv, S], compared in fp32;  pinned: bool, [B, Hkv, S];  budget: 1 .. S.
    Returns: int64, [B, Hkv, budget], ascending.
    """
    assert scores.shape == pinned.shape, (scores.shape, pinned.shape)
    assert 1 <= budget <= scores.shape[-1], (budget, scores.shape)
    if use_triton("compact", scores):
        from locret.kernels.compact_triton import kept_triton

        return kept_triton(scores, pinned, budget)
    return reference_kept(scores, pinned, budget)


def reference_kept(scores: Tensor, pinned: Tensor, budget: int) -> Tensor:
    """`kept` in torch: the threshold by `topk`, the rest by two cumulative sums. Nothing waits for the device."""
    keys = order_keys(scores, pinned)
    threshold = keys.topk(budget, dim=-1).values[..., -1:]
    above, ties = keys > threshold, keys == threshold
    stays = above | (ties & (ties.cumsum(-1) <= budget - above.sum(-1, keepdim=True)))
    return _indices(stays, budget)


def order_keys(scores: Tensor, pinned: Tensor) -> Tensor:
    """int32 keys in the order of the scores: a float's bits, those below the sign turned over for negative numbers."""
    bits = (scores.float() + 0.0).contiguous().view(torch.int32)  # -0 + 0 is +0
    keys = torch.where(bits < 0, bits ^ _LARGEST, bits)
    return keys.masked_fill(scores.isnan(), _LARGEST - 1).masked_fill(pinned, _LARGEST)


_LARGEST = 2**31 - 1


def compact(columns: list[Column], keep: Tensor) -> None:
    """Move the units at `keep` to the beginning of every `out`, in that order.

    Args:
        columns: of one table: all in place or none, all with new units or none.
        keep: int64, [B, Hkv, b], ascending, no index twice.
    """
    for column in columns:
        _check(column, keep)
    if use_triton("compact", keep):
        from locret.kernels.compact_triton import compact_triton

        compact_triton(columns, keep)
    else:
        reference_compact(columns, keep)


def compact_scratch(columns: list[Column], keep: int) -> int:
    """Bytes that `compact` allocates for a moment, for so many units that stay."""
    if use_triton("compact", columns[0].out):
        return 0

    def bytes_of(column: Column) -> int:
        old, new, out = column
        both = 0 if new is None else old.shape[2] + new.shape[2]
        return (both + keep) * out[:, :, :1].numel() * out.element_size()

    return max(bytes_of(column) for column in columns)


def reference_compact(columns: list[Column], keep: Tensor) -> None:
    """`compact` by gather and copy."""
    for old, new, out in columns:
        both = old if new is None else torch.cat((old, new), 2)
        tail = both.shape[3:]
        rows = keep.reshape(*keep.shape, *(1 for _ in tail)).expand(*keep.shape, *tail)
        out[:, :, : keep.shape[2]] = both.gather(2, rows)  # gathered first: source and target may overlap


def in_place(column: Column) -> bool:
    return column.old.data_ptr() == column.out.data_ptr()


def _check(column: Column, keep: Tensor) -> None:
    old, new, out = column
    assert old.shape[:2] == out.shape[:2] == keep.shape[:2], (old.shape, out.shape, keep.shape)
    assert out.shape[2] >= keep.shape[2], "the kept units fit"
    assert (old.dtype, old.shape[3:]) == (out.dtype, out.shape[3:]), "a column has one kind of rows"
    if in_place(column):
        assert old.stride() == out.stride(), "in place means the same units at the same addresses"
    if new is not None:
        assert (new.dtype, new.shape[3:]) == (out.dtype, out.shape[3:]), "a column has one kind of rows"
