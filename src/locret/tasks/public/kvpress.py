"""kvpress's schema, in and out: context, question, answer_prefix, answers, max_new_tokens, task, one row a question.

kvpress groups rows by context and wants one answer prefix in each group, so a multi-turn record whose turns have
prefixes of their own is refused. A column `metric`, which kvpress does not read, makes the way back exact.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from locret.errors import DataError
from locret.files import write_text
from locret.tasks.public.base import PublicSet, texts
from locret.tasks.public.files import Row
from locret.tasks.records import Record
from locret.tasks.request import TaskInfo

_FIELDS = ("context", "question", "answer_prefix")  # what tells a row of the schema from a benchmark's own


def to_kvpress(records: Iterable[Record]) -> Iterator[Row]:
    """Rows of these records; further turns become rows of the same context.

    Raises: DataError: turns with different answer prefixes.
    """
    for record in records:
        asked = [(record.question, record.answers, record.answer_prefix)]
        asked += [(turn.question, turn.answers, turn.answer_prefix) for turn in record.turns]
        if len({prefix for _, _, prefix in asked}) > 1:
            raise DataError(
                f"sample {record.index} of {record.task!r}: its turns have different answer prefixes, which kvpress "
                f"does not allow; generate it with answer_prefix=False"
            )
        for question, answers, prefix in asked:
            yield {
                "context": record.context,
                "question": question,
                "answer_prefix": prefix,
                "answers": list(answers),
                "max_new_tokens": record.max_new_tokens,
                "task": record.task,
                "metric": record.metric,
            }


def export_kvpress(records: Iterable[Record], path: str | Path) -> int:
    """Write a .jsonl file that kvpress's evaluation reads; returns the number of rows."""
    lines = [json.dumps(row, ensure_ascii=False) for row in to_kvpress(records)]
    write_text(path, "".join(line + "\n" for line in lines))
    return len(lines)


def is_kvpress(row: Row) -> bool:
    return row.keys() >= set(_FIELDS)


def from_kvpress(row: Row, index: int, metrics: dict[str, TaskInfo], task: str = "", metric: str = "") -> Record:
    """One row; its metric is the row's, or what its task is scored with here, or the one given."""
    task = str(row.get("task") or task)
    if "answers" not in row and "answer" not in row:
        raise DataError('a row of kvpress\'s schema has "answers" (or "answer")')
    found = row.get("metric") or (metrics[task].metric if task in metrics else metric)
    if not found:
        raise DataError(f'nothing is known of how task {task!r} is scored; add a column "metric"')
    answers = texts(row["answers"] if "answers" in row else row["answer"])
    if found == "longbench_classification" and len(answers) == 1:
        answers = (*answers, *texts(row["all_classes"]))
    return Record(
        task, index, row["context"], row["question"], answers, str(found), int(row.get("max_new_tokens") or 64),
        row["answer_prefix"] or "", meta={"mode": "public"},
    )  # fmt: skip


def _refuse(task: str, row: Row, index: int) -> Iterable[Record]:
    """Rows that come here lack a field. Raises: KeyError naming it."""
    raise KeyError(next(name for name in _FIELDS if name not in row))


SET = PublicSet("kvpress", "any file in kvpress's schema", "simonjegou/ruler", "write one with export_kvpress", _refuse)
