"""Slow readings of the methods: whole float64 attention matrices and lists; no unit is ever moved.

`Reference` runs a whole chunked prefill and decoding and hands a method's rule, for every KV head, what a chunk's
queries attended to among the units that are still alive. A rule is a few lines; none shares code with `locret`.
Shapes: G query heads of a KV head, T chunk, A living units (the chunk's last), D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from oracles import MaskedReference
from torch import Tensor


@dataclass
class Seen:
    """One KV head of one layer when a chunk has been attended."""

    q: Tensor  # before RoPE, [G, T, D]
    logits: Tensor  # scaled, -inf where not visible, [G, T, A]
    weights: Tensor  # [G, T, A]
    keys: Tensor  # rotated, [A, D]
    values: Tensor  # [A, D]
    old: Tensor  # scores so far, 0 for new units, [A]
    at: list[int]  # original positions of the living units
    start: int  # original position of the chunk's first token
    turn: Callable[[Tensor, Tensor], Tensor]  # rotate [T, D] to positions [T]
    scale: float


Rule = Callable[[list[Seen]], list[Tensor]]  # one score [A] for every head's living units
Choose = Callable[
    [Any, int, int, list[int], set[int], int], list[int]
]  # reference, layer, head, living, pinned, target


class Reference(MaskedReference):
    """`rule` gives scores, `choose` what stays (default: pinned ones, then the best scores), `budgets` one a layer."""

    def __init__(
        self, model: Any, rule: Rule, *, choose: Choose | None = None, budgets: list[int] | None = None,
        across: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(model, lambda layer, q, k, v, start: torch.zeros(k.shape[1], k.shape[2]).double(), **options)
        self.rule, self.choose = rule, choose or best
        self.budgets = budgets or [self.budget] * len(self.k)
        self.across = across  # units that each head keeps at least, when heads share a layer's budget
        self.memory: dict[Any, Any] = {}

    def _attend(self, i: int, q: Tensor, scale: float) -> Tensor:
        t, total = q.shape[2], self.k[i].shape[2]
        out, heads, group = torch.zeros_like(q), [], self.hq // self.hkv
        for kv in range(self.hkv):
            live = self.alive[i][kv].nonzero()[:, 0]
            at = torch.arange(len(live)) if self.positions == "compact" else live
            keys = self._angle(self.k[i][0, kv, live], at)
            mine = q[0, kv * group : (kv + 1) * group]
            rows = torch.stack([self._angle(x, at[-t:]) for x in mine])
            seen = live[None] <= torch.arange(total - t, total)[:, None]
            logits = (rows @ keys.T * scale).masked_fill(~seen, -math.inf)
            weights = logits.softmax(-1)
            out[0, kv * group : (kv + 1) * group] = weights @ self.v[i][0, kv, live]
            turn = partial(self._turn_ahead, int(at[-1]) + 1)
            heads.append(Seen(mine, logits, weights, keys, self.v[i][0, kv, live], self.s[i][kv, live], live.tolist(),
                              total - t, turn, scale))  # fmt: skip
        for kv, (head, scores) in enumerate(zip(heads, self.rule(heads), strict=True)):
            self.s[i][kv, head.at] = scores.double()
        return out

    def _turn_ahead(self, first: int, x: Tensor, ahead: Tensor) -> Tensor:
        return self._angle(x, first + ahead)

    def _evict(self, i: int, head: int, newest: int, target: int) -> None:
        budget = self.budgets[i]
        target = budget - (self.budget - target)
        live = [alive.nonzero()[:, 0].tolist() for alive in self.alive[i]]
        if self.across is not None:
            if head == self.hkv - 1 and sum(map(len, live)) > self.hkv * budget:
                self._evict_across(i, live, newest, target)
        elif len(live[head]) > budget:
            stay = self.choose(self, i, head, live[head], self._pinned(live[head], newest), target)
            self.alive[i][head, sorted(set(live[head]) - set(stay))] = False

    def _evict_across(self, i: int, live: list[list[int]], newest: int, target: int) -> None:
        """Every head's own best first, then the best of the layer."""
        assert self.across is not None
        ranked = []
        for head, units in enumerate(live):
            pinned = self._pinned(units, newest)
            order = sorted(units, key=lambda p: (p not in pinned, -self.s[i][head, p].item()))
            for rank, p in enumerate(order):
                safe = p in pinned or rank < self.across
                ranked.append((not safe, -self.s[i][head, p].item(), head, p))
        self.alive[i][:] = False
        for _, _, head, p in sorted(ranked)[: self.hkv * target]:
            self.alive[i][head, p] = True

    def _pinned(self, live: list[int], newest: int) -> set[int]:
        return {p for p in live if p < self.sinks} | set(live[len(live) - newest :])


