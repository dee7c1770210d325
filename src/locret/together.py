"""A decode step of many requests whose matrices see all of them: at most two passes of a fixed number of rows.

Requests whose step is like any other are rows of a `slots.SlotsGraph`. Those whose method scores in order to evict
(`Method.memoryless`) and does so in this round, and those whose method or model never has two steps alike, are a second
pass, in which attention goes row by row, each with its cache. Rows that are no request's are filled up, so that
products always have one shape.

Where the device works by itself, the next step is launched before the host waits for the tokens of this one, so it is
never idle while text is made. Whoever turns out to have ended read a token too many, in a cache that is thrown away;
who comes in between takes part from the next launch on.

Shapes: B rows, Hq/Hkv heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from locret.backbone import AttentionCall, Backbone
from locret.methods import Method
from locret.prefill import ChunkPass, Reader
from locret.slots import SlotsGraph

if TYPE_CHECKING:
    from locret.scheduler import Request

Fail = Callable[["Request", Exception], object]
Logits = dict["Request", Tensor]


class Together:
    """The decode steps of a scheduler's requests. `fail` is told of every request that cannot go on, and why.

    Args:
        rows: B, at least as many as requests.
        graph: False: all in the second pass.

    Attributes:
        graph: None: nobody's steps are alike.
    """

    def __init__(self, backbone: Backbone, method: Method, rows: int, *, graph: bool) -> None:
        self._backbone, self._rows = backbone, rows
        self.graph = SlotsGraph.of(backbone, method, rows) if graph else None
        self._ahead: Logits = {}  # of the step that is under way
        self._late: list[Request] = []  # not in it, but alike

    def enter(self, request: Request) -> None:
        """It has read its prompt."""
        if self.graph is not None and request._reader is not None:
            request._row = self.graph.enter(request._reader)

    def leave(self, request: Request) -> None:
        """Its cache is free, and so is its row."""
        if self.graph is not None and request._row is not None:
            self.graph.leave(request._row)
        request._row = None

    def step(self, requests: Sequence[Request], fail: Fail) -> Logits:
        """Logits [1, V] behind the newest tokens, of all requests but those that failed or wait for the next launch."""
        logits = {request: x for request, x in self._ahead.items() if request in requests}
        self._ahead, self._late = {}, []
        rest = [request for request in requests if request not in logits]
        alike = [request for request in rest if self._has_room(request)]
        rest = [request for request in rest if request not in alike]
        if logits:
            self._late = alike
        elif alike:
            logits = _owned(alike, fail, lambda: self._shared(alike, fail))
        if rest:
            logits |= _owned(rest, fail, lambda: self._one_by_one(rest, fail))
        return logits

    def launch(self, requests: Sequence[Request], tokens: Tensor, fail: Fail) -> None:
        """Begin the next step of those that read `tokens` [n] in it, and of those that waited for it.

        Not worth it on a CPU, where the host would do the work.
        """
        if self.graph is None or not self.graph.ahead:
            return
        news = dict(zip(requests, tokens, strict=True))
        going = [r for r in requests if self._has_room(r) and len(r.tokens) + 1 < r.sampling.max_new_tokens]
        late = [request for request in self._late if not request.finished]
        if going:
            both, read = [*going, *late], [*(news[r] for r in going), *self._newest(late)]
            self._ahead = _owned(both, fail, lambda: self._early(both, read))

    def good(self, requests: Sequence[Request]) -> Tensor | None:
        """Whether all scores of each are finite so far: bool [n], on the device; None: none were left for later."""
        return None if self.graph is None else self.graph.good([request._row for request in requests])

    def _has_room(self, request: Request) -> bool:
        return self.graph is not None and request._row is not None and self.graph.room(request._row)

    def _newest(self, requests: Sequence[Request]) -> Sequence[Tensor]:
        """The token that each has yet to read, [] on the device."""
        tokens = [request.tokens[-1] for request in requests]
        return list(torch.tensor(tokens, dtype=torch.int64, device=self._backbone.device))

    def _alike(self, requests: Sequence[Request], tokens: Sequence[Tensor]) -> Logits:
        assert self.graph is not None
        rows = {r: r._row for r in requests if r._row is not None}
        logits = self.graph.step(dict(zip(rows.values(), tokens, strict=True)))
        return {request: logits[row] for request, row in rows.items()}

    def _shared(self, requests: Sequence[Request], fail: Fail) -> Logits:
        """One step for all. A slab longer than any before needs a new capture; without the memory for that they go row
        by row, so that nobody fails for a neighbour's length."""
        try:
            return self._alike(requests, self._newest(requests))
        except torch.OutOfMemoryError:
            return self._one_by_one(requests, fail)

    def _early(self, requests: Sequence[Request], tokens: Sequence[Tensor]) -> Logits:
        """Begun before the host has seen the tokens; without the memory for it the next round does what can be done."""
        try:
            return self._alike(requests, tokens)
        except torch.OutOfMemoryError:
            return {}

    def _one_by_one(self, requests: Sequence[Request], fail: Fail) -> Logits:
        for request in requests:
            if request._row is not None and self.graph is not None:
                self.graph.settle(request._row)
        passes = PassByRow([r._reader for r in requests if r._reader is not None])
        ids = torch.zeros(self._rows, 1, dtype=torch.int64, device=self._backbone.device)
        ids[: len(requests), 0] = torch.stack(list(self._newest(requests)))
        logits = self._backbone.run(ids, passes)
        assert logits is not None
        found: Logits = {}
        for i, request in enumerate(requests):
            try:
                passes.passes[i].finish(ids[i : i + 1], logits[i : i + 1])
                found[request] = logits[i : i + 1, -1]
            except Exception as error:
                fail(request, error)
        return found


def _owned(requests: Sequence[Request], fail: Fail, run: Callable[[], Logits]) -> Logits:
    """A failure of a pass itself is everybody's."""
    try:
        return run()
    except Exception as error:
        for request in requests:
            fail(request, error)
        return {}


class PassByRow:
    """The `LayerContext` of a decode step of many sequences: matrices see all rows, attention each with its cache."""

    def __init__(self, readers: list[Reader]) -> None:
        self.passes = [ChunkPass.of_step(reader) for reader in readers]
        self.wants_hidden = readers[0].method.wants_hidden

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """Rows behind the readers' are fillers and get zeros."""
        out = torch.zeros_like(q)
        for i, own in enumerate(self.passes):
            row = slice(i, i + 1)
            hidden = None if call.hidden is None else call.hidden[row]
            out[row] = own.attend(layer, q[row], k[row], v[row], call._replace(hidden=hidden))
        return out
