"""What a public benchmark is to the loader: where it comes from, its tasks, and how a row becomes records."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from locret.errors import DataError
from locret.tasks.public.files import Row
from locret.tasks.records import Record, Turn

Convert = Callable[[str, Row, int], Iterable[Record]]  # (task, row, index of the first record) -> records
Placed = tuple[Row, str]  # a row and where it is, for errors


@dataclass(frozen=True)
class PublicSet:
    """One benchmark.

    Attributes:
        where: said when a file is missing.
        tasks: its tasks; empty: one task, whatever the file is called.
        files: name of a file or of the folder around it -> task, where they are not named after their tasks.
        together: (task, rows of a file) -> rows, where a row needs what other rows of its file say; it judges none.
    """

    name: str
    summary: str
    hub_id: str
    where: str
    convert: Convert
    tasks: tuple[str, ...] = ()
    files: Mapping[str, str] | None = None
    together: Callable[[str, Iterator[Placed]], Iterable[Placed]] | None = None


@dataclass(frozen=True)
class Prompt:
    """One task's published prompt. `template` has {context} once; what follows it is the question."""

    template: str
    metric: str
    max_new_tokens: int
    answer_prefix: str = ""

    def record(
        self, task: str, index: int, context: str, answers: Sequence[str], *, fields: Mapping[str, Any] | None = None,
        turns: tuple[Turn, ...] = (), **meta: Any,
    ) -> Record:  # fmt: skip
        """The prompt cut at {context}; line ends right behind it belong to the context."""
        head, _, tail = self.template.partition("{context}")
        head, tail = fill(head, fields or {}), fill(tail, fields or {})
        question = tail.lstrip("\n")
        return Record(
            task=task,
            index=index,
            context=head + context + tail[: len(tail) - len(question)],
            question=question,
            answers=tuple(answers),
            metric=self.metric,
            max_new_tokens=self.max_new_tokens,
            answer_prefix=fill(self.answer_prefix, fields or {}),
            turns=turns,
            meta={"mode": "public", **meta},
        )


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """Replace {name} for the given names only, in one pass: braces in a value stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda found: str(fields.get(found[1], found[0])), template)


def texts(value: Any) -> tuple[str, ...]:
    """An answer or a list of answers, as strings.

    >>> texts(3), texts(["a", 2.5])
    (('3',), ('a', '2.5'))
    """
    return tuple(str(item) for item in value) if isinstance(value, list | tuple) else (str(value),)


def option_answers(answer: Any, options: Sequence[str]) -> tuple[str, str]:
    """(the right option's text, its letter), whichever of them a file gives."""
    given = texts(answer)
    letters = "ABCD"
    if len(given) == 2 and given[1] in letters:
        return given[0], given[1]
    if given[0] in options:
        return given[0], letters[list(options).index(given[0])]
    if given[0] in letters and len(options) == 4:
        return str(options[letters.index(given[0])]), given[0]
    raise DataError(f"the answer {given[0]!r} is neither one of the options {list(options)!r} nor a letter A to D")
