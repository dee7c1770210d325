"""One decode step for requests that come and go: the same tokens as row by row, and nobody notices the others.

On a CPU the step runs kernel by kernel; the tests marked gpu run the captured graph.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from oracles import llm_of, speak, tokens
from test_scheduler import logits_of
from triton_programs import interpret

from locret.engine import LLM
from locret.errors import NumericsError
from locret.scheduler import Request, Scheduler, Status
from locret.slots import SlotsGraph
from locret.together import PassByRow

POISON = 11
OPTIONS: dict[str, Any] = dict(budget=40, chunk_size=16, decode_interval=5)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [t for t in tokens(length, seed=seed)[0].tolist() if t != POISON]


def graph_of(scheduler: Scheduler) -> SlotsGraph:
    assert scheduler._together is not None
    assert scheduler._together.graph is not None
    return scheduler._together.graph


def talker(method: str = "locret", family: str = "llama", device: str = "cpu", dtype: torch.dtype = torch.float32,
           model: dict[str, Any] | None = None, **options: Any) -> LLM:  # fmt: skip
    made = speak(build_tiny_model(family, **(model or {})))
    made.get_input_embeddings().weight[POISON] = float("nan")  # type: ignore[index, operator]
    return llm_of(made.to(device, dtype), method, **{**OPTIONS, **options})  # type: ignore[arg-type]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many rows every step together, and every batch row by row, had."""
    seen: dict[str, list[int]] = {"together": [], "rows": []}
    step, rows = SlotsGraph.step, PassByRow.__init__
    monkeypatch.setattr(SlotsGraph, "step", lambda g, t: (seen["together"].append(len(t)), step(g, t))[1])
    monkeypatch.setattr(
        PassByRow, "__init__", lambda r, readers: (seen["rows"].append(len(readers)), rows(r, readers))[1]
    )
    return seen


MIXED: list[tuple[list[int], dict[str, Any]]] = [
    (prompt(9, 1), dict(max_new_tokens=12)),  # never evicts
    (prompt(130, 2), dict(max_new_tokens=40)),  # evicts every five steps
    (prompt(60, 3), dict(max_new_tokens=200)),  # cancelled
    ([*prompt(40, 4), POISON], dict(max_new_tokens=9)),
    (prompt(33, 5), dict(max_new_tokens=25, temperature=1.2, seed=3, top_k=20)),
    (prompt(70, 6), dict(max_new_tokens=30, repetition_penalty=1.4)),
    (prompt(20, 7), dict(max_new_tokens=21)),
]


def run(scheduler: Scheduler, cancel_at: int = 17) -> list[Request]:
    requests = [scheduler.submit(ids, **sampling) for ids, sampling in MIXED]
    while scheduler.step():
        if len(requests[2].tokens) == cancel_at:
            requests[2].cancel()
    return requests


def check(requests: list[Request], want: list[Request]) -> None:
    for mine, theirs in zip(requests, want, strict=True):
        assert (mine.status, mine.tokens) == (theirs.status, theirs.tokens), mine.number
    assert requests[2].status is Status.CANCELLED
    assert requests[3].status is Status.FAILED
    with pytest.raises(NumericsError, match="NaN"):
        _ = requests[3].output
    assert all(r.status is Status.DONE for i, r in enumerate(requests) if i not in (2, 3))


@pytest.mark.parametrize(("method", "family"), [("locret", "llama"), ("full", "llama"), ("knorm", "qwen3"),
                                                ("locret", "glm"), ("random", "smollm3")])  # fmt: skip
@pytest.mark.parametrize("ahead", [False, True])
def test_all_kinds_of_requests_get_what_they_get_row_by_row(
    method: str, family: str, ahead: bool, steps: dict[str, list[int]]
) -> None:
    """Also where the host runs one step behind, as it does on a GPU."""
    llm = talker(method, family)
    scheduler = llm.scheduler(slots=4, exact=False)
    graph_of(scheduler).ahead = ahead
    together = run(scheduler)
    assert sum(steps["together"]) > 100
    assert steps["rows"] == []  # not even evictions
    check(together, run(llm.scheduler(slots=4, exact=False, graph=False)))
    check(together, run(llm.scheduler(slots=4)))


