"""Continuous batching over a fixed number of slots: requests come and go while others run.

A round is some prefill chunks of one request each, then one decode step of every request that is answering. Chunks are
never cut or merged: where they end decides what is evicted, so a request reads its prompt in exactly the chunks that it
reads it in alone. How many chunks a round has follows from `chunk_seconds`, the prefill time that may on average lie
between two decode steps. Chunks go, among requests of the highest priority, by turns to the one with the least left to
read and to the one that came first: a short prompt waits for two chunks of a long one at most, and the long one gets at
least every second chunk.

Admission is by bytes, counted before anything is allocated (`plan.footprint`): what can never fit is refused with the
arithmetic, what does not fit now waits. Long prompts leave one slot free for short ones.

Decoding has two modes. `exact`: every row runs alone, and a request gets, bit for bit, what `LLM.generate` gives it;
the weights are read once a row. Otherwise: all slots run as one batch of a fixed number of rows, the empty ones filled
up, and the weights are read once a step. A matrix product of one shape treats each row alike whatever stands in the
others, so a request still gets the same tokens among others as alone in this scheduler; but a product of another shape
may round differently, so they can differ from `LLM.generate`'s. (Mixtures of experts route rows into products of
varying shapes: for them only `exact` promises anything.)

How such a batch runs, on a GPU as one replayed CUDA graph: `together`.

Shapes: B slots, T prompt, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from locret.cache import out_of_memory
from locret.config import LARGEST_CHUNK, Sampling
from locret.decode import Output, Stats, eos_ids, full_cache_bytes
from locret.errors import CapacityError, ConfigError
from locret.graph import MOST_STASHED
from locret.memory import RESERVE, free_bytes, longest_chunk
from locret.plan import Footprint, Shape, footprint
from locret.prefill import Reader, not_finite
from locret.sampling import NO_TOKEN, Sampler, TextStream, likeliest_or_none, no_token, read_back
from locret.together import Together

if TYPE_CHECKING:
    from locret.engine import LLM, Prompt

_SHORT_CHUNKS = 4  # a prompt of more chunks than that is long: it leaves one slot free
_LONG_PROMPT = 131_072  # tokens: what slots hold at most where the budget does not say (a share, a full cache)
_PATIENCE = 16  # how often requests that fit may overtake one that does not fit yet
_BAD_SCORES = NO_TOKEN - 1  # in the place of a token, too
Mark = float | torch.cuda.Event  # a point in time, of the host and of a GPU


class Status(StrEnum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(eq=False)
class Request:
    """One prompt and its answer. Iterate over it for pieces of text; this runs the scheduler as far as needed.

    Attributes:
        priority: higher goes first, in the queue and for prefill chunks.
        error: why it failed.
        first_token_seconds: from `submit` to the first token, once there is one.
    """

    prompt: list[int]
    sampling: Sampling
    priority: int
    on_text: Callable[[str], object] | None
    number: int
    cost: Footprint
    status: Status = Status.WAITING
    error: Exception | None = None
    tokens: list[int] = field(default_factory=list)
    first_token_seconds: float | None = None
    _scheduler: Scheduler = field(kw_only=True, repr=False)
    _text: TextStream | None = field(kw_only=True, repr=False)
    _protected: Tensor | None = field(default=None, kw_only=True, repr=False)
    _submitted: float = field(default=0.0, kw_only=True)
    _reason: str | None = None
    _reader: Reader | None = field(default=None, repr=False)
    _sampler: Sampler | None = field(default=None, repr=False)
    _chunks: Iterator[tuple[int, Tensor | None]] | None = field(default=None, repr=False)
    _stats: Stats | None = field(default=None, repr=False)
    _row: int | None = None  # in the graph of all slots
    _left: int = 0  # prompt tokens not read yet
    _overtaken: int = 0
    _cancelled: bool = False
    _prefill_seconds: float = 0.0
    _decode_seconds: float = 0.0
    _fresh: deque[str] = field(default_factory=deque, repr=False)

    @property
    def finished(self) -> bool:
        return self.status in (Status.DONE, Status.CANCELLED, Status.FAILED)

    @property
    def output(self) -> Output:
        """The answer so far; complete when `finished`. Raises `error` for a request that failed."""
        if self.error is not None:
            raise self.error
        stats = self._stats or self._scheduler._stats(self)
        return Output(self._text.text if self._text else "", list(self.tokens), self._reason or "length", stats)

    def cancel(self) -> None:
        """Stop; the slot is free at once, or, while another thread is in a step, after it. Text so far stays."""
        self._scheduler._cancel(self)

    def wait(self) -> Output:
        """Run until it is finished; the answer."""
        for _ in self:
            pass
        return self.output

    def __iter__(self) -> Iterator[str]:
        while True:
            while self._fresh:
                yield self._fresh.popleft()
            if self.finished:
                break
            self._scheduler.step()
        if self.error is not None:
            raise self.error


class Scheduler:
    """Runs many requests at once on one model. Safe to submit to and cancel in from other threads than the one in step.

    Args:
        slots: requests that read or answer at the same time.
        max_bytes: of all caches together, one workspace and scratch included; None: what is free on the GPU now, less a
            tenth, or no limit on a CPU.
        chunk_seconds: prefill time that may, on average, come between two decode steps. One chunk is the least that is
            run, so a single gap can be as long as a chunk takes; a smaller `chunk_size` of the cache shortens it.
        exact: see the top of this file.
        graph: with `exact=False`: requests whose steps are alike take one step together; False: attention goes row by
            row, kernel by kernel.
        clock: seconds, of the host; for tests. On a GPU chunks are timed by its own events.
    """

    def __init__(
        self, llm: LLM, *, slots: int = 8, max_bytes: int | None = None, chunk_seconds: float = 0.1,
        exact: bool = True, graph: bool = True, clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        for name, value in (("slots", slots), ("max_bytes", max_bytes), ("chunk_seconds", chunk_seconds)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; it must be above 0")
        self.llm, self.slots, self.exact, self.chunk_seconds = llm, slots, exact, chunk_seconds
        free = free_bytes(llm.backbone.device)
        self.max_bytes = int(free * 0.9) if max_bytes is None and free is not None else max_bytes
        self.requests: list[Request] = []  # in slots, in order of admission
        self.waiting: list[Request] = []
        self._inbox: deque[Request] = deque()  # submitted, perhaps by another thread, since the last step
        self._together = None if exact else Together(llm.backbone, llm.method, slots, graph=graph)
        self._shape = Shape.of_backbone(llm.backbone)
        self._most_chunk = LARGEST_CHUNK if free is None else self._room_for_chunks(free)
        self._eos = eos_ids(llm.backbone)
        self._numbers, self._turn = itertools.count(), 0
        self._lock = threading.Lock()
        self._credit = 0.0
        self._token_seconds = 0.0  # of prefill, as measured
        self._unpaid: deque[_Chunk] = deque()  # launched, and not known to be done
        self._clock = clock

    @property
    def free_slots(self) -> int:
        return self.slots - len(self.requests)

    @property
    def used_bytes(self) -> int:
        """Of the requests in slots, as counted for admission."""
        return _needed([request.cost for request in self.requests])

    def submit(
        self, prompt: Prompt, *, sampling: Sampling | None = None, priority: int = 0, protect: tuple[str, ...] = (),
        on_text: Callable[[str], object] | None = None, **options: object,
    ) -> Request:  # fmt: skip
        """Put a request into the queue.

        Args:
            prompt, sampling, protect, options: as for `LLM.generate`.
            priority: higher goes first.
            on_text: called with every piece of text, in the thread that steps; it may cancel, and must not step.
        Raises: CapacityError: it would not fit even alone. ConfigError: as `LLM.generate`.
        """
        chosen = Sampling.of(sampling, options)
        encoded = self.llm._encode(prompt, protect)
        if not encoded.ids:
            raise ConfigError("the prompt has no tokens; give at least one")
        marked = 0 if encoded.protected is None else int(encoded.protected.sum())
        cost = footprint(
            self._shape, self.llm.method, self.llm.config, prompt_len=len(encoded.ids),
            new_tokens=chosen.max_new_tokens, dtype=self.llm.backbone.dtype,
            num_protected=marked, most_chunk=self._most_chunk,
        )  # fmt: skip
        if self.max_bytes is not None and _needed([cost]) > self.max_bytes:
            raise CapacityError(f"this request can never be admitted: {_arithmetic(cost)}, and the limit is "
                                f"{self.max_bytes:,} B; lower the budget or raise max_bytes")  # fmt: skip
        tokenizer = self.llm.backbone.tokenizer
        text = None if tokenizer is None else TextStream(tokenizer, chosen.stop, strip_start=encoded.templated)
        request = Request(
            encoded.ids, chosen, priority, on_text, next(self._numbers), cost, _scheduler=self, _text=text,
            _protected=encoded.protected, _submitted=self._clock(),
        )  # fmt: skip
        request._left = len(encoded.ids)
        self._inbox.append(request)
        return request

    def step(self) -> bool:
        """One round: admit, read some chunks, one token for everyone who answers. False: there is nothing to do."""
        with self._lock, torch.inference_mode(), self.llm.backbone.seam():
            try:
                self._sweep()
                self._admit()
                self._read()
                self._sweep()
                self._decode()
                self._sweep()
            except BaseException:  # Ctrl-C: what was being read is neither the one thing nor the other
                for request in self.requests:
                    self._fail(request, InterruptedError("the scheduler was interrupted in the middle of a step"))
                self._sweep()
                raise
            return bool(self.requests or self.waiting or self._inbox)

    def run(self) -> None:
        """Until nothing is left to do."""
        while self.step():
            pass

    # ------------------------------------------------------------------ admission

    def _room_for_chunks(self, free: int) -> int:
        """The longest chunk of any request that leaves its size open, from what is free beside full caches in all
        slots. Chosen once: by what is free when a request starts, its tokens would depend on who else is here."""
        llm = self.llm
        try:
            one = footprint(
                self._shape, llm.method, llm.config, prompt_len=max(_LONG_PROMPT, self._shape.max_length),
                new_tokens=None, dtype=llm.backbone.dtype,
            )  # fmt: skip
        except ConfigError:  # of options that no request can have: `submit` says so
            return LARGEST_CHUNK
        caches = self.slots * (one.slabs + one.rope) + one.workspace + one.scratch
        left = free - min(caches, self.max_bytes or caches) - one.layer - RESERVE
        return llm.backbone.shard.least(longest_chunk(left, one.token, LARGEST_CHUNK), llm.backbone.device)

    def _admit(self) -> None:
        overtaken: list[Request] = []
        for request in sorted(self.waiting, key=lambda r: (-r.priority, r.number)):
            if not self.free_slots or any(r._overtaken >= _PATIENCE for r in overtaken):
                return  # what is freed from now on is kept for the one that has waited so long
            if not self._fits(request):
                overtaken.append(request)
                continue
            for other in overtaken:
                other._overtaken += 1
            self.waiting.remove(request)
            try:
                self._start(request)
            except Exception as error:
                self._fail(request, error)
                request._stats = self._stats(request)

    def _fits(self, request: Request) -> bool:
        if self._is_long(request) and self.free_slots == 1 and self.slots > 1:
            return False
        needed = _needed([*(other.cost for other in self.requests), request.cost])
        return self.max_bytes is None or needed <= self.max_bytes

    def _is_long(self, request: Request) -> bool:
        return len(request.cost.chunks) > _SHORT_CHUNKS

    def _start(self, request: Request) -> None:
        marked, device = request._protected, self.llm.backbone.device
        reader = Reader.start(
            self.llm.backbone, self.llm.method, self.llm.config, batch=1, prompt_len=len(request.prompt),
            new_tokens=request.sampling.max_new_tokens, num_protected=0 if marked is None else int(marked.sum()),
            most_chunk=self._most_chunk,
        )  # fmt: skip
        self._share_workspace(reader)
        ids = torch.tensor([request.prompt])
        request._reader, request._sampler = reader, Sampler(request.sampling, 1, device)
        request._chunks = reader.chunks(ids, protected=marked)
        request.status = Status.PREFILL
        self.requests.append(request)

    def _share_workspace(self, reader: Reader) -> None:
        """One workspace for all: it holds nothing between two layers. The largest serves everyone."""
        caches = [reader.cache, *(r._reader.cache for r in self.requests if r._reader is not None)]
        largest = max((c.workspace for c in caches if c.workspace is not None), key=len, default=None)
        for cache in caches:
            cache.workspace = largest

    # ------------------------------------------------------------------ prefill

    def _read(self) -> None:
        """Prefill chunks: one when nobody answers, otherwise those that the steps so far have left time for."""
        answering = any(r.status is Status.DECODE for r in self.requests)
        self._pay()
        self._credit = min(self._credit, 0.0) + self.chunk_seconds
        ran = False
        while (request := self._next_reader()) is not None:
            expected = self._token_seconds * min(request._left, max(request.cost.chunks))
            left = self._credit - self._token_seconds * sum(chunk.tokens for chunk in self._unpaid)
            if answering and (left <= 0 or (ran and left < expected)):
                return
            self._turn += 1
            self._read_chunk(request, counts=answering)
            ran = True
            if not answering:
                self._credit = 0.0
                return

    def _next_reader(self) -> Request | None:
        reading = [r for r in self.requests if r.status is Status.PREFILL and not r._cancelled]
        if not reading:
            return None
        highest = max(r.priority for r in reading)
        reading = [r for r in reading if r.priority == highest]
        if self._turn % 2:
            return min(reading, key=lambda r: r.number)
        return min(reading, key=lambda r: (r._left, r.number))

    def _read_chunk(self, request: Request, *, counts: bool) -> None:
        """counts: somebody waits for a decode step meanwhile, so that what it takes is charged."""
        assert request._chunks is not None
        assert request._reader is not None
        began, before = self._mark(), request._reader.cache.seen
        done, logits = 0, None
        try:
            _, logits = next(request._chunks)
            done = request._reader.cache.seen - before
            request._left -= done
            if logits is not None:
                request.status = Status.DECODE
                self._accept([request], self._chosen([request], logits).tolist())
                if self._together is not None:
                    self._together.enter(request)
        except Exception as error:
            self._fail(request, error)
        self._unpaid.append(_Chunk(request, done, began, self._mark(), counts))
        self._pay(wait=logits is not None)  # the host has read a token of these: they are done

    def _mark(self) -> Mark:
        """Now, by the clock of whoever does the work: a GPU gets there later, and nobody waits for it here."""
        device = self.llm.backbone.device
        if device.type != "cuda":
            return float(self._clock())
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def _pay(self, *, wait: bool = False) -> None:
        """Charge chunks what they took, as soon as that is known: a decode step that follows them is waited for."""
        while self._unpaid and (took := _seconds(self._unpaid[0], wait=wait)) is not None:
            chunk = self._unpaid.popleft()
            if chunk.tokens:
                chunk.request._prefill_seconds += took
                self._token_seconds = took / chunk.tokens
            if chunk.counts:
                self._credit -= took

    # ------------------------------------------------------------------ decode

    def _decode(self) -> None:
        rows = [r for r in self.requests if r.status is Status.DECODE and not r._cancelled]
        if not rows:
            return
        started = self._clock()
        if self._together is None:
            for request in rows:
                self._step_alone(request)
        else:
            with self._owned(*rows):
                self._step_together(self._together, rows)
        took = self._clock() - started
        for request in rows:
            request._decode_seconds += took

    def _step_alone(self, request: Request) -> None:
        assert request._reader is not None
        with self._owned(request):
            token = torch.tensor([request.tokens[-1]], device=self.llm.backbone.device)
            self._accept([request], self._chosen([request], request._reader.step(token)).tolist())

    def _step_together(self, together: Together, rows: list[Request]) -> None:
        logits = together.step(rows, self._fail)
        if not logits:
            return
        requests = list(logits)
        chosen = self._chosen(requests, torch.cat([*logits.values()]))
        wait = read_back(chosen)
        if all(request.status is Status.DECODE for request in self.requests):  # otherwise chunks come first
            together.launch(requests, chosen, self._fail)
        self._accept(requests, wait())

    def _chosen(self, requests: list[Request], logits: Tensor) -> Tensor:
        """The next token of each from [n, V], or what says that there is none: [n], on the device."""
        chosen = likeliest_or_none(logits)
        for i, request in enumerate(requests):
            assert request._sampler is not None
            if not request._sampler.plain:
                with self._owned(request):
                    chosen[i : i + 1] = self._sample(request, request._sampler, logits[i : i + 1])
        good = None if self._together is None else self._together.good(requests)
        return chosen if good is None else chosen.where(good, _BAD_SCORES)

    def _accept(self, requests: list[Request], tokens: list[int]) -> None:
        for request, token in zip(requests, tokens, strict=True):
            with self._owned(request):
                if request._reader is not None:
                    request._reader.check_scores()  # of an eviction in this round; copied with the tokens
                self._take(request, self._checked(request, token))

    def _sample(self, request: Request, sampler: Sampler, logits: Tensor) -> Tensor:
        """[1, V] to [1]."""
        penalised = request.sampling.repetition_penalty != 1.0
        ids = torch.tensor([request.prompt + request.tokens], device=logits.device) if penalised else logits
        return sampler(ids, logits)

    def _checked(self, request: Request, token: int) -> int:
        if token == NO_TOKEN:
            raise no_token(f"request {request.number}", len(request.tokens))
        if token == _BAD_SCORES:
            seen = len(request.prompt) + len(request.tokens)
            raise not_finite(self.llm.method, seen - MOST_STASHED, seen)
        return token

    def _take(self, request: Request, token: int) -> None:
        if request.finished:
            return  # it failed meanwhile
        if request.first_token_seconds is None:
            request.first_token_seconds = self._clock() - request._submitted
        text, piece = request._text, ""
        if token in self._eos:
            request._reason = "stop"
        else:
            request.tokens.append(token)
            piece = text.push(token) if text else ""
            if text and text.stopped:
                request._reason = "stop"
            elif len(request.tokens) == request.sampling.max_new_tokens:
                request._reason = "length"
        if request._reason is not None:
            piece += text.end() if text else ""
            request.status = Status.DONE
        if piece:
            request._fresh.append(piece)
            if request.on_text is not None:
                request.on_text(piece)

    # ------------------------------------------------------------------ ends

    def _cancel(self, request: Request) -> None:
        request._cancelled = True
        if self._lock.acquire(blocking=False):  # otherwise the step that is going on sweeps
            try:
                self._sweep()
            finally:
                self._lock.release()

    @contextlib.contextmanager
    def _owned(self, *requests: Request) -> Iterator[None]:
        """What goes wrong in here fails these requests only."""
        try:
            yield
        except Exception as error:
            for request in requests:
                self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        if out_of_memory(error):
            others = len([r for r in self.requests if r is not request])
            failed = CapacityError(f"out of memory for request {request.number}: {_arithmetic(request.cost)}, beside "
                                   f"{others} other requests; try again when they are done, or lower max_bytes, slots "
                                   "or the budget")  # fmt: skip
            failed.__cause__ = error.with_traceback(None)  # its frames would keep the tensors alive
            error = failed
        traceback.clear_frames(error.__traceback__)  # they hold the cache, which admission counts as free
        request.error, request.status = error, Status.FAILED

    def _sweep(self) -> None:
        """Take in what was submitted; free what finished requests hold."""
        while self._inbox:
            self.waiting.append(self._inbox.popleft())
        for request in [*self.requests, *self.waiting]:
            if request._cancelled and not request.finished:
                request.status, request._reason = Status.CANCELLED, "cancelled"
            if request.finished:
                request._stats = self._stats(request)
                if self._together is not None:
                    self._together.leave(request)
                request._reader = request._chunks = request._sampler = None
        self.requests = [r for r in self.requests if not r.finished]
        self.waiting = [r for r in self.waiting if not r.finished]

    def _stats(self, request: Request) -> Stats:
        if request._stats is not None:
            return request._stats
        cache = None if request._reader is None else request._reader.cache
        return Stats(
            prompt_tokens=len(request.prompt), new_tokens=len(request.tokens), method=self.llm.method.name,
            budget=request.cost.plan.budget, chunk_size=request.cost.plan.chunk_size,
            kv_bytes=0 if cache is None else cache.nbytes,
            peak_kv_bytes=0 if cache is None else cache.peak_bytes,
            kv_bytes_full=full_cache_bytes(self.llm.backbone, len(request.prompt) + len(request.tokens)),
            prefill_seconds=request._prefill_seconds, decode_seconds=request._decode_seconds,
        )  # fmt: skip


@dataclass
class _Chunk:
    """A prefill chunk that was launched."""

    request: Request
    tokens: int  # 0: it failed
    began: Mark
    ended: Mark
    counts: bool


def _seconds(chunk: _Chunk, *, wait: bool) -> float | None:
    """What it took; None: a GPU is still at it."""
    began, ended = chunk.began, chunk.ended
    if isinstance(began, float):
        assert isinstance(ended, float)
        return ended - began
    assert not isinstance(ended, float)
    if wait:
        ended.synchronize()
    return began.elapsed_time(ended) / 1e3 if ended.query() else None


def _needed(costs: list[Footprint]) -> int:
    """Bytes of these together: slabs and rotation tables of each, workspace and scratch of one at a time."""
    if not costs:
        return 0
    return sum(c.slabs + c.rope for c in costs) + max(c.workspace for c in costs) + max(c.scratch for c in costs)


def _arithmetic(cost: Footprint) -> str:
    return (f"slabs {cost.slabs:,} B + rotation tables {cost.rope:,} B + workspace {cost.workspace:,} B + scratch "
            f"{cost.scratch:,} B = {_needed([cost]):,} B")  # fmt: skip
