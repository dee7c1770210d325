"""The decode loop: one token a step for a batch of equally long sequences, as text that can be shown.

Shapes: B rows, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from locret.backbone import Backbone
from locret.config import Sampling
from locret.errors import NumericsError
from locret.prefill import Reader
from locret.sampling import NO_TOKEN, Sampler, TextStream, no_token, read_back


@dataclass(frozen=True)
class Stats:
    """What an answer cost, per sequence. Bytes are those of the allocated tensors, metadata included.

    Attributes:
        prompt_tokens: tokens read, the document of a context included.
        chunk_size: of the plan: prompt tokens per prefill step.
        kv_bytes: the slabs that hold the kept units.
        peak_kv_bytes: slabs, the workspace one layer needs for a chunk, and that layer's rotated keys.
        kv_bytes_full: what keys and values of all tokens would take in a full cache.
        prefill_seconds: until the first token's logits; for a context, the question only.
    """

    prompt_tokens: int
    new_tokens: int
    method: str
    budget: int | None
    chunk_size: int
    kv_bytes: int
    peak_kv_bytes: int
    kv_bytes_full: int
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Output:
    """An answer. `tokens` holds no end-of-sequence token; `finish_reason` is "stop" or "length"."""

    text: str
    tokens: list[int]
    finish_reason: str
    stats: Stats

    def to_dict(self) -> dict[str, object]:
        """Flat, for `--json`."""
        return {"text": self.text, "finish_reason": self.finish_reason, **dataclasses.asdict(self.stats)}


class Decoder:
    """Runs one group of sequences to their ends.

    Args:
        prefill: reads the prompt, returns the logits of its last token, [B, V].
        ids: the prompt, [B, T]; read by the repetition penalty only.
        strip_start: drop white space before the answer's first word (chat templates put it there).
        numbers: of the rows, for errors; default: 0 to B - 1.

    Attributes:
        pending: the last token of every row: chosen, but not read by the model yet.
        failed: an error or Ctrl-C came in between, so what was read may be less or more than `outputs` says.
    """

    def __init__(
        self, reader: Reader, prefill: Callable[[], Tensor], ids: Tensor, sampling: Sampling, *, strip_start: bool,
        numbers: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self._reader, self._prefill, self._sampling = reader, prefill, sampling
        backbone, rows = reader.backbone, ids.shape[0]
        self._numbers = range(rows) if numbers is None else numbers
        self._ids = ids if sampling.repetition_penalty == 1.0 else ids.to(backbone.device)
        self._eos = eos_ids(backbone)
        self._sampler = Sampler(sampling, rows, backbone.device)
        self._texts = None
        if backbone.tokenizer is not None:
            self._texts = [TextStream(backbone.tokenizer, sampling.stop, strip_start=strip_start) for _ in range(rows)]
        self._tokens: list[list[int]] = [[] for _ in range(rows)]
        self._reasons: list[str | None] = [None] * rows
        self._ahead: Tensor | None = None  # logits of a step whose tokens the host has not seen yet
        self._prompt_tokens = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self.pending: list[int | None] = [None] * rows
        self.failed = False

    @torch.inference_mode()
    def pieces(self) -> Iterator[list[str]]:
        """Run; yields every row's new text after each step.

        Raises: NumericsError: logits or scores that are NaN or infinite.
        """
        started = time.perf_counter()
        try:
            with self._reader.backbone.seam():
                logits = self._prefill()
                self._prompt_tokens = self._reader.cache.seen
                tokens = self._sampler(self._ids, logits)
                chosen = self._read_back(tokens)  # waits for the device, so the clock below is honest
                self._prefill_seconds = time.perf_counter() - started
                started = time.perf_counter()
                yield self._take(chosen)
                while None in self._reasons:
                    penalised = self._sampling.repetition_penalty != 1.0
                    if penalised or self._ahead is None:
                        tokens = tokens.clamp(min=0)  # `NO_TOKEN`: of a row that has ended, or this would have
                    if penalised:
                        self._ids = torch.cat((self._ids, tokens[:, None].to(self._ids.device)), 1)
                    logits = self._reader.step(tokens) if self._ahead is None else self._ahead
                    tokens = self._sampler(self._ids, logits)
                    chosen = self._read_back(tokens)
                    self._decode_seconds = time.perf_counter() - started
                    yield self._take(chosen)
        except GeneratorExit:  # left early, between two steps
            raise
        except BaseException:
            self.failed = True
            raise
        finally:
            if self._ahead is not None:
                self._reader.unread()
            # where an error is on its way already, it says more than scores that are NaN for the same reason
            with contextlib.suppress(NumericsError) if self.failed else contextlib.nullcontext():
                self._reader.settle()
        yield self._finish()

    def outputs(self) -> list[Output]:
        """One per row; complete once `pieces` has ended, and right for what was generated if it was left early."""
        rows = range(len(self._tokens))
        return [
            Output(
                text=self._texts[i].text if self._texts else "",
                tokens=self._tokens[i],
                finish_reason=self._reasons[i] or "length",
                stats=self._stats(i),
            )
            for i in rows
        ]

    def _read_back(self, tokens: Tensor) -> list[int]:
        """The tokens on the host. Where steps are replayed the next one is launched before waiting: the device is never
        idle while text is made, and a step too many is taken back at the end."""
        self._ahead = None
        if not self._reader.can_unread or self._is_last():
            return tokens.tolist()
        wait = read_back(tokens)
        self._ahead = self._reader.step(tokens)
        return wait()

    def _is_last(self) -> bool:
        """Whether these are the last tokens that may be generated."""
        most = self._sampling.max_new_tokens - 1
        return all(reason is not None or len(row) >= most for reason, row in zip(self._reasons, self._tokens))

    def _take(self, chosen: list[int]) -> list[str]:
        pieces = []
        for i, token in enumerate(chosen):
            pieces.append("")
            if self._reasons[i] is not None:
                continue
            if token == NO_TOKEN:
                raise no_token(f"row {self._numbers[i]}", len(self._tokens[i]))
            if token in self._eos:
                self._reasons[i], self.pending[i] = "stop", None
                continue
            self._tokens[i].append(token)
            self.pending[i] = token
            if self._texts:
                pieces[i] = self._texts[i].push(token)
                if self._texts[i].stopped:
                    self._reasons[i] = "stop"
            if self._reasons[i] is None and len(self._tokens[i]) == self._sampling.max_new_tokens:
                self._reasons[i] = "length"
        return pieces

    def _finish(self) -> list[str]:
        return [text.end() for text in self._texts] if self._texts else [""] * len(self._tokens)

    def _stats(self, row: int) -> Stats:
        cache = self._reader.cache
        rows = cache.batch
        prompt = self._prompt_tokens
        return Stats(
            prompt_tokens=prompt,
            new_tokens=len(self._tokens[row]),
            method=self._reader.method.name,
            budget=self._reader.plan.budget,
            chunk_size=self._reader.plan.chunk_size,
            kv_bytes=cache.nbytes // rows,
            peak_kv_bytes=cache.peak_bytes // rows,
            kv_bytes_full=full_cache_bytes(self._reader.backbone, prompt + len(self._tokens[row])),
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
        )


class Stream:
    """Pieces of text of one answer; `.output` holds the result after the last piece."""

    def __init__(self, decoder: Decoder, on_end: Callable[[Decoder], object] | None = None) -> None:
        self._decoder = decoder
        self._pieces = self._run(on_end)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop early; what was generated so far stays."""
        self._pieces.close()

    @property
    def output(self) -> Output:
        """The answer so far."""
        return self._decoder.outputs()[0]

    def _run(self, on_end: Callable[[Decoder], object] | None) -> Generator[str]:
        try:
            for pieces in self._decoder.pieces():
                if pieces[0]:
                    yield pieces[0]
        finally:
            if on_end is not None:
                on_end(self._decoder)


def eos_ids(backbone: Backbone) -> frozenset[int]:
    """Tokens that end an answer: the model's generation config, or else the tokenizer's."""
    config = backbone.model.generation_config
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        eos = getattr(backbone.tokenizer, "eos_token_id", None)
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def full_cache_bytes(backbone: Backbone, tokens: int) -> int:
    """Bytes of keys and values of `tokens` tokens in a full cache; sliding-window layers hold their window."""
    units = sum(tokens if layer.window is None else min(tokens, layer.window) for layer in backbone.layers)
    return units * backbone.num_kv_heads * 2 * backbone.head_dim * backbone.dtype.itemsize
