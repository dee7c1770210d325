"""What a generated task is asked for, and what the suite knows about it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from locret.tasks.gauge import Gauge, Plan
from locret.tasks.haystack import Haystack
from locret.tasks.records import Record

MODES = ("official", "hardened")


@dataclass(frozen=True)
class Request:
    """One sample of one task.

    Attributes:
        limit: tokens that the whole prompt may have.
        haystack: where natural text comes from.
    """

    task: str
    index: int
    seed: int
    mode: str
    limit: int
    gauge: Gauge
    haystack: Haystack

    @property
    def hardened(self) -> bool:
        return self.mode == "hardened"

    def rng(self, stream: str) -> random.Random:
        """A new generator at the start of a named stream; streams do not disturb each other, nor do samples."""
        return random.Random(f"{self.task}:{self.mode}:{self.seed}:{self.index}:{stream}")

    def layout(self) -> random.Random:
        """For the order of things. The published generators use one permutation for all samples; hardened does not."""
        return self.rng("layout") if self.hardened else random.Random(self.seed)

    def start(self) -> int:
        """The haystack's first word: the very first as published, the beginning of any sentence if hardened."""
        return self.haystack.random_start(self.rng("start")) if self.hardened else 0


@dataclass(frozen=True)
class TaskInfo:
    """A generated task.

    Attributes:
        dense: the context is made of units of which each is as likely to be asked for as any other, so no method that
            has not seen the question can know which to keep.
        query_agnostic_ceiling: for dense tasks, (record, budget in units per layer and head) -> the score, 0..100, that
            such a method can expect at most.
        max_new_tokens: of each mode; the official ones are the published limits.
        counts_generated: the official length includes max_new_tokens (RULER's definition).
        build: (request, **options) -> plan.
        stop: text behind which the answer has ended, for tasks that a model would go on with by itself; "": none.
    """

    name: str
    group: str
    summary: str
    metric: str
    max_new_tokens: Mapping[str, int]
    build: Callable[..., Plan]
    dense: bool = False
    counts_generated: bool = False
    stop: str = ""

    @property
    def query_agnostic_ceiling(self) -> Callable[[Record, int], float] | None:
        return dense_ceiling if self.dense else None


def dense_ceiling(record: Record, budget: int) -> float:
    """The share of the context's equally likely units (pairs, needles) that fit the budget, 0..100.

    Every unit is counted with its mean length in tokens, as if all of its tokens were needed and none of the frame's:
    a method that keeps a part of a pair's tokens and still answers can be above it.
    """
    return 100.0 * min(1.0, budget / (record.meta["num_units"] * record.meta["unit_tokens"]))


def dense_meta(num_units: int, tokens: int) -> dict[str, Any]:
    """What `dense_ceiling` reads."""
    return {"num_units": num_units, "unit_tokens": round(tokens / num_units, 2)}
