"""Where samples and their scores come from: what a run needs to know about the tasks, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from locret.tasks.records import Record


@dataclass(frozen=True)
class TaskFacts:
    """What a table says about a task.

    Attributes:
        dense: every part of the context is as likely to be asked for as any other.
        ceiling: for dense tasks, (record, units kept a layer and head) -> the best score that a method which has not
            seen the question can expect; None where there is no such bound.
        stop: text that ends an answer; empty: none.
    """

    summary: str = ""
    group: str = ""
    metric: str = ""
    dense: bool = False
    ceiling: Callable[[Record, int], float] | None = None
    stop: str = ""


@dataclass(frozen=True)
class Request:
    """Which samples a block wants."""

    task: str
    length: int
    seed: int
    count: int
    mode: str
    tokenizer: Any
    answer_prefix: bool = True
    sentence_tokens: int = 32
    even_lengths: bool = False
    text: str | None = None
    public: dict[str, Any] | None = None  # path, hub_id, limit of a public set


class Source(Protocol):
    """Tasks by name. `records` gives the same samples for the same request; `check` raises what `score` would.

    `corpus_score` is a benchmark's number for a whole set; None where that is the mean over samples.
    """

    def tasks(self) -> Sequence[str]: ...

    def groups(self) -> Mapping[str, Sequence[str]]: ...

    def facts(self, task: str) -> TaskFacts: ...

    def check(self, metric: str, answers: Sequence[str]) -> None: ...

    def records(self, request: Request) -> Iterable[Record]: ...

    def score(self, metric: str, prediction: str, answers: Sequence[str]) -> float: ...

    def corpus_score(
        self, metric: str, predictions: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> float | None: ...


@dataclass
class ListSource:
    """Records that are there already, for tests and for code that makes its own."""

    by_task: dict[str, list[Record]]
    scorer: Callable[[str, str, Sequence[str]], float]
    known: dict[str, TaskFacts] = field(default_factory=dict)

    def tasks(self) -> Sequence[str]:
        return list(self.by_task)

    def groups(self) -> Mapping[str, Sequence[str]]:
        return {"all": list(self.by_task)}

    def facts(self, task: str) -> TaskFacts:
        return self.known.get(task, TaskFacts())

    def check(self, metric: str, answers: Sequence[str]) -> None:
        """Whatever the scorer takes is fine."""

    def records(self, request: Request) -> Iterable[Record]:
        return self.by_task[request.task][: request.count]

    def score(self, metric: str, prediction: str, answers: Sequence[str]) -> float:
        return self.scorer(metric, prediction, answers)

    def corpus_score(self, metric: str, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float | None:
        """The mean."""
        return None
