"""A sample of an evaluation as text: what every task makes, every public file is read into, and every run consumes.

The schema is kvpress's (`context, question, answer_prefix, answers, max_new_tokens`) and what fair comparison needs
beside it: the metric's name, where the gold text lies, and further turns about the same context.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from locret.errors import DataError


@dataclass(frozen=True)
class Turn:
    """A further question about the same context, asked after the ones before it were answered."""

    question: str
    answers: tuple[str, ...]
    answer_prefix: str = ""
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Record:
    """One sample: a context that may be compressed before the question is known, and how its answer is judged.

    Attributes:
        task, index: the sample's name; the same (task, index, seed, length) gives the same bytes.
        context: text that comes before the question.
        question: text that comes after it. Empty: the context ends in the question (nothing is query-agnostic then).
        answer_prefix: what the model's answer is made to begin with, behind the chat template's generation prompt.
        answers: the right answers; what several mean (any, all) is the metric's business.
        metric: a name in `locret.tasks.metrics.METRICS`.
        max_new_tokens: the published limit, or the hardened mode's.
        spans: [start, end) in characters of `context` that hold the gold facts.
        turns: more questions of the same context, in order.
        meta: length asked for, depth, seed, mode ("official", "hardened"), and what else the task wants to say.
    """

    task: str
    index: int
    context: str
    question: str
    answers: tuple[str, ...]
    metric: str
    max_new_tokens: int
    answer_prefix: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    turns: tuple[Turn, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.answers:
            raise DataError(f"sample {self.index} of task {self.task!r} has no answer; give at least one")
        if self.max_new_tokens < 1:
            raise DataError(f"sample {self.index} of task {self.task!r}: max_new_tokens is {self.max_new_tokens}")
        for start, end in self.spans:
            if not 0 <= start < end <= len(self.context):
                raise DataError(
                    f"sample {self.index} of task {self.task!r}: gold span [{start}, {end}) does not lie in a context "
                    f"of {len(self.context)} characters"
                )