class SurprisalReference(Reference):
    """Evicts after the forward pass, by -log p of the tokens."""

    def __init__(self, model: Any, decay: float, **options: Any) -> None:
        super().__init__(model, lambda heads: [head.old for head in heads], **options)
        self.decay, self.before = decay, None
        self.asked: list[tuple[int, int, int, int]] = []

    def _evict(self, i: int, head: int, newest: int, target: int) -> None:
        self.asked.append((i, head, newest, target))

    def _forward(self, ids: Tensor, newest: int, target: int) -> Tensor:
        start = self.n
        last = super()._forward(ids, newest, target)
        logp = self.logits.log_softmax(-1)
        nats = [-logp[j - 1, ids[0, j]].item() for j in range(1, ids.shape[1])]
        first = max(nats) if self.before is None else -self.before.log_softmax(-1)[ids[0, 0]].item()
        self.before = last
        asked, self.asked = self.asked, []
        for i, head, *rest in asked:
            if int(self.alive[i][head].sum()) > self.budget:
                self.s[i][head, :start] *= self.decay
            self.s[i][head, start:] = torch.tensor([first, *nats])
            super()._evict(i, head, *rest)
        return last


# ---------------------------------------------------------------------- rules


def best(ref: Any, i: int, head: int, live: list[int], pinned: set[int], target: int) -> list[int]:
    return sorted(live, key=lambda p: (p not in pinned, -ref.s[i][head, p].item()))[:target]


def accumulated(heads: list[Seen]) -> list[Tensor]:
    """H2O."""
    return [head.old + head.weights.mean(0).sum(0) for head in heads]


def accumulated_shared(heads: list[Seen]) -> list[Tensor]:
    """PrefixKV."""
    mean = torch.stack([head.weights.mean(0).sum(0) for head in heads]).mean(0)
    return [head.old + mean for head in heads]


def last_query(heads: list[Seen]) -> list[Tensor]:
    """TOVA."""
    mean = torch.stack([head.weights[:, -1].mean(0) for head in heads]).mean(0)
    return [mean for _ in heads]


def window_votes(window: int, kernel: int) -> Rule:
    """SnapKV with average pooling over what lies before the window; zeros beyond the edges count."""

    def rule(heads: list[Seen]) -> list[Tensor]:
        out = []
        for head in heads:
            w = min(window, head.weights.shape[1])
            votes = head.weights[:, -w:].sum(1).mean(0).tolist()[:-w]
            half = kernel // 2
            pooled = [sum(votes[max(0, j - half) : j + half + 1]) / kernel for j in range(len(votes))]
            out.append(torch.tensor([*pooled, *[float(w)] * w]))
        return out

    return rule


def proxies(share: float) -> Rule:
    """NACL."""

    def rule(heads: list[Seen]) -> list[Tensor]:
        out = []
        for head in heads:
            t = head.weights.shape[1]
            m = min(t, max(1, round(share * (head.start + t))))
            out.append(head.weights[:, -m:].sum(1).mean(0))
        return out

    return rule


def best_and_drawn(share: float, noise: Callable[[int, int, int], float]) -> Choose:
    """NACL: the best, then the largest score + Gumbel(noise(layer, head, position))."""

    def choose(ref: Any, i: int, head: int, live: list[int], pinned: set[int], target: int) -> list[int]:
        order = best(ref, i, head, live, pinned, len(live))
        drawn = math.floor((target - len(pinned)) * share)
        sure, others = order[: target - drawn], order[target - drawn :]

        def key(p: int) -> float:
            return ref.s[i][head, p].item() - math.log(-math.log(noise(i, head, p)))

        return sure + sorted(others, key=key, reverse=True)[:drawn]

    return choose


def flagged(window: int) -> Rule:
    """CORM: queries since one of the group gave at least the average."""

    def rule(heads: list[Seen]) -> list[Tensor]:
        out = []
        for head in heads:
            _, t, a = head.weights.shape
            scores = []
            for j in range(a):
                since = t - head.old[j].item() if j < a - t else 2.0**23
                for row in range(max(0, t - window), t):
                    visible = a - t + row + 1
                    if j < visible and (head.weights[:, row, j] >= (1 - 1e-5) / visible).any():
                        since = min(since, t - 1 - row)
                scores.append(-min(since, 2.0**23))
            out.append(torch.tensor(scores))
        return out

    return rule


def null_votes(window: int) -> Rule:
    """CSP: exp(x) / (1 + sum exp(x))."""

    def rule(heads: list[Seen]) -> list[Tensor]:
        out = []
        for head in heads:
            e = head.logits[:, -min(window, head.logits.shape[1]) :].exp()
            out.append((e / (1 + e.sum(-1, keepdim=True))).sum(1).mean(0))
        return out

    return rule


def two_kinds(share: float) -> Choose:
    """CSP: the best of the old and of the chunk's units; ref.chunk_start says where those begin."""

    def choose(ref: Any, i: int, head: int, live: list[int], pinned: set[int], target: int) -> list[int]:
        start = ref.n
        order = [p for p in best(ref, i, head, live, set(), len(live)) if p not in pinned]
        free = target - len(pinned)
        cross = int(free * share)
        stay = [p for p in order if p < start][:cross] + [p for p in order if p >= start][: free - cross]
        rest = [p for p in order if p not in stay]
        return [*pinned, *stay, *rest[: free - len(stay)]]

    return choose


