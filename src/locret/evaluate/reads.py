"""A batch of samples under one variant: contexts read, gold facts counted, questions answered, right answers followed.

Query-agnostic: one compression for all questions of a context. Query-aware: one for every question.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from locret.config import Sampling
from locret.engine import LLM
from locret.evaluate.oracle import informed
from locret.evaluate.prompts import Prompt
from locret.evaluate.session import Answer, Session

Kept = list[list[int]]


@dataclass(frozen=True)
class Read:
    """One sample under one variant. Bytes and units are those of the context that the first question met."""

    answers: list[Answer]
    logits: list[Tensor]  # that predict each question's target, [T, V]
    kept: Kept  # gold tokens held, per layer and KV head; empty without any
    tokens: int
    units: int
    kv_bytes: int
    peak_kv_bytes: int


def agnostic(llm: LLM, prompts: list[Prompt], sampling: Sampling, *, answer: bool, conversation: bool) -> list[Read]:
    """Args: prompts: contexts of one length;  answer: False: only the logits;  conversation: see `Grid.turns`."""
    session = Session.compress(informed(llm, prompts), [prompt.context for prompt in prompts])
    kept = _kept(session, prompts)
    answers: list[list[Answer]] = [[] for _ in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    turns = max(len(prompt.asks) for prompt in prompts)
    for turn in range(turns):
        asking = [i for i, prompt in enumerate(prompts) if turn < len(prompt.asks)]
        for rows in _groups(asking, [(len(prompts[i].asks[turn].first), _chats(prompts[i])) for i in asking]):
            asks = [prompts[i].asks[turn] for i in rows]
            whole = len(rows) == len(prompts)
            part = session if whole else session.rows(rows)
            if answer and not (conversation and _chats(prompts[rows[0]])):
                for i, one in zip(rows, part.ask([ask.first for ask in asks], sampling), strict=True):
                    answers[i].append(one)
            if whole and (turn + 1 < turns or conversation):
                part = session.rows(rows)  # following spends a session, and this one is asked again
            found = part.follow([ask.first for ask in asks], [ask.target for ask in asks])
            for i, predicted in zip(rows, found, strict=True):
                logits[i].append(predicted)
    if answer and conversation:
        for i, prompt in enumerate(prompts):
            if _chats(prompt):
                answers[i] = session.rows([i]).chat([(ask.first, ask.later) for ask in prompt.asks], sampling)
    return [
        Read(answers[i], logits[i], kept[i], len(prompt.context), session.units, session.kv_bytes,
             session.peak_kv_bytes)
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip


def aware(llm: LLM, prompts: list[Prompt], sampling: Sampling, *, answer: bool) -> list[Read]:
    """Args: prompts: contexts of one length and questions of one length; several prompts: one question each."""
    reads: list[Read] = []
    answers: list[list[Answer]] = [[] for _ in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    for turn in range(len(prompts[0].asks)):
        asks = [prompt.asks[turn] for prompt in prompts]
        texts = [
            np.concatenate((prompt.context, np.array(ask.first, dtype=np.int32)))
            for prompt, ask in zip(prompts, asks, strict=True)
        ]
        session = Session.read(informed(llm, prompts, turn), texts, sampling)
        if not turn:
            kept = _kept(session, prompts)
            reads = [
                Read(answers[i], logits[i], kept[i], len(texts[i]), session.units, session.kv_bytes,
                     session.peak_kv_bytes)
                for i in range(len(prompts))
            ]  # fmt: skip
        rows = list(range(len(prompts)))
        for i, one in enumerate(session.rows(rows).follow([[] for _ in asks], [ask.target for ask in asks])):
            logits[i].append(one)
        if answer:
            for i, given in enumerate(session.answer(sampling)):
                answers[i].append(given)
    return reads


def _kept(session: Session, prompts: list[Prompt]) -> list[Kept]:
    if not any(prompt.gold for prompt in prompts):
        return [[] for _ in prompts]
    kept = session.gold_kept([prompt.gold for prompt in prompts])
    return [one if prompt.gold else [] for one, prompt in zip(kept, prompts, strict=True)]


def _chats(prompt: Prompt) -> bool:
    return len(prompt.asks) > 1


def _groups(items: Sequence[int], keys: Sequence[Hashable]) -> Iterable[list[int]]:
    """Items with the same key."""
    groups: dict[Hashable, list[int]] = {}
    for item, key in zip(items, keys, strict=True):
        groups.setdefault(key, []).append(item)
    return groups.values()
