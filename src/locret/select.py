"""Which units stay: pins as a mask, then the best scores, in position order.

Shapes: B batch, Hkv KV heads, S cached units, b units that stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from locret.errors import ConfigError


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


def select(scores: Tensor, budget: int, pinned: Tensor) -> Tensor:
    """Indices of the `budget` units that stay: all pinned ones, then the highest scores.

    Pinning is a mask and not a large score: a tie would evict a pinned unit (kvpress issue 227).

    Args:    scores: [B, Hkv, S], finite;  pinned: bool, [B, Hkv, S];  budget: 1 .. S.
    Returns: int64, [B, Hkv, budget], ascending, so that kept units stay in position order.
    """
    ranked = scores.float().masked_fill(pinned, float("inf"))
    return ranked.topk(budget, dim=-1).indices.sort(dim=-1).values


def check_pins(count: int, budget: int) -> None:
    """Raise a ConfigError when `count` pinned units do not fit a budget."""
    if count > budget:
        raise ConfigError(f"{count} pinned units (sinks, protected spans and newest units) do not fit a budget of "
                          f"{budget}; raise the budget or protect less")  # fmt: skip


def reference_keep(scores: Tensor, budget: int, pinned: Tensor) -> list[list[list[int]]]:
    """`select` in ten plain lines of Python, for the tests."""
    kept = []
    for row_scores, row_pins in zip(scores.double().tolist(), pinned.tolist(), strict=True):
        heads = []
        for values, pins in zip(row_scores, row_pins, strict=True):
            order = sorted(range(len(values)), key=lambda i: (not pins[i], -values[i]))
            heads.append(sorted(order[:budget]))
        kept.append(heads)
    return kept


def finite(scores: Tensor) -> Tensor:
    """Whether all scores are finite: a bool on the scores' device, so that nothing waits for it."""
    return torch.isfinite(scores).all()
