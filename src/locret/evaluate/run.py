"""Run a grid: every sample through every variant, batch by batch, so that what is done stays done.

Samples of one context length run together in batches whose make-up depends on the samples alone: a batch is run again
as a whole after a kill, so a resumed run computes what an uninterrupted one does, bit for bit. Processes share out
batches.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locret.backbone import Backbone, model_length
from locret.config import CacheConfig, Sampling, parse_budget
from locret.context import weights_digest
from locret.decode import full_cache_bytes
from locret.engine import LLM
from locret.errors import CapacityError, ConfigError, DataError, NumericsError
from locret.evaluate.grid import AS_IT_IS, Block, Grid, Stage, Variant, parse_method
from locret.evaluate.machine import leave_note
from locret.evaluate.measures import distances
from locret.evaluate.oracle import REFERENCES, Oracle, OracleGold, informed, reads_whole
from locret.evaluate.prompts import Prompt, name_of
from locret.evaluate.reads import Read, agnostic, aware
from locret.evaluate.samples import Samples
from locret.evaluate.session import Session
from locret.evaluate.source import Source
from locret.evaluate.store import Journal, Key, Line, claim, key_of, read_journals
from locret.heads import RetainingHeads
from locret.methods import Method
from locret.tasks.records import Record

Progress = Callable[[int, int], object]
_TROUBLE = (NumericsError, CapacityError, torch.OutOfMemoryError)
_MOST_REFERENCES = 2 << 30  # bytes of the full cache's logits that are kept for later parts of a grid


@dataclass
class Reference:
    """The full cache's logits for one sample: what the other variants are compared with."""

    asks: list[Tensor] = field(default_factory=list)  # [T, V] per question
    tail: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.asks, self.tail) if tensor is not None)


@dataclass(frozen=True)
class Expected:
    """What a complete run holds, and the lines that are there now."""

    keys: list[Key]
    lines: dict[Key, Line]

    @property
    def missing(self) -> int:
        return sum(key not in self.lines for key in self.keys)

    def ordered(self) -> list[Line]:
        """What is there, in the order of a complete run."""
        return [self.lines[key] for key in self.keys if key in self.lines]


@dataclass(frozen=True)
class Batch:
    """Samples that run together. `number`: of the batch in its block."""

    block: Block
    number: int
    members: list[tuple[int, Prompt]]


def check(grid: Grid, source: Source) -> None:
    """What can be said before a model is loaded. Raises: ConfigError."""
    grid.check_names(source.tasks(), source.groups())


def run(
    grid: Grid, backbone: Backbone, source: Source, folder: Path, *, heads: RetainingHeads | None = None,
    rank: int = 0, world: int = 1, samples: Path | None = None, deadline: float | None = None,
    on_progress: Progress | None = None,
) -> Expected:  # fmt: skip
    """Run what is missing of this process's share (every `world`-th batch) into `folder`.

    Args:
        samples: folder with files of samples (`locret.evaluate.samples`).
        deadline: begin nothing more after this `time.monotonic()`.
    Raises: ConfigError, DataError: before anything is computed, where it can be known then.
    """
    check(grid, source)
    runner = _Runner(grid, backbone, source, heads, samples)
    runner.check_budgets()
    runner.check_samples()
    claim(folder, {**grid.to_dict(), "weights": _weights(backbone, heads)})
    done = read_journals(folder)
    count, noted = len(done) // world, False
    with Journal(folder, rank) as journal:
        for lines, total in runner.share(rank, world, done, deadline):
            if not noted:
                leave_note(folder, rank, backbone)
                noted = True
            journal.write(lines)
            done.update({key_of(line): line for line in lines})
            count += len(lines)
            if on_progress is not None:
                on_progress(count, max(count, total))
    keys = [key for block in grid.blocks() for key in _keys(block, runner.count(block))]
    return Expected(keys, read_journals(folder))


def _weights(backbone: Backbone, heads: RetainingHeads | None) -> str:
    """A short hash, since names of models stay while their weights change; of bfloat16, so the same in any dtype."""
    parameters = [*backbone.model.parameters(), *(() if heads is None else heads.parameters())]
    return weights_digest(parameter.detach().to(torch.bfloat16) for parameter in parameters)