@pytest.mark.parametrize("ahead", [False, True])
def test_others_do_not_change_a_bit(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evictions, full stashes and rows that come and go beside it; the same numbers as alone."""
    llm = talker()

    def logits(others: list[int], first: int) -> torch.Tensor:
        scheduler = llm.scheduler(slots=4, exact=False)
        for n in others[:first]:
            scheduler.submit(prompt(n, n), max_new_tokens=n // 4)
        mine = scheduler.submit(prompt(60, 9), max_new_tokens=25)
        for n in others[first:]:
            scheduler.submit(prompt(n, n), max_new_tokens=n // 4)
        graph_of(scheduler).ahead = ahead
        return logits_of(scheduler, mine, monkeypatch)

    alone = logits([], 0)
    assert len(alone) == 25
    assert torch.equal(alone, logits([30, 90, 20, 150, 40], 2))
    assert torch.equal(alone, logits([1300, 45], 1))  # longer than the launches were made for


def test_who_comes_while_a_step_is_under_way_is_in_the_next_one(steps: dict[str, list[int]]) -> None:
    """And gets a token a round from then on; nobody else misses one."""
    scheduler = talker("full").scheduler(slots=3, exact=False)
    graph_of(scheduler).ahead = True
    first = scheduler.submit(prompt(12, 1), max_new_tokens=60)
    while len(first.tokens) < 5:
        scheduler.step()
    second = scheduler.submit(prompt(12, 2), max_new_tokens=60)
    while len(second.tokens) < 1:
        scheduler.step()
    third = scheduler.submit(prompt(12, 3), max_new_tokens=2)  # a chunk or two, and then waits for a launch
    before, there = len(second.tokens), len(first.tokens)
    steps["together"].clear()
    for _ in range(8):
        scheduler.step()
    assert len(first.tokens) == there + 8
    assert len(second.tokens) in (before + 7, before + 8)
    assert third.finished
    assert len(steps["together"]) <= 9  # one a round, none for those who came between


@pytest.mark.parametrize("family", ["phi3-longrope", "llama-dynamic"])
def test_readers_with_other_rotation_tables_stay_out(family: str, steps: dict[str, list[int]]) -> None:
    """Their frequencies follow from the prompt's length; the common ones are those of the longest."""
    llm = talker("knorm", family, budget=300)
    scheduler = llm.scheduler(slots=3, exact=False)
    requests = [scheduler.submit(prompt(n, n), max_new_tokens=9) for n in (12, 80, 20)]
    scheduler.run()
    assert steps["rows"]
    for n, request in zip((12, 80, 20), requests, strict=True):
        assert request.output.tokens == llm.generate(prompt(n, n), max_new_tokens=9).tokens  # type: ignore[union-attr]


@pytest.mark.parametrize(("method", "family", "options"), [
    ("h2o", "llama", {}), ("locret", "mistral-window", {}), ("locret", "llama", {"storage": "int8"}),
    ("locret", "llama", {"positions": "original"}), ("adakv", "llama", {}),
])  # fmt: skip
def test_what_has_no_steps_alike_goes_row_by_row(
    method: str, family: str, options: dict[str, Any], steps: dict[str, list[int]]
) -> None:
    llm = talker(method, family, decode_interval=None, **options)
    request = llm.scheduler(slots=2, exact=False).submit(prompt(60), max_new_tokens=8)
    assert request.wait().tokens == llm.generate(prompt(60), max_new_tokens=8).tokens  # type: ignore[union-attr]
    assert steps["together"] == []
    assert len(steps["rows"]) == 7


def test_a_settled_cache_is_that_of_ordinary_steps() -> None:
    """Positions, flags and scores too: after stashes that were full, and in the middle of one."""
    llm = talker(budget=100, decode_interval=90, num_stabilizers=4, local_window=4)
    caches = []
    for exact in (True, False):
        scheduler = llm.scheduler(slots=3, exact=exact)
        scheduler.submit(prompt(30, 1), max_new_tokens=100)
        request = scheduler.submit(prompt(50, 2), max_new_tokens=200)
        while len(request.tokens) < 150:
            scheduler.step()
        assert request._reader is not None
        if not exact:
            assert request._row is not None
            assert 0 < graph_of(scheduler)._pending[request._row] < 64
            with torch.inference_mode():
                graph_of(scheduler).settle(request._row)
        caches.append(request._reader.cache)
    want, got = caches
    assert got.seen == want.seen
    for one, other in zip(want.layers, got.layers, strict=True):
        theirs, mine = one.tensors(), other.tensors()
        for name in ("position", "protected"):
            assert torch.equal(mine[name], theirs[name])
        for name in ("k", "v", "score"):
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("ahead", "options"), [
    (False, {}), (True, {}), (False, dict(budget=400, decode_interval=200)),
    (True, dict(budget=400, decode_interval=200)),
])  # fmt: skip
def test_scores_that_are_nan_fail_their_own_request_only(ahead: bool, options: dict[str, int]) -> None:
    """Found when it evicts, or when its stash is full."""
    llm = talker(**options)
    scheduler = llm.scheduler(slots=3, exact=False)
    graph_of(scheduler).ahead = ahead
    bad, good = (scheduler.submit(prompt(n, n), max_new_tokens=90) for n in (50, 60))
    while not (len(bad.tokens) > 7 and len(good.tokens) > 7):
        scheduler.step()
    stash = graph_of(scheduler)._step.stash
    assert stash is not None
    assert bad._row is not None
    with torch.inference_mode():
        stash.q[:, bad._row].fill_(float("nan"))
    at = len(bad.tokens)
    scheduler.run()
    with pytest.raises(NumericsError, match="NaN or infinite scores"):
        _ = bad.output
    assert len(bad.tokens) <= (66 if options else at + OPTIONS["decode_interval"])
    assert good.output.tokens == llm.generate(prompt(60, 60), max_new_tokens=90).tokens  # type: ignore[union-attr]
    again = scheduler.submit(prompt(60, 60), max_new_tokens=90)  # the row is as good as new
    assert again.wait().tokens == good.tokens


