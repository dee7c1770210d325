"""Training batches made by worker processes, ahead of the GPU.

Workers are forked, so they share what the parent has loaded (the tokenised corpus). Each makes whole batches straight
into shared memory; batch i of stage s is a function of (seed, s, i) alone, so a resumed run sees the same data. Fork
before CUDA is first used: a CUDA context does not survive a fork.

`make_example(rng, stage, length)` returns (ids, weights), each [length]; weights[t] is the loss weight of ids[t].
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import queue
import random
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

PATIENCE = 60  # seconds without an answer of any worker

MakeExample = Callable[[random.Random, int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Shape:
    """One stage's batches: `rows` sequences of `length` tokens."""

    rows: int
    length: int


def shared_array(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Zeros in memory that forked children write to and the parent reads."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=dtype, count=int(np.prod(shape))).reshape(shape)


def fill(
    ids: np.ndarray, weights: np.ndarray, make_example: MakeExample, seed: int, stage: int, index: int, rank: int = 0
) -> None:
    """Write this process's rows of batch `index` of `stage` into ids and weights, both [rows, length]."""
    rows, length = ids.shape
    for row in range(rows):
        rng = random.Random(f"{seed}/{stage}/{index}/{rank * rows + row}")
        ids[row], weights[row] = make_example(rng, stage, length)


class Feed:
    """Batches in order, made by `num_workers` forked processes, with a ring of slots per stage."""

    def __init__(
        self,
        make_example: MakeExample,
        make_sample: Callable[..., Any],
        shapes: list[Shape],
        *,
        seed: int,
        num_workers: int,
        num_slots: int,
        rank: int = 0,
    ):
        self.make_example, self.make_sample, self.seed, self.num_slots = make_example, make_sample, seed, num_slots
        self.rank = rank  # of several processes that share a batch, each with its rows
        self.ids = [shared_array((num_slots, shape.rows, shape.length), np.uint16) for shape in shapes]
        self.weights = [shared_array((num_slots, shape.rows, shape.length), np.float32) for shape in shapes]
        context = multiprocessing.get_context("fork")
        self.tasks, self.done = context.SimpleQueue(), context.Queue()
        self.ready: dict[tuple[int, int], int] = {}  # (stage, batch index) -> slot
        self.ordered = [0] * len(shapes)  # batches asked for, by stage
        self.results: dict[int, Any] = {}
        self.num_orders = 0
        self.started: set[int] = set()
        self.wait_seconds = 0.0
        self.silent = 0  # seconds that no worker has answered
        self.workers = [context.Process(target=self._work, daemon=True) for _ in range(num_workers)]
        for worker in self.workers:
            worker.start()

    def start(self, stage: int, index: int = 0) -> None:
        """Begin to make the batches of a stage, from batch `index` on; harmless if it has begun."""
        if stage not in self.started:
            self.started.add(stage)
            self.ordered[stage] = index
            for slot in range(self.num_slots):
                self._order(stage, slot)

    def next(self, stage: int, index: int, take: Callable[[np.ndarray, np.ndarray], None]) -> None:
        """Hand batch `index` (the next one) to `take(ids, weights)`, which must copy it; its slot is then reused."""
        began = time.perf_counter()
        while (stage, index) not in self.ready:
            self._receive()
        self.wait_seconds += time.perf_counter() - began
        slot = self.ready.pop((stage, index))
        take(self.ids[stage][slot], self.weights[stage][slot])
        self._order(stage, slot)

    def order(self, *args) -> int:
        """Let a worker run make_sample(*args), in turn with the batches; returns a ticket for `result`."""
        self.num_orders += 1
        self.tasks.put(("sample", self.num_orders, args))
        return self.num_orders

    def result(self, ticket: int) -> Any:
        """What make_sample returned; waits for it."""
        while ticket not in self.results:
            self._receive()
        return self.results.pop(ticket)

    def close(self) -> None:
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.join()

    def _order(self, stage: int, slot: int) -> None:
        self.tasks.put(("fill", stage, self.ordered[stage], slot))
        self.ordered[stage] += 1

    def _receive(self) -> None:
        try:
            kind, key, value = self.done.get(timeout=10)
            self.silent = 0
        except queue.Empty:
            self.silent += 10
            if self.silent >= PATIENCE:
                raise RuntimeError(
                    f"no data worker has answered for {self.silent} s; start again with --resume"
                ) from None
            dead = [worker for worker in self.workers if not worker.is_alive()]
            if dead:
                raise RuntimeError(f"{len(dead)} data workers died (exit code {dead[0].exitcode})") from None
            return
        if kind == "error":
            raise RuntimeError(f"a data worker failed:\n{value}")
        if kind == "fill":
            self.ready[key] = value
        else:
            self.results[key] = value

    def _work(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the run; a key press reaches all
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        os.nice(5)  # the parent launches the GPU's work
        while True:
            kind, *rest = self.tasks.get()
            try:
                if kind == "fill":
                    stage, index, slot = rest
                    place = self.ids[stage][slot], self.weights[stage][slot]
                    fill(*place, self.make_example, self.seed, stage, index, self.rank)
                    self.done.put(("fill", (stage, index), slot))
                else:
                    ticket, args = rest
                    self.done.put(("sample", ticket, self.make_sample(*args)))
            except Exception:
                self.done.put(("error", None, traceback.format_exc()))
