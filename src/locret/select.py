"""Which units stay: the pinned ones (`kernels.compact.pin`), then the best scores, in position order.

Shapes: B batch, Hkv KV heads, S cached units, b units that stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from locret.errors import ConfigError
from locret.kernels.compact import kept


def select(scores: Tensor, budget: int, pinned: Tensor) -> Tensor:
    """Indices of the `budget` units that stay: all pinned ones, then the highest scores.

    Pinning is a mask and not a large score: a tie would evict a pinned unit (kvpress issue 227).

    Args:    scores: [B, Hkv, S], finite;  pinned: bool, [B, Hkv, S];  budget: 1 .. S.
    Returns: int64, [B, Hkv, budget], ascending, so that kept units stay in position order. Of equal scores the older
             stays, on every device.
    """
    return kept(scores, pinned, budget)


def select_across_heads(scores: Tensor, budget: int, pinned: Tensor, *, floor: int) -> Tensor:
    """Like `select`, but the KV heads of a layer share Hkv * budget units; each keeps at least `floor`.

    Args:    scores: as for `select`, -inf for what is no unit (never taken: a layer has enough units).
    Returns: int64, [B, Hkv * budget], head * S + index, ascending.
    """
    heads = scores.shape[1]
    ranked = scores.float().masked_fill(pinned, float("inf"))
    safe = ranked.topk(floor, dim=-1)
    ranked = ranked.scatter(-1, safe.indices, safe.values.masked_fill(safe.values > float("-inf"), float("inf")))
    order = ranked.flatten(1).argsort(
        dim=-1, descending=True, stable=True
    )  # ties: how far heads are padded is no matter
    return order[:, : heads * budget].sort(dim=-1).values


def ranks(values: Tensor) -> Tensor:
    """0 for the largest of the last dimension, 1 for the next ...; int64, same shape."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(values.shape[-1], device=values.device).expand_as(order)
    )


def draws(seed: int, layer: int, positions: Tensor) -> Tensor:
    """Uniform numbers in (0, 1) that depend on seed, layer, KV head and position only. positions: int64, [B, Hkv, S].

    A row of a batch, a chunking or a device therefore changes nothing.
    """
    head = torch.arange(positions.shape[1], device=positions.device)[:, None]
    bits = _mix(_mix(_mix(torch.full_like(head, seed) + layer) + head) + positions)
    return ((bits & 0xFFFFFF).float() + 0.5) / 2**24


def _mix(x: Tensor) -> Tensor:
    """Spread 64-bit integers (splitmix64; products wrap around)."""
    x = x + 0x1E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0x3F58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x14D049BB133111EB
    return x ^ (x >> 31)


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
