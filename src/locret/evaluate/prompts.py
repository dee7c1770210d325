"""A record as token ids: the context, the pieces that come behind it, the expected answers, where the gold lies."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locret import chat
from locret.errors import DataError
from locret.tasks.records import Record, Turn


@dataclass(frozen=True)
class Ask:
    """One question about a context.

    Attributes:
        first: ids from the end of the context to where the model writes.
        later: the same behind an answer, for questions that follow others.
        target: ids of the first of the right answers, for teacher forcing.
    """

    first: list[int]
    later: list[int]
    target: list[int]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """One record, ready to run.

    Attributes:
        context: ids of the template's beginning and the context.
        gold: indices into `context` of the tokens that touch a gold span, ascending.
        digest: of the record's texts: samples with one digest are the same sample.
    """

    record: Record
    context: NDArray[np.int32]
    asks: list[Ask]
    gold: list[int]
    digest: str


class Encoder:
    """Makes prompts with one tokenizer and its chat template."""

    def __init__(self, tokenizer: Any, *, max_context: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._max_context = max_context
        self._turns = chat.Turns.of(tokenizer)
        self._lead = _answer_lead(tokenizer, self._turns)

    def prompt(self, record: Record) -> Prompt:
        """Template, context, question, template, answer prefix, with nothing between: blanks belong to the texts.

        Context and question are encoded apart, so that both query modes read the same tokens.
        """
        begin = self._turns.begin
        if not record.context.strip():
            raise DataError(f"{name_of(record)} has an empty context")
        ids = chat.encode(self._tokenizer, begin + record.context)
        gold = self._gold(begin, record)
        limit = self._max_context
        if limit is not None and len(ids) > limit:
            head, tail = limit - limit // 2, limit // 2
            cut = len(ids) - limit
            ids = ids[:head] + ids[len(ids) - tail :]
            gold = [at if at < head else at - cut for at in gold if at < head or at >= head + cut]
        own = Turn(record.question, record.answers, record.answer_prefix)
        asks = [self._ask(turn) for turn in (own, *record.turns)]
        return Prompt(record, np.array(ids, dtype=np.int32), asks, gold, digest(record))

    def _ask(self, turn: Turn) -> Ask:
        prefix = turn.answer_prefix
        behind = self._turns.end + prefix
        joint = " " if prefix and not prefix[-1].isspace() else ""
        return Ask(
            first=chat.encode(self._tokenizer, turn.question + behind),
            later=chat.encode(self._tokenizer, self._turns.again + turn.question + behind),
            target=chat.encode(self._tokenizer, (joint if prefix else self._lead) + turn.answers[0]),
            answers=turn.answers,
        )

    def _gold(self, begin: str, record: Record) -> list[int]:
        spans = [*record.spans, *(span for turn in record.turns for span in turn.spans)]
        if not spans or not self._tokenizer.is_fast:
            return []
        text = begin + record.context
        marked = np.zeros(len(text) + 1, dtype=np.int64)
        for start, stop in spans:
            marked[len(begin) + start : len(begin) + stop] = 1
        before = np.concatenate(([0], marked.cumsum()))  # marked characters before each character
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        return [i for i, (start, stop) in enumerate(offsets) if before[stop] > before[start]]


def name_of(record: Record) -> str:
    return f"sample {record.index} of task {record.task!r}"


def digest(record: Record) -> str:
    """A short hash of everything that the model sees and is judged by."""
    parts = [record.context, record.question, record.answer_prefix, record.metric, *record.answers]
    for turn in record.turns:
        parts += [turn.question, turn.answer_prefix, *turn.answers]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _answer_lead(tokenizer: Any, turns: chat.Turns) -> str:
    """White space that the template puts before what the assistant says, if that is all there is."""
    if not turns.templated:
        return ""
    user, answer = "\u241eA\u241e", "\u241eB\u241e"
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    before = text.partition(user)[2].partition(answer)[0]
    lead = before.removeprefix(turns.end)
    return lead if lead != before and not lead.strip() else ""
