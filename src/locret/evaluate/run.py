"""Run a grid: every sample through every variant, sample by sample, so that what is done stays done.

Samples of one context length run together in groups whose make-up depends on the samples alone: a group is run again as
a whole after a kill, so a resumed run computes what an uninterrupted one does, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locret.backbone import Backbone, model_length
from locret.config import CacheConfig, Sampling, parse_budget
from locret.decode import full_cache_bytes
from locret.engine import LLM
from locret.errors import ConfigError, DataError
from locret.evaluate.grid import AS_IT_IS, Block, Grid, Variant, parse_method
from locret.evaluate.measures import Distance, distance
from locret.evaluate.prompts import Encoder, Prompt, name_of
from locret.evaluate.session import Answer, Session
from locret.evaluate.source import Request, Source
from locret.evaluate.store import Journal, Key, Line, claim, key_of, read_journals
from locret.heads import RetainingHeads
from locret.tasks.records import Record

Progress = Callable[[int, int], object]


@dataclass
class Reference:
    """The full cache's logits for one sample: what the other variants are compared with."""

    asks: list[Tensor] = field(default_factory=list)  # [T, V] per question
    tail: Tensor | None = None


@dataclass(frozen=True)
class Expected:
    """What a complete run holds, and the lines that are there now."""

    keys: list[Key]
    lines: dict[Key, Line]

    @property
    def missing(self) -> int:
        return sum(key not in self.lines for key in self.keys)

    def ordered(self) -> list[Line]:
        return [self.lines[key] for key in self.keys]


def check(grid: Grid, source: Source) -> None:
    """What can be said before a model is loaded. Raises: ConfigError."""
    grid.check_names(source.tasks())


def run(
    grid: Grid, backbone: Backbone, source: Source, folder: Path, *, heads: RetainingHeads | None = None,
    rank: int = 0, world: int = 1, on_progress: Progress | None = None,
) -> Expected:  # fmt: skip
    """Run what is missing of this process's share (samples i with i % world == rank) into `folder`.

    Raises: ConfigError, DataError: before anything is computed, where it can be known then.
    """
    check(grid, source)
    runner = _Runner(grid, backbone, source, heads)
    runner.check_budgets()
    runner.check_samples()
    claim(folder, grid.to_dict())
    done = read_journals(folder)
    shares = [len(range(rank, v.samples, world)) for block in grid.blocks() for v in block.variants]
    counted, keys = 0, list[Key]()
    with Journal(folder, rank) as journal:
        for block in grid.blocks():
            wanted = _keys(block, block.samples)
            if any(key not in done for key in wanted):
                records = runner.records(block)
                wanted = _keys(block, len(records))
                prompts = {i: runner.encoder.prompt(r) for i, r in enumerate(records) if i % world == rank}
                _check_same(prompts, block, done)
                runner.check_fits(block, list(prompts.values()))
                before = counted + sum(key in done for key in wanted if key[3] % world == rank)
                for lines in runner.lines(block, prompts, done):
                    journal.write(lines)
                    done.update({key_of(line): line for line in lines})
                    before += len(lines)
                    if on_progress is not None:
                        on_progress(before, sum(shares))
            counted += sum(key[3] % world == rank for key in wanted)
            keys += wanted
    return Expected(keys, read_journals(folder))