class _Runner:
    def __init__(
        self, grid: Grid, backbone: Backbone, source: Source, heads: RetainingHeads | None, folder: Path | None
    ) -> None:
        self.grid, self.backbone, self.source = grid, backbone, source
        self.samples = Samples(grid, source, backbone.need_tokenizer(), folder)
        self._heads = heads
        self._llms: dict[tuple[str, Any], LLM] = {}
        self._references: dict[tuple[Any, ...], list[Reference]] = {}
        self._counts: dict[tuple[Any, ...], int] = {}

    def llm(self, variant: Variant) -> LLM:
        key = (variant.method, variant.budget)
        if key not in self._llms:
            name, options = parse_method(variant.method)
            budget = {} if variant.budget is None else {"budget": variant.budget}
            config = CacheConfig.from_dict({**self.grid.cache, **budget})
            if name in REFERENCES:
                self._llms[key] = LLM(self.backbone, REFERENCES[name](), config)
            else:
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
                if reads_whole(llm.method) and block.length > longest:
                    raise ConfigError(
                        f"method {variant.method!r} {_why_whole(llm)}, and length {block.length} is more than the "
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
            public = block.length == AS_IT_IS
            for record in self.samples.records(block, block.samples) if public else [self.samples.first(block)]:
                for answers in (record.answers, *(turn.answers for turn in record.turns)):
                    if not answers:
                        raise DataError(f"{name_of(record)} has a question without an answer")
                    self.source.check(record.metric, answers)
                if not self.grid.query_aware and not record.question.strip():
                    raise ConfigError(
                        f"{name_of(record)} has no question apart from its context, so nothing about it is "
                        "query-agnostic; set query_aware = true (--query-aware)"
                    )
                spans = [*record.spans, *(span for turn in record.turns for span in turn.spans)]
                if public and not spans and any(variant.name == OracleGold.name for variant in block.variants):
                    raise ConfigError(
                        f"{name_of(record)} does not say where its gold facts lie, so there is no {OracleGold.name}; "
                        "give that task a [[part]] without it"
                    )

    def check_fits(self, block: Block, prompts: Sequence[Prompt]) -> None:
        """What keeps everything can read the longest sample."""
        longest = model_length(self.backbone.model)
        whole = [variant for variant in block.variants if reads_whole(self.llm(variant).method)]
        for prompt in prompts:
            need = len(prompt.context) + max(len(ask.first) for ask in prompt.asks) + prompt.record.max_new_tokens
            if whole and need > longest:
                raise ConfigError(
                    f"{name_of(prompt.record)} takes {need} tokens with its question and answer, and method "
                    f"{whole[0].method!r} {_why_whole(self.llm(whole[0]))}; this model reads {longest}. Set "
                    "max_context, or leave out that "
                    "method for this task"
                )

    def count(self, block: Block) -> int:
        """Samples of a block: what was asked for, or what there are, once they have been read."""
        return self._counts.get(block.key, block.samples)

    def share(
        self, rank: int, world: int, done: dict[Key, Line], deadline: float | None
    ) -> Iterator[tuple[list[Line], int]]:
        """Lines that are missing, a batch and variant at a time, and how many lines this process may have in all."""
        stages = list(self.grid.stages())
        last = {stage.block.key: at for at, stage in enumerate(stages)}
        numbers = {key: number for number, key in enumerate(last)}
        total = sum(len(_keys(block, block.samples)) for block in self.grid.blocks()) // world
        mine: dict[tuple[Any, ...], list[Batch]] = {}
        for at, stage in enumerate(stages):
            block = stage.block
            if any(key not in done for key in _keys(block, self.count(block), stage.variants)):
                if block.key not in mine and not _past(deadline):
                    batches = self._batches(block, done)
                    mine[block.key] = [b for b in batches if (numbers[block.key] + b.number) % world == rank]
                    self.check_fits(block, [prompt for batch in mine[block.key] for _, prompt in batch.members])
                for batch in mine.get(block.key, []):
                    for lines in self._missing(batch, stage, done, deadline, again=last[block.key] > at):
                        yield lines, total
            if last[block.key] == at:
                mine.pop(block.key, None)

    def _batches(self, block: Block, done: dict[Key, Line]) -> list[Batch]:
        """Samples that run together: of one length, and wanted by the same parts of the grid."""
        prompts = self.samples.prompts(block)
        self._counts[block.key] = len(prompts)
        _check_same(prompts, block, done)
        groups: dict[tuple[Any, ...], list[tuple[int, Prompt]]] = {}
        for i, prompt in enumerate(prompts):
            question = len(prompt.asks[0].first) if self.grid.query_aware else 0
            alone = i if self.grid.query_aware and len(prompt.asks) > 1 else None
            tier = sum(cut <= i for cut in block.cuts)
            key = (len(prompt.context), question, alone, tier, prompt.record.max_new_tokens)
            groups.setdefault(key, []).append((i, prompt))
        batches: list[Batch] = []
        for key, members in groups.items():
            parts = -(-len(members) // self.grid.rows(key[0]))
            edges = [len(members) * part // parts for part in range(parts + 1)]
            batches += [Batch(block, len(batches) + i, members[a:b]) for i, (a, b) in enumerate(pairwise(edges))]
        return batches

    def _missing(
        self, batch: Batch, stage: Stage, done: dict[Key, Line], deadline: float | None, *, again: bool
    ) -> Iterator[list[Line]]:
        """Lines of a batch that are missing. again: a later stage runs this batch too."""
        block, first = batch.block, batch.members[0][0]
        name = (*block.key, batch.number)
        references = self._references.pop(name, None)
        for variant in stage.variants:
            wanted = {i for i, _ in batch.members if _key(block, variant, i) not in done}
            if first >= variant.samples or not wanted:  # all of a batch are wanted by a stage, or none
                continue
            if _past(deadline):
                return
            keeps_all = not self.llm(variant).method.evicts
            if references is None and not keeps_all:
                references = self._reference(batch)
            try:
                cells = self._run_batch(variant, batch, references or [], answer=True)
            except _TROUBLE as error:  # one method's is not the others'
                warnings.warn(_trouble(block, variant, error), stacklevel=2)
                continue
            if references is None:
                references = [reference for _, reference in cells]
            yield [
                {"task": block.task, "length": block.length, "seed": block.seed, "index": i,
                 "method": variant.method, "budget": variant.budget, "sample": prompt.digest, **cell}
                for (i, prompt), (cell, _) in zip(batch.members, cells, strict=True) if i in wanted
            ]  # fmt: skip
        if again and references is not None:
            self._keep(name, references)

    def _reference(self, batch: Batch) -> list[Reference]:
        """The full cache's logits for a batch, or nothing if the grid has none for it."""
        for variant in batch.block.variants:
            if not self.llm(variant).method.evicts and batch.members[0][0] < variant.samples:
                return [reference for _, reference in self._run_batch(variant, batch, [], answer=False)]
        return []

    def _keep(self, name: tuple[Any, ...], references: list[Reference]) -> None:
        self._references[name] = references
        while sum(one.nbytes for kept in self._references.values() for one in kept) > _MOST_REFERENCES:
            del self._references[next(iter(self._references))]

    def _run_batch(
        self, variant: Variant, batch: Batch, references: list[Reference], *, answer: bool
    ) -> list[tuple[Line, Reference]]:
        """A line and the logits for every prompt; `answer` False: only the logits."""
        llm, prompts = self.llm(variant), [prompt for _, prompt in batch.members]
        sampling = self._sampling(prompts[0].record)
        if self.grid.query_aware:
            reads = aware(llm, prompts, sampling, answer=answer)
        else:
            reads = agnostic(llm, prompts, sampling, answer=answer, conversation=self.grid.turns == "conversation")
        tails = self._tails(llm, prompts)
        own = [Reference(read.logits, tail) for read, tail in zip(reads, tails, strict=True)]
        if not answer:
            return [({}, one) for one in own]
        full = references or (own if not llm.method.evicts else [])
        measured = self._measured(prompts, own, full)
        return [
            (self._line(prompt, read, turns, tail, llm.method), one)
            for prompt, read, (turns, tail), one in zip(prompts, reads, measured, own, strict=True)
        ]

    def _measured(
        self, prompts: list[Prompt], own: list[Reference], full: list[Reference]
    ) -> list[tuple[list[Line], Line | None]]:
        """For every prompt, the distances of each turn and of the tail."""
        turns = _distances(
            [logits for one in own for logits in one.asks],
            [ask.target for prompt in prompts for ask in prompt.asks],
            [logits for one in full for logits in one.asks],
        )
        tails: list[Line] = []
        if own[0].tail is not None:
            texts = [prompt.context[-self.grid.tail_tokens :].tolist() for prompt in prompts]
            tails = _distances(_known(one.tail for one in own), texts, _known(one.tail for one in full))
        left = iter(turns)
        return [([next(left) for _ in prompt.asks], tails[i] if tails else None) for i, prompt in enumerate(prompts)]

    def _sampling(self, record: Record) -> Sampling:
        stop = self.source.facts(record.task).stop
        return Sampling(max_new_tokens=record.max_new_tokens, stop=(stop,) if stop else ())

    def _line(self, prompt: Prompt, read: Read, measured: list[Line], tail: Line | None, method: Method) -> Line:
        record = prompt.record
        scores = [
            self.source.score(record.metric, given.text, ask.answers)
            for given, ask in zip(read.answers, prompt.asks, strict=True)
        ]
        turns = [
            {"prediction": given.text, "score": _short(score), "tokens": given.tokens, **found}
            for given, score, found in zip(read.answers, scores, measured, strict=True)
        ]
        line: Line = {
            "score": _short(sum(scores) / len(scores)), "turns": turns, "prompt_tokens": read.tokens,
            "units": read.units, "kv_bytes": read.kv_bytes, "peak_kv_bytes": read.peak_kv_bytes,
            "kv_bytes_full": full_cache_bytes(self.backbone, read.tokens),
        }  # fmt: skip
        depths = record.meta.get("depths", [])
        if len(depths) == 1:
            line["depth"] = depths[0]
        if self.source.corpus_score(record.metric, [""], [record.answers]) is not None:
            line["metric"], line["answers"] = record.metric, [list(ask.answers) for ask in prompt.asks]
        if isinstance(record.meta.get("words"), int):
            line["words"] = record.meta["words"]
        facts = self.source.facts(record.task)
        unknowing = method.evicts and not isinstance(method, Oracle) and not self.grid.query_aware
        if facts.dense and facts.ceiling is not None and unknowing:
            line["ceiling"] = _short(facts.ceiling(record, read.units))
        if prompt.gold:
            line["gold"] = len(prompt.gold)
            line["kept"] = read.kept
        if tail is not None:
            line["tail"] = tail
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
        session = Session.compress(informed(llm, prompts), [prompt.context[:-tail] for prompt in prompts])
        return [*session.follow([[] for _ in prompts], [prompt.context[-tail:].tolist() for prompt in prompts])]


def _distances(logits: list[Tensor], texts: list[list[int]], full: list[Tensor]) -> list[Line]:
    found = distances(logits, texts, full or None)
    return [{name: None if value is None else _short(value) for name, value in vars(one).items()} for one in found]


def _known(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _short(value: float) -> float:
    return round(float(value), 6)


def _why_whole(llm: LLM) -> str:
    return "looks at all of it at once" if llm.method.evicts else "keeps everything"


def _trouble(block: Block, variant: Variant, error: Exception) -> str:
    what = f"{variant.method} {variant.budget or ''} on {block.task} at {block.length}".replace("  ", " ")
    if isinstance(error, NumericsError):
        return f"left out {what}: {error}"
    return f"left out {what}: no memory for the batch ({error}); set a smaller batch_size or batch_tokens"


def _past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _key(block: Block, variant: Variant, index: int) -> Key:
    return (block.task, block.length, block.seed, index, variant.method, variant.budget)


def _keys(block: Block, count: int, variants: Sequence[Variant] | None = None) -> list[Key]:
    """What `count` samples of a block give in the end (or under some variants), in order."""
    chosen = block.variants if variants is None else variants
    return [_key(block, v, i) for i in range(count) for v in chosen if i < v.samples]


def _check_same(prompts: Sequence[Prompt], block: Block, done: dict[Key, Line]) -> None:
    """Samples that were done already are the samples of now."""
    for i, prompt in enumerate(prompts):
        for variant in block.variants:
            line = done.get(_key(block, variant, i))
            if line is not None and line["sample"] != prompt.digest:
                raise ConfigError(
                    f"{name_of(prompt.record)} is another text than when this run was begun (the task or its files "
                    "have changed); give another --output"
                )