def against_the_mean(heads: list[Seen]) -> list[Tensor]:
    """KeyDiff."""
    out = []
    for head in heads:
        unit = [k / math.sqrt((k @ k).item()) for k in head.keys]
        anchor = sum(unit) / len(unit)
        out.append(torch.tensor([-((u @ anchor) / anchor.norm()).item() for u in unit]))
    return out


def gaussian_queries(future: int, sinks: int) -> Rule:
    """Expected Attention, by turning every query to every future position's mean rotation."""

    def rule(heads: list[Seen]) -> list[Tensor]:
        out = []
        for head in heads:
            d = head.q.shape[-1]
            ahead = torch.arange(future)
            turn = sum(torch.stack([head.turn(torch.eye(d).double()[i : i + 1], j[None])[0] for i in range(d)])
                       for j in ahead) / future  # rows: what becomes of each axis  # fmt: skip
            total = torch.zeros(len(head.at)).double()
            free = [j for j, p in enumerate(head.at) if p >= sinks]
            for q in head.q:
                turned = q[max(0, min(sinks - head.start, len(q) - 1)) :] @ turn
                mu = turned.mean(0)
                cov = sum(torch.outer(x - mu, x - mu) for x in turned) / len(turned)
                logits = torch.stack([(k @ mu) * head.scale + (k @ cov @ k) * head.scale**2 / 2 for k in head.keys])
                if free:
                    total[free] += logits[free].softmax(0)
            scores = total / len(head.q) * head.values.norm(dim=-1)
            top = scores.max()
            out.append(torch.stack([top if p < sinks else s for p, s in zip(head.at, scores, strict=True)]))
        return out

    return rule


def lagged(lag: int, sinks: int) -> Rule:
    """LagKV: ranks within a piece once the next piece is complete; 1 until then and for sinks."""

    def rule(heads: list[Seen]) -> list[Tensor]:
        out = []
        for head in heads:
            t, end = head.q.shape[1], head.start + head.q.shape[1]
            scores = [*head.old[: len(head.at) - t].tolist(), *[1.0] * t]
            where = {p: j for j, p in enumerate(head.at)}
            low = sinks
            while low + 2 * lag <= end:
                if low + 2 * lag > head.start:  # the next piece was completed by this chunk
                    piece, after = ([where[p] for p in range(a, a + lag)] for a in (low, low + lag))
                    total = torch.zeros(lag).double()
                    for x in (head.keys, head.values):
                        floor, ceiling = x[after].min(0).values, x[after].max(0).values
                        total += ((x[piece] - floor) / (ceiling - floor)).std(-1).softmax(0)
                    for rank, j in enumerate(sorted(range(lag), key=lambda j: total[j].item())):
                        scores[piece[j]] = rank / lag
                low += lag
            out.append(torch.tensor(scores))
        return out

    return rule


def position(sinks: int) -> Rule:
    """StreamingLLM."""
    return lambda heads: [torch.tensor([p + 10_000 * (p < sinks) for p in head.at]).double() for head in heads]


def moving_average(decay: float) -> Rule:
    """Cascading: one query after the other."""

    def rule(heads: list[Seen]) -> list[Tensor]:
        mean = torch.cat([head.weights for head in heads]).mean(0)  # [T, A]
        score = heads[0].old
        for row in mean:
            score = decay * score + (1 - decay) * row
        return [score for _ in heads]

    return rule


class Chain:
    """Cascading, one unit at a time: lists of units, oldest first."""

    def __init__(self, count: int) -> None:
        self.windows: list[list[int]] = [[] for _ in range(count)]
        self.open = [False] * count
        self.known: set[int] = set()

    def insert(self, unit: int, size: int, score: Callable[[int], float]) -> None:
        self.known.add(unit)
        self._offer(0, unit, size, score)

    def shrink(self, size: int, score: Callable[[int], float]) -> None:
        for level in reversed(range(len(self.windows))):
            while len(self.windows[level]) > size:
                self._offer(level + 1, self.windows[level].pop(0), size, score)

    def _offer(self, level: int, unit: int, size: int, score: Callable[[int], float]) -> None:
        if level == len(self.windows):
            return
        window = self.windows[level]
        if level > 0 and len(window) == size and self.open[level]:
            if score(unit) > score(window[-1]):
                window[-1] = unit
            self.open[level] = False
            return
        self.open[level] = level > 0 and len(window) == size
        window.append(unit)
        if len(window) > size:
            self._offer(level + 1, window.pop(0), size, score)


def chained(count: int) -> Choose:
    """Cascading; what the windows leave free goes to the newest of the others."""

    def choose(ref: Any, i: int, head: int, live: list[int], pinned: set[int], target: int) -> list[int]:
        chain = ref.memory.setdefault((i, head), Chain(count))
        size = (target - len(pinned)) // count
        for p in live:
            if p not in chain.known and p not in pinned:
                chain.insert(p, size, lambda p: ref.s[i][head, p].item())
        held = [p for window in chain.windows for p in window]
        rest = [p for p in live if p not in held and p not in pinned]
        free = target - len(pinned) - len(held)
        return [*pinned, *held, *rest[len(rest) - free :]]

    return choose
