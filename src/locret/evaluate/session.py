"""A batch of contexts of equal length, read once and asked: `LLM.compress` and `Context.ask` for several rows at once.

Shapes: B rows, T prompt tokens, V vocabulary, Hkv KV heads, S kept units.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from locret.config import Sampling
from locret.decode import Decoder, Output
from locret.engine import LLM
from locret.evaluate.measures import gold_kept
from locret.prefill import Reader


@dataclass(frozen=True)
class Answer:
    """Text and cost of one answer.

    Attributes:
        ttft: seconds from the context's first token to the answer's, the whole batch's.
        tpot: seconds for each further token; None for an answer of one.
    """

    text: str
    tokens: int
    ttft: float
    tpot: float | None


class Session:
    """Contexts that were read together; each row is what it is alone."""

    def __init__(self, llm: LLM, reader: Reader, seconds: float, logits: Tensor) -> None:
        self.llm, self._reader, self.seconds, self._logits = llm, reader, seconds, logits
        cache = reader.cache
        self.kv_bytes = cache.nbytes // cache.batch  # a sequence, as allocated, before any question
        self.peak_kv_bytes = cache.peak_bytes // cache.batch
        self.units = cache.held

    @classmethod
    @torch.inference_mode()
    def compress(cls, llm: LLM, contexts: Sequence[NDArray[np.int32]]) -> Session:
        """Query-agnostic: what follows is not known yet. contexts: ids of equal length."""
        started = time.perf_counter()
        ids = _tensor(contexts, llm)
        reader = Reader.start(llm.backbone, llm.method, llm.config, batch=len(contexts), prompt_len=ids.shape[1])
        logits = reader.read(ids, local_window=0)
        return cls(llm, reader, time.perf_counter() - started, logits)

    @classmethod
    @torch.inference_mode()
    def read(cls, llm: LLM, prompts: Sequence[NDArray[np.int32]], sampling: Sampling) -> Session:
        """Query-aware: whole prompts, as `LLM.generate` reads them."""
        started = time.perf_counter()
        ids = _tensor(prompts, llm)
        reader = Reader.start(
            llm.backbone,
            llm.method,
            llm.config,
            batch=len(prompts),
            prompt_len=ids.shape[1],
            new_tokens=sampling.max_new_tokens,
        )
        return cls(llm, reader, 0.0, reader.read(ids))._timed(started)

    def rows(self, indices: Sequence[int]) -> Session:
        """A copy of some rows."""
        at = torch.tensor(indices, device=self.llm.backbone.device)
        last = self._reader.last_logits
        reader = replace(
            self._reader, cache=self._reader.cache.rows(at), last_logits=None if last is None else last[at]
        )
        return Session(self.llm, reader, self.seconds, self._logits[at])

    def gold_kept(self, golds: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """How many of its gold context tokens each row still holds: per row, per budgeted layer, per KV head."""
        marked = np.zeros((len(golds), self._reader.cache.seen), dtype=bool)
        for row, gold in enumerate(golds):
            marked[row, np.asarray(gold, dtype=np.int64)] = True
        there = torch.from_numpy(marked).to(self.llm.backbone.device)
        layers = [layer.positions() for layer in self._reader.cache.layers if layer.window is None]
        return torch.stack([gold_kept(positions, there) for positions in layers], dim=1).tolist()

    def ask(self, questions: Sequence[list[int]], sampling: Sampling) -> list[Answer]:
        """Answer one question a row, all of one length, on a copy: the contexts stay as they are."""
        return self._answer(self._reader.copy(), questions, sampling)[0]

    def answer(self, sampling: Sampling) -> list[Answer]:
        """Go on behind what was read (`Session.read`); the session is spent."""
        return self._answer(self._reader, None, sampling)[0]

    def chat(self, turns: Sequence[tuple[list[int], list[int]]], sampling: Sampling) -> list[Answer]:
        """Answer questions one after the other on a copy of a session of one row; each sees the ones before it.

        turns: for each question its ids behind the context and its ids behind an answer.
        """
        reader, answers = self._reader.copy(), list[Answer]()
        pending: list[int] = []
        for i, (first, later) in enumerate(turns):
            ids = [*pending, *later] if i else first
            [answer], decoder = self._answer(reader, [ids], sampling)
            pending = [] if decoder.pending[0] is None else [decoder.pending[0]]
            answers.append(answer)
        return answers

    @torch.inference_mode()
    def follow(self, questions: Sequence[list[int]], texts: Sequence[list[int]]) -> list[Tensor]:
        """Logits that predict every token of each row's text behind its question, [T, V] a row. The session is spent.

        questions: of one length; texts: of any: shorter ones are padded behind their ends, where no token looks.
        """
        reader, device = self._reader, self.llm.backbone.device
        logits = self._logits
        if questions[0]:
            logits = self._read_question(reader, torch.tensor(list(questions), device=device))
        longest = max(map(len, texts))
        together = logits[:, None]
        if longest > 1:
            padded = [[*text, *text[-1:] * (longest - len(text))][:-1] for text in texts]
            together = torch.cat((together, reader.follow(torch.tensor(padded, device=device))), dim=1)
        return [together[row, : len(text)] for row, text in enumerate(texts)]

    def _timed(self, started: float) -> Session:
        self.seconds = time.perf_counter() - started
        return self

    def _answer(
        self, reader: Reader, questions: Sequence[list[int]] | None, sampling: Sampling
    ) -> tuple[list[Answer], Decoder]:
        device = self.llm.backbone.device
        ids = torch.tensor(questions or [[]] * reader.cache.batch, dtype=torch.int64, device=device)

        def prefill() -> Tensor:
            return self._logits if questions is None else self._read_question(reader, ids)

        decoder = Decoder(reader, prefill, ids, sampling, strip_start=True)
        for _ in decoder.pieces():
            pass
        return [self._cost(output) for output in decoder.outputs()], decoder

    def _read_question(self, reader: Reader, ids: Tensor) -> Tensor:
        """As `Context.ask`: a question that is not long for the budget stays whole while it is answered."""
        plan, count = reader.plan, ids.shape[1]
        fits = plan.budget is None or (count <= plan.budget // 4 and plan.num_sinks + count <= plan.budget)
        return reader.read(ids, local_window=count if fits else None)

    def _cost(self, output: Output) -> Answer:
        stats = output.stats
        further = stats.new_tokens - 1
        tpot = stats.decode_seconds / further if further > 0 else None
        return Answer(output.text, stats.new_tokens, self.seconds + stats.prefill_seconds, tpot)


def _tensor(rows: Sequence[NDArray[np.int32]], llm: LLM) -> Tensor:
    return torch.from_numpy(np.stack(rows)).to(llm.backbone.device, torch.int64)
