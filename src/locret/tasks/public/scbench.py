"""SCBench (arXiv:2412.10319): {id, context, multi_turns: [{input, answer, options, task}]}, several questions each.

Prompts of a first turn and of the later ones are SCBench's (MIT, scbench/eval_utils.py). The two mixed sets score their
parts with different metrics: each part becomes a record of its own. repoqa's rows also have `lang` and `repo`, their
turns a `name`: an answer is compared with all functions that any row of the file asks of its repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from locret.errors import DataError
from locret.tasks import repoqa
from locret.tasks.public.base import Placed, Prompt, PublicSet, fill, option_answers, texts
from locret.tasks.public.files import Row
from locret.tasks.records import Record, Turn

_OPTIONS = "Question: {input}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n\nThe the correct answer is"  # sic
_JSON = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
_CODE = (
    "Based on the function description and code context, please retrieve and repeat the exact described function from "
    "the code context in a code block wrapped by ```:\n\n"
)
_BOOK = "Read the book and answer the question. Be very concise in your answer.\n\n"


@dataclass(frozen=True)
class _Task:
    head: str
    question: str
    metric: str
    max_new_tokens: int


_PLAIN = "{input}"
_REPOQA = "scbench_repoqa"  # the task and its metric
_TASKS = {
    "scbench_kv": _Task(_JSON, _PLAIN, "scbench_kv", 150),
    "scbench_prefix_suffix": _Task("", _PLAIN, "scbench_kv", 150),
    "scbench_vt": _Task("", _PLAIN, "string_match_all", 30),
    "scbench_qa_eng": _Task(_BOOK, "Question: {input}\nAnswer:", "scbench_any", 40),
    "scbench_qa_chn": _Task("阅读以下书籍然后回答问题。\n\n", "问题：{input}\n答案：", "infinitebench_qa_zh", 40),
    "scbench_choice_eng": _Task(
        "Read the book and answer the question.\n\n", _OPTIONS, "infinitebench_choice", 40
    ),
    "scbench_many_shot": _Task("", _PLAIN, "scbench_any", 10),
    "scbench_mf": _Task("{prefix}\n\n", _PLAIN, "infinitebench_math_find", 5),
    "scbench_summary": _Task("", _PLAIN, "rouge_lsum", 200),
    "scbench_passkey": _Task("", _PLAIN, "infinitebench_first_number", 15),
    _REPOQA: _Task(_CODE, _PLAIN, _REPOQA, 1024),
}  # fmt: skip
_MIXED = {"scbench_summary_with_needles": {"scbench_summary": 800, "scbench_passkey": 15},
          "scbench_repoqa_and_kv": {_REPOQA: 1024, "scbench_kv": 80}}  # fmt: skip


def _together(name: str, rows: Iterator[Placed]) -> Iterable[Placed]:
    """repoqa's rows with a field more, `functions`: name and text of all that are asked of the row's repository."""
    if name != _REPOQA and _REPOQA not in _MIXED.get(name, {}):
        return rows
    found = list(rows)
    functions: dict[str, list[repoqa.Function]] = {}
    for row, _ in found:
        functions.setdefault(str(row.get("repo")), []).extend(_functions(name, row))
    return [({**row, "functions": functions[str(row.get("repo"))]}, where) for row, where in found]


def _functions(name: str, row: Row) -> Iterator[repoqa.Function]:
    """What a row asks for; what is broken in it is for `_convert` to say."""
    turns = row.get("multi_turns")
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict) and _REPOQA in (name, turn.get("task")) and {"name", "answer"} <= turn.keys():
            yield str(turn["name"]), str(turn["answer"])


def _convert(name: str, row: Row, index: int) -> Iterator[Record]:
    asked: list[Row] = row["multi_turns"]
    if name in _MIXED:
        parts = [
            (task, [turn for turn in asked if turn.get("task") == task], limit) for task, limit in _MIXED[name].items()
        ]
    else:
        parts = [(name, asked, _TASKS[name].max_new_tokens)]
    for task, turns, limit in parts:
        if turns:
            yield _record(name, task, turns, limit, row, index)
            index += 1


def _record(name: str, task: str, asked: list[Row], limit: int, row: Row, index: int) -> Record:
    kind = _TASKS[task] if name == task else replace(_TASKS[task], head="")  # mixed contexts bring their own
    turns = [_turn(kind, turn, row, follows=i > 0) for i, turn in enumerate(asked)]
    first = turns[0]
    prompt = Prompt(kind.head + "{context}\n\n{question}", kind.metric, limit)
    context = row["context"] if "context" in row else row["input"]
    fields = {"prefix": _which(asked[0]) if task == "scbench_mf" else "", "question": first.question}
    more = {field: row[field] for field in ("repo", "lang")} if task == _REPOQA else {}
    return prompt.record(
        name, index, context, first.answers, fields=fields, turns=tuple(turns[1:]), id=row.get("id", index), part=task,
        **more,
    )  # fmt: skip


def _turn(kind: _Task, turn: Row, row: Row, follows: bool) -> Turn:
    fields: dict[str, Any] = {"input": turn["input"]}
    answers = texts(turn["answer"])
    if kind.metric == "infinitebench_choice":
        fields |= dict(zip("ABCD", turn["options"], strict=True))
        answers = option_answers(turn["answer"], turn["options"])
    if kind.metric == _REPOQA:
        if row["lang"] not in repoqa.LANGUAGES:
            raise DataError(f"lang is {row['lang']!r}; repoqa has {', '.join(repoqa.LANGUAGES)}")
        everything = [text for function in row["functions"] for text in function]
        answers = (str(turn["answer"]), str(turn["name"]), row["lang"], *everything)
    question = fill(kind.question, fields)
    if follows and kind.metric == "infinitebench_math_find":
        question = f"{_which(turn)}\n\n{question}"
    return Turn(question, answers)


def _which(turn: Row) -> str:
    found = re.search(r"The .+ is", turn["input"])
    if found is None:
        raise DataError(f"scbench_mf's input names no number like 'The largest number is': {turn['input']!r}")
    return f"What is {found.group().lower()[:-3]}?"


SET = PublicSet(
    "scbench", "12 tasks, several questions a context", "microsoft/SCBench",
    "get the .jsonl files from https://huggingface.co/datasets/microsoft/SCBench (folder data)",
    _convert, (*_TASKS, *_MIXED), together=_together,
)  # fmt: skip