class _Runner:
    def __init__(self, grid: Grid, backbone: Backbone, source: Source, heads: RetainingHeads | None) -> None:
        self.grid, self.backbone, self.source = grid, backbone, source
        self.encoder = Encoder(backbone.need_tokenizer(), max_context=grid.max_context)
        self._heads = heads
        self._llms: dict[tuple[str, Any], LLM] = {}

    def llm(self, variant: Variant) -> LLM:
        key = (variant.method, variant.budget)
        if key not in self._llms:
            name, options = parse_method(variant.method)
            budget = {} if variant.budget is None else {"budget": variant.budget}
            config = CacheConfig.from_dict({**self.grid.cache, **budget})
            self._llms[key] = LLM.build(
                self.backbone, heads=self._heads, method=name, method_options=options, config=config
            )
        return self._llms[key]

    def check_budgets(self) -> None:
        """Methods, heads and budgets work, and what keeps everything fits the model."""
        longest = model_length(self.backbone.model)
        for block in self.grid.blocks():
            for variant in block.variants:
                llm = self.llm(variant)
                if not llm.method.evicts and block.length > longest:
                    raise ConfigError(
                        f"method {variant.method!r} keeps everything, and length {block.length} is more than the "
                        f"{longest} tokens that this model reads; leave the length out, or give that length a "
                        "[[part]] without this method"
                    )
                known = block.length != AS_IT_IS and parse_budget(llm.config.budget)[1] != "bytes"
                if llm.method.evicts and known:
                    llm.method.check(llm.config.resolve(prompt_len=block.length, unit_bytes=1))

    def check_samples(self) -> None:
        """The first sample of every task and length can be had and scored; public sets are read whole."""
        seen: set[tuple[str, int]] = set()
        for block in self.grid.blocks():
            if (block.task, block.length) in seen:
                continue
            seen.add((block.task, block.length))
            records = self.records(block, count=None if block.length == AS_IT_IS else 1)
            for record in records[:1] if block.length != AS_IT_IS else records:
                for answers in (record.answers, *(turn.answers for turn in record.turns)):
                    if not answers:
                        raise DataError(f"{name_of(record)} has a question without an answer")
                    self.source.check(record.metric, answers)
                if not self.grid.query_aware and not record.question.strip():
                    raise ConfigError(
                        f"{name_of(record)} has no question apart from its context, so nothing about it is "
                        "query-agnostic; set query_aware = true (--query-aware)"
                    )

    def records(self, block: Block, count: int | None = None) -> list[Record]:
        request = Request(
            task=block.task, length=block.length, seed=block.seed, count=count or block.samples, mode=self.grid.mode,
            tokenizer=self.backbone.tokenizer, answer_prefix=bool(self.grid.answer_prefix), text=self.grid.text,
            public=self.grid.public.get(block.task),
        )  # fmt: skip
        records = list(itertools.islice(self.source.records(request), request.count))
        if not records:
            raise DataError(f"task {block.task!r} has no samples")
        return records

    def check_fits(self, block: Block, prompts: Sequence[Prompt]) -> None:
        """What keeps everything can read the longest sample."""
        longest = model_length(self.backbone.model)
        keeps = [variant.method for variant in block.variants if not self.llm(variant).method.evicts]
        for prompt in prompts:
            need = len(prompt.context) + max(len(ask.first) for ask in prompt.asks) + prompt.record.max_new_tokens
            if keeps and need > longest:
                raise ConfigError(
                    f"{name_of(prompt.record)} takes {need} tokens with its question and answer, and method "
                    f"{keeps[0]!r} keeps everything; this model reads {longest}. Set max_context, or leave out that "
                    "method for this task"
                )

    def lines(self, block: Block, prompts: dict[int, Prompt], done: dict[Key, Line]) -> Iterator[list[Line]]:
        """Lines that are missing, a group and variant at a time."""
        for group in self._groups(block, prompts):
            references: list[Reference] = []
            for variant in block.variants:
                members = [(i, p) for i, p in group if i < variant.samples]  # all of the group or none of it
                wanted = {i for i, _ in members if _key(block, variant, i) not in done}
                keeps_all = not self.llm(variant).method.evicts
                others = any(_key(block, v, i) not in done for v in block.variants for i, _ in members if i < v.samples)
                if not members or (not wanted and not (keeps_all and others and not references)):
                    continue
                cells = self._run_group(variant, [p for _, p in members], references, answer=bool(wanted))
                if keeps_all and not references:
                    references = [reference for _, reference in cells]
                    if not wanted:
                        continue
                yield [
                    {"task": block.task, "length": block.length, "seed": block.seed, "index": i,
                     "method": variant.method, "budget": variant.budget, "sample": prompt.digest, **cell}
                    for (i, prompt), (cell, _) in zip(members, cells, strict=True) if i in wanted
                ]  # fmt: skip

    def _groups(self, block: Block, prompts: dict[int, Prompt]) -> Iterator[list[tuple[int, Prompt]]]:
        """Samples that run together: of one length, and wanted by the same variants."""
        groups: dict[tuple[Any, ...], list[tuple[int, Prompt]]] = {}
        for i, prompt in prompts.items():
            question = len(prompt.asks[0].first) if self.grid.query_aware else 0
            alone = i if self.grid.query_aware and len(prompt.asks) > 1 else None
            tiers = tuple(i < variant.samples for variant in block.variants)
            key = (len(prompt.context), question, alone, tiers, prompt.record.max_new_tokens)
            groups.setdefault(key, []).append((i, prompt))
        for members in groups.values():
            for start in range(0, len(members), self.grid.batch_size):
                yield members[start : start + self.grid.batch_size]

    def _run_group(
        self, variant: Variant, prompts: list[Prompt], references: list[Reference], *, answer: bool
    ) -> list[tuple[Line, Reference]]:
        """A line and the logits for every prompt; `answer` False: only the logits."""
        llm = self.llm(variant)
        sampling = self._sampling(prompts[0].record)
        if self.grid.query_aware:
            reads = _aware(llm, prompts, sampling, answer=answer)
        else:
            reads = _agnostic(llm, prompts, sampling, answer=answer, conversation=self.grid.turns == "conversation")
        tails = self._tails(llm, prompts)
        cells = []
        for i, (prompt, read) in enumerate(zip(prompts, reads, strict=True)):
            full = references[i] if i < len(references) else None
            own = Reference(read.logits, tails[i])
            if full is None and not llm.method.evicts:
                full = own
            cells.append((self._line(prompt, read, own, full, evicts=llm.method.evicts) if answer else {}, own))
        return cells

    def _sampling(self, record: Record) -> Sampling:
        stop = self.source.facts(record.task).stop
        return Sampling(max_new_tokens=record.max_new_tokens, stop=(stop,) if stop else ())

    def _line(self, prompt: Prompt, read: _Read, own: Reference, full: Reference | None, *, evicts: bool) -> Line:
        record = prompt.record
        scores = [
            self.source.score(record.metric, given.text, ask.answers)
            for given, ask in zip(read.answers, prompt.asks, strict=True)
        ]
        turns = [
            {"prediction": given.text, "score": _short(score), "tokens": given.tokens,
             **_distance(own.asks[k], ask.target, full.asks[k] if full else None)}
            for k, (given, score, ask) in enumerate(zip(read.answers, scores, prompt.asks, strict=True))
        ]  # fmt: skip
        line: Line = {
            "score": _short(sum(scores) / len(scores)), "turns": turns, "prompt_tokens": read.tokens,
            "units": read.units, "kv_bytes": read.kv_bytes, "peak_kv_bytes": read.peak_kv_bytes,
            "kv_bytes_full": full_cache_bytes(self.backbone, read.tokens),
        }  # fmt: skip
        depths = record.meta.get("depths", [])
        if len(depths) == 1:
            line["depth"] = depths[0]
        facts = self.source.facts(record.task)
        if facts.dense and facts.ceiling is not None and evicts and not self.grid.query_aware:
            line["ceiling"] = _short(facts.ceiling(record, read.units))
        if prompt.gold:
            line["gold"] = len(prompt.gold)
            line["kept"] = read.kept
        if own.tail is not None:
            text = prompt.context[-self.grid.tail_tokens :].tolist()
            line["tail"] = _distance(own.tail, text, full.tail if full else None)
        given = read.answers
        paces = [one.tpot for one in given if one.tpot is not None]
        tpot = sum(paces) / len(paces) if paces else None
        line["seconds"] = {"ttft": given[0].ttft, "tpot": tpot}
        return line

    @torch.inference_mode()
    def _tails(self, llm: LLM, prompts: list[Prompt]) -> list[Tensor | None]:
        """Logits for the context's last tokens behind the compressed rest; none for contexts that are too short."""
        tail = self.grid.tail_tokens
        if not tail or len(prompts[0].context) < 2 * tail:
            return [None] * len(prompts)
        session = Session.compress(llm, [prompt.context[:-tail] for prompt in prompts])
        return [session.rows([i]).follow([], prompt.context[-tail:].tolist()) for i, prompt in enumerate(prompts)]


