"""Records, scores and grids for the tests of `locret.evaluate`: small, fixed, and known in every character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from locret.evaluate.grid import Grid
from locret.evaluate.source import ListSource, TaskFacts
from locret.tasks.records import Record, Turn


def record(index: int, task: str = "key", turns: int = 0, **changes: Any) -> Record:
    """`n` lines of noise with one gold line; every third sample has another length."""
    gold = f"The key is {4000 + 7 * index}. "
    noise = "The sky is blue. " * (6 + index % 3)
    context = noise + gold + noise
    fields: dict[str, Any] = dict(
        task=task, index=index, context=context, question="\n\nWhat is the key?", answers=(str(4000 + 7 * index),),
        metric="fake", max_new_tokens=4, spans=((len(noise), len(noise) + len(gold) - 1),),
        turns=tuple(Turn(f"And the key plus {k}?", (str(4000 + 7 * index + k),)) for k in range(1, turns + 1)),
        meta={"depths": [0.5]},
    )  # fmt: skip
    return Record(**{**fields, **changes})


def fake_score(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """Depends on every character, so that two predictions seldom score alike."""
    assert metric == "fake"
    return float(sum(prediction.encode()) % 101)


def source(count: int = 5, turns: int = 0) -> ListSource:
    tasks = {"key": [record(i) for i in range(count)], "turns": [record(i, "turns", turns or 2) for i in range(count)]}
    return ListSource(tasks, fake_score, {"key": TaskFacts("a key", "niah", "fake", dense=True, ceiling=_ceiling)})


def _ceiling(record: Record, units: int) -> float:
    return float(units + record.index)


def grid(**changes: Any) -> Grid:
    options: dict[str, Any] = dict(
        tasks=["key"], methods=["full", "recency"], budgets=[48], lengths=[256], samples=5, batch_size=2
    )
    return Grid.from_dict({**options, **changes})
