"""Files of recall tasks: RULER's own output, HELMET's recall part (arXiv:2410.02694), BABILong (arXiv:2406.10149).

RULER: {index, input, outputs, length, answer_prefix}; older ones have the answer prefix inside `input`. HELMET's
json_kv: {context, question, answer, demos}, its RULER files {context, query, type_needle_v, answer}. BABILong: {input,
question, target}. BABILong's prompt is worded here, its scorer is the published one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from locret.errors import DataError
from locret.tasks import ruler
from locret.tasks.babi import PLACES
from locret.tasks.public.base import Prompt, PublicSet, texts
from locret.tasks.public.files import Row
from locret.tasks.records import Record

_RULER = {info.name: info for info in ruler.TASKS}
# where a RULER prompt's question begins; the last one counts, a solved example may come first
_QUESTION = re.compile(
    r"\n(?=What (?:is|are all) the special magic |Question: (?:Find all variables|What are the 10|Do not provide)"
    r"|\nAnswer the question based on the given documents\.)"
)
_OLD_PREFIX = re.compile(
    r"(?<=[?.])\s*((?:The special magic \w+ for .{1,400}? mentioned in the provided text (?:is|are)"
    r"|Answer: .{0,300}?:?|Answer:)\s*)$"
)


def split_ruler(text: str) -> tuple[str, str]:
    """(context, question) of a RULER prompt; the line end between them belongs to the context."""
    found = None
    for found in _QUESTION.finditer(text):  # noqa: B007
        pass
    if found is None:
        raise DataError("no question of RULER's templates found in `input`; is this a RULER file?")
    end = found.end() + (text[found.end() :].startswith("\n"))
    return text[:end], text[end:]


def _ruler(task: str, row: Row, index: int) -> Iterator[Record]:
    info = _RULER[task]
    text, prefix = row["input"], row.get("answer_prefix", "")
    if not prefix and (found := _OLD_PREFIX.search(text)):
        prefix, text = text[found.start() :], text[: found.start()]
    context, question = split_ruler(text)
    answers = texts(row["outputs"])
    spans = _needles(context, answers) if task.startswith("niah") else ()
    yield Record(
        task, index, context, question, answers, info.metric, info.max_new_tokens["official"], prefix, spans,
        meta={"mode": "public", "length": row.get("length")},
    )  # fmt: skip


def _needles(context: str, answers: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    found = {answer: re.search(rf"One of the special magic [^.]*? is: {re.escape(answer)}\.", context)
             for answer in answers}  # fmt: skip
    return tuple(sorted(match.span() for match in found.values() if match))


_KV = Prompt(
    "{context}\n\nExtract the value corresponding to the specified key in the JSON object below.\n\n"
    "{demos}Key: {question}\n",
    "helmet_json_kv", 100, "Corresponding value:",
)  # fmt: skip
_SHOTS = 2


def _helmet(task: str, row: Row, index: int) -> Iterator[Record]:
    if task == "json_kv":
        demos = "".join(f"Key: {key}\nCorresponding value: {value}\n\n" for key, value in row["demos"][:_SHOTS])
        fields = {"demos": demos, "question": row["question"]}
        yield _KV.record(task, index, row["context"], texts(row["answer"]), fields=fields)
        return
    if "input" in row:
        official = {"ruler_niah_mk_2": "niah_multikey_2", "ruler_niah_mk_3": "niah_multikey_3"}
        yield from _ruler(official.get(task, "niah_multivalue"), row, index)
        return
    several = task == "ruler_niah_mv"
    head, question, prefix = (
        ruler.singular(text, not several) for text in (ruler.NIAH_HEAD, ruler.NIAH_QUESTION, ruler.NIAH_PREFIX)
    )
    prompt = Prompt(head + "{context}\n" + question + "\n", "string_match_all", 50, prefix.strip())
    answers = texts(row["answer"] if "answer" in row else row["outputs"])
    fields = {"kind": row["type_needle_v"], "query": row["query"]}
    yield prompt.record(task, index, row["context"], answers, fields=fields)


_BABI = Prompt(
    "The following text hides facts about people, places and objects among other sentences. Answer the question at the "
    "end from these facts alone, in one short sentence. A person is where he or she went last; what somebody carries "
    "moves along.\n\n<context>\n{context}\n</context>\n\nQuestion: {question}\n",
    "babilong", 20, "Answer:",
)  # fmt: skip
_LABELS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), PLACES),
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    **dict.fromkeys(("qa6", "qa9"), ("yes", "no")),
    "qa7": ("none", "one", "two", "three"),
    "qa10": ("yes", "no", "maybe"),
}


def _babilong(task: str, row: Row, index: int) -> Iterator[Record]:
    asked = row["question"].lower()
    others = [label for label in _LABELS[task] if label.lower() not in asked and label != row["target"]]
    yield _BABI.record(task, index, row["input"], (row["target"], *others), fields={"question": row["question"]})


RULER = PublicSet(
    "ruler", "13 tasks, as RULER's scripts write them", "simonjegou/ruler",
    "make the files with https://github.com/NVIDIA/RULER (folder TASK/validation.jsonl)", _ruler, tuple(_RULER),
)  # fmt: skip
HELMET = PublicSet(
    "helmet", "the recall part: json_kv and three of RULER's", "princeton-nlp/HELMET",
    "get data.tar.gz from https://huggingface.co/datasets/princeton-nlp/HELMET and unpack it",
    _helmet, ("json_kv", "ruler_niah_mk_2", "ruler_niah_mk_3", "ruler_niah_mv"),
    files={"json_kv": "json_kv", "niah_multikey_2": "ruler_niah_mk_2", "niah_multikey_3": "ruler_niah_mk_3",
           "niah_multivalue": "ruler_niah_mv"},
)  # fmt: skip
BABILONG = PublicSet(
    "babilong", "bAbI in books: qa1 to qa7, qa9, qa10", "RMT-team/babilong-1k-samples",
    "get it from https://huggingface.co/datasets/RMT-team/babilong-1k-samples", _babilong, tuple(_LABELS),
)  # fmt: skip