@dataclass(frozen=True)
class _Read:
    """One sample under one variant. Bytes and units are those of the context that the first question met."""

    answers: list[Answer]
    logits: list[Tensor]  # that predict each question's target, [T, V]
    kept: list[list[int]]  # gold tokens held, per layer and KV head; empty without any
    tokens: int
    units: int
    kv_bytes: int
    peak_kv_bytes: int


def _agnostic(llm: LLM, prompts: list[Prompt], sampling: Sampling, *, answer: bool, conversation: bool) -> list[_Read]:
    """One compression for all questions of a context."""
    session = Session.compress(llm, [prompt.context for prompt in prompts])
    kept = [session.gold_kept(i, prompt.gold) if prompt.gold else [] for i, prompt in enumerate(prompts)]
    answers: list[list[Answer]] = [[] for _ in prompts]
    if answer:
        for rows in _by_length([len(prompt.asks[0].first) if len(prompt.asks) == 1 else -i - 1
                                for i, prompt in enumerate(prompts)]):  # fmt: skip
            first = prompts[rows[0]]
            part = session if len(rows) == len(prompts) else session.rows(rows)
            if len(first.asks) > 1 and conversation:
                answers[rows[0]] = part.chat([(ask.first, ask.later) for ask in first.asks], sampling)
            elif len(first.asks) > 1:
                answers[rows[0]] = [part.ask([ask.first], sampling)[0] for ask in first.asks]
            else:
                given = part.ask([prompts[i].asks[0].first for i in rows], sampling)
                for i, one in zip(rows, given, strict=True):
                    answers[i] = [one]
    return [
        _Read(answers[i], [session.rows([i]).follow(ask.first, ask.target) for ask in prompt.asks], kept[i],
              len(prompt.context), session.units, session.kv_bytes, session.peak_kv_bytes)
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip


def _aware(llm: LLM, prompts: list[Prompt], sampling: Sampling, *, answer: bool) -> list[_Read]:
    """A compression of its own for every question; a group of more than one has one question each."""
    reads: list[_Read] = []
    asked: list[tuple[list[Answer], list[Tensor]]] = [([], []) for _ in prompts]
    for k in range(len(prompts[0].asks)):
        texts = [np.concatenate((p.context, np.array(p.asks[k].first, dtype=np.int32))) for p in prompts]
        session = Session.read(llm, texts, sampling)
        if k == 0:
            kept = [session.gold_kept(i, prompt.gold) if prompt.gold else [] for i, prompt in enumerate(prompts)]
            reads = [
                _Read([], [], kept[i], len(texts[i]), session.units, session.kv_bytes, session.peak_kv_bytes)
                for i in range(len(prompts))
            ]
        for i, prompt in enumerate(prompts):
            asked[i][1].append(session.rows([i]).follow([], prompt.asks[k].target))
        if answer:
            for i, one in enumerate(session.answer(sampling)):
                asked[i][0].append(one)
    return [
        _Read(*asked[i], read.kept, read.tokens, read.units, read.kv_bytes, read.peak_kv_bytes)
        for i, read in enumerate(reads)
    ]


def _by_length(lengths: Sequence[int]) -> Iterable[list[int]]:
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(length, []).append(i)
    return groups.values()


def _distance(logits: Tensor, text: list[int], full: Tensor | None) -> dict[str, Any]:
    found: Distance = distance(logits, torch.tensor(text), full)
    return {name: None if value is None else _short(value) for name, value in vars(found).items()}


def _short(value: float) -> float:
    return round(float(value), 6)


def _key(block: Block, variant: Variant, index: int) -> Key:
    return (block.task, block.length, block.seed, index, variant.method, variant.budget)


def _keys(block: Block, count: int) -> list[Key]:
    """What a complete block of `count` samples holds, in order."""
    return [_key(block, v, i) for i in range(count) for v in block.variants if i < v.samples]


def _check_same(prompts: dict[int, Prompt], block: Block, done: dict[Key, Line]) -> None:
    """Samples that were done already are the samples of now."""
    for i, prompt in prompts.items():
        for variant in block.variants:
            line = done.get(_key(block, variant, i))
            if line is not None and line["sample"] != prompt.digest:
                raise ConfigError(
                    f"{name_of(prompt.record)} is another text than when this run was begun (the task or its files "
                    "have changed); give another --output"
                )