@pytest.mark.parametrize("end", ["cancel", "done"])
def test_a_request_that_ends_frees_its_cache_and_its_row_at_once(end: str) -> None:
    """Gigabytes on a GPU must not wait for the garbage collector, nor for the next step."""
    scheduler = talker().scheduler(slots=2, exact=False)
    other = scheduler.submit(prompt(30), max_new_tokens=40)
    request = scheduler.submit(prompt(50), max_new_tokens=200 if end == "cancel" else 6)
    while len(request.tokens) < 5:
        scheduler.step()
    assert request._reader is not None
    slab, graph = weakref.ref(request._reader.cache.layers[0].slab.tensors()["k"]), graph_of(scheduler)
    gc.disable()
    try:
        if end == "cancel":
            request.cancel()
        else:
            scheduler.step()
        assert request.finished
        assert slab() is None
        assert sum(reader is not None for reader in graph._readers) == 1
    finally:
        gc.enable()
    assert len(other.wait().tokens) == 40


def test_what_a_callback_raises_fails_its_request_only() -> None:
    scheduler = talker().scheduler(slots=2, exact=False)

    def broken(_: str) -> Iterator[None]:
        raise ValueError("no listener")

    bad = scheduler.submit("hear me", max_new_tokens=9, on_text=broken)
    good = scheduler.submit("hear me", max_new_tokens=9)
    scheduler.run()
    assert isinstance(bad.error, ValueError)
    assert len(good.output.tokens) == 9


# The same engine on Triton's interpreter: kernels that find their rows by addresses only.
INTERPRETED = """
import json
from locret.kernels import append, decode_attention
from test_slots import prompt, talker
def answers(triton):
    for operator in (append, decode_attention):
        operator.use_triton = lambda kernel, x: triton
    scheduler = talker("locret", budget=24, decode_interval=3).scheduler(slots=2, exact=False)
    requests = [scheduler.submit(prompt(n, n), max_new_tokens=m) for n, m in ((30, 7), (9, 3), (14, 6))]
    scheduler.run()
    return [r.output.tokens for r in requests]
print(json.dumps([answers(False), answers(True)]))
"""


@pytest.mark.triton_interpret
def test_the_kernels_find_rows_that_come_and_go() -> None:
    want, got = interpret(INTERPRETED)
    assert [len(row) for row in want] == [7, 3, 6]
    assert got == want


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["locret", "full"])
def test_the_captured_step_gives_the_tokens_of_the_one_that_is_not(method: str, dtype: torch.dtype) -> None:
    llm = talker(method, device="cuda", dtype=dtype, model=dict(head_dim=64))
    assert llm.backbone.fused is not None
    captured = llm.scheduler(slots=4, exact=False)
    requests = run(captured)
    assert graph_of(captured)._step._graph is not None
    plain = llm.scheduler(slots=4, exact=False)
    assert plain._together is not None
    plain._together.graph = SlotsGraph(llm.backbone, llm.method, 4, capture=False)
    check(requests, run(plain))
    if dtype == torch.float32:
        check(requests, run(llm.scheduler(slots=4, exact=False, graph=False)))


@pytest.mark.gpu
def test_rows_come_and_go_without_a_new_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """And longer slabs than any before are one more."""
    llm = talker("full", device="cuda", model=dict(head_dim=64, max_position_embeddings=4096))
    scheduler, captures = llm.scheduler(slots=3, exact=False), []
    step = graph_of(scheduler)._step
    record = step._record
    monkeypatch.setattr(step, "_record", lambda: (captures.append(1), record()))
    for n in (30, 90, 20, 150, 1500, 40, 1400):
        scheduler.submit(prompt(n, n), max_new_tokens=9 + n % 7)
    scheduler.run()
    assert len(captures) == 2
