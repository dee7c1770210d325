"""Requests among others: same tokens as alone, fair, cancellable, and what breaks one breaks no other."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from oracles import llm_of, speak, tokens

from locret.engine import LLM
from locret.errors import CapacityError, ConfigError, NumericsError
from locret.prefill import Reader
from locret.scheduler import Request, Scheduler, Status, _needed

OPTIONS: dict[str, Any] = dict(budget=40, chunk_size=16)
POISON = 11


def prompt(length: int, seed: int = 0) -> list[int]:
    return tokens(length, seed=seed)[0].tolist()


def talker(method: str = "knorm", family: str = "llama", **options: Any) -> LLM:
    """Never ends by itself, so that lengths are what is asked for."""
    return llm_of(speak(build_tiny_model(family)), method, **{**OPTIONS, **options})


PROMPTS = [prompt(n, seed=n) for n in (5, 130, 33, 70, 9)]


@pytest.mark.parametrize("method", ["knorm", "locret", "full", "h2o", "adakv", "sirllm", "kvzap"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_request_gets_among_others_what_it_gets_alone(method: str, exact: bool) -> None:
    """Exact: what `generate` gives. Otherwise: what the same scheduler gives it alone, and here that is the same."""
    llm = talker(method)
    scheduler = llm.scheduler(slots=3, exact=exact)
    requests = [scheduler.submit(ids, max_new_tokens=20 + i) for i, ids in enumerate(PROMPTS)]
    scheduler.run()
    for i, (ids, request) in enumerate(zip(PROMPTS, requests, strict=True)):
        alone = llm.generate(ids, max_new_tokens=20 + i)
        if not exact:
            other = llm.scheduler(slots=3, exact=False).submit(ids, max_new_tokens=20 + i)
            assert request.output.tokens == other.wait().tokens
        assert request.output.tokens == alone.tokens  # type: ignore[union-attr]
        assert request.output.text == alone.text  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["gemma2-window", "phi3", "smollm3"])
def test_families_too(family: str) -> None:
    llm = talker(family=family)
    requests = [(s := llm.scheduler(slots=4)).submit(ids, max_new_tokens=9) for ids in PROMPTS]
    assert [r.wait().tokens for r in requests] == [
        llm.generate(ids, max_new_tokens=9).tokens for ids in PROMPTS  # type: ignore[union-attr]
    ]  # fmt: skip
    assert s.free_slots == 4


def logits_of(scheduler: Scheduler, mine: Request, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Run to the end; what the tokens of one request were chosen from, [n, V]."""
    seen: list[torch.Tensor] = []
    choose = scheduler._chosen

    def watch(requests: list[Request], x: torch.Tensor) -> torch.Tensor:
        seen.extend(row.clone() for request, row in zip(requests, x, strict=True) if request is mine)
        return choose(requests, x)

    monkeypatch.setattr(scheduler, "_chosen", watch)
    scheduler.run()
    return torch.stack(seen)


def test_logits_of_a_padded_batch_do_not_depend_on_the_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: the promise behind `exact=False`."""
    llm = talker()

    def logits(others: int) -> torch.Tensor:
        scheduler = llm.scheduler(slots=4, exact=False)
        mine = scheduler.submit(PROMPTS[1], max_new_tokens=6)
        for ids in PROMPTS[2 : 2 + others]:
            scheduler.submit(ids, max_new_tokens=30)
        return logits_of(scheduler, mine, monkeypatch)

    alone = logits(0)
    assert len(alone) == 6
    assert torch.equal(alone, logits(3))


def test_own_sampling_and_stop_of_each() -> None:
    llm = talker()
    scheduler = llm.scheduler(slots=4)
    wanted = [
        dict(max_new_tokens=8), dict(max_new_tokens=12, temperature=1.3, seed=7, top_k=9),
        dict(max_new_tokens=10, repetition_penalty=1.4), dict(max_new_tokens=60, stop=("a",), temperature=1.0, seed=1),
    ]  # fmt: skip
    requests = [scheduler.submit("tell me", **each) for each in wanted]
    scheduler.run()
    for each, request in zip(wanted, requests, strict=True):
        alone = llm.generate("tell me", **each)  # type: ignore[arg-type]
        assert (request.output.text, request.output.tokens) == (alone.text, alone.tokens)  # type: ignore[union-attr]
        assert request.output.finish_reason == alone.finish_reason  # type: ignore[union-attr]


def test_streams_are_the_text_in_pieces() -> None:
    scheduler = talker().scheduler(slots=2)
    heard: list[str] = []
    first = scheduler.submit("one", max_new_tokens=12, on_text=heard.append)
    second = scheduler.submit("two", max_new_tokens=5)
    pieces = list(first)
    assert len(pieces) > 3
    assert "".join(pieces) == first.output.text == "".join(heard)
    assert "".join(second) == second.output.text
    assert second.output.stats.new_tokens == 5
    assert first.first_token_seconds is not None


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    """In chunks: the long prompt has 64; the short one's single chunk comes after two at most."""
    scheduler = talker().scheduler(slots=3)
    long = scheduler.submit(prompt(1000), max_new_tokens=2)
    scheduler.step()
    short = scheduler.submit(prompt(12), max_new_tokens=2)
    rounds = 0
    while not short.tokens:
        scheduler.step()
        rounds += 1
    assert rounds <= 4  # the local window is a chunk of its own
    assert long.status is Status.PREFILL
    assert long._left > 800


def test_a_long_prompt_gets_every_second_chunk_at_least() -> None:
    """A stream of short prompts does not starve it."""
    scheduler = talker().scheduler(slots=3, chunk_seconds=1e9)
    long = scheduler.submit(prompt(330), max_new_tokens=1)
    rounds = 0
    while not long.finished:
        while len(scheduler.requests) + len(scheduler.waiting) < 6:
            scheduler.submit(prompt(12), max_new_tokens=1)
            scheduler.step()
            rounds += 1
        scheduler.step()
        rounds += 1
        assert rounds < 120
    assert long.output.stats.prompt_tokens == 330


def test_long_prompts_leave_a_slot_free() -> None:
    scheduler = talker().scheduler(slots=2)
    for _ in range(3):
        scheduler.submit(prompt(300), max_new_tokens=2)
    scheduler.step()
    assert (len(scheduler.requests), len(scheduler.waiting)) == (1, 2)
    short = scheduler.submit(prompt(9), max_new_tokens=2)
    scheduler.step()
    assert short in scheduler.requests


def test_priority_goes_first() -> None:
    scheduler = talker().scheduler(slots=1)
    done: list[int] = []
    for i, priority in enumerate((0, 5, 1)):
        scheduler.submit(prompt(9, i), priority=priority, max_new_tokens=1, on_text=lambda _, i=i: done.append(i))
    scheduler.run()
    assert done == [1, 2, 0]


def test_prefill_between_two_decode_steps_is_bounded() -> None:
    """A clock that ticks a second a look: every chunk takes one. 3 s a round pay for 3; 0.5 s for every second."""
    for seconds, chunks in ((3.0, 3.0), (0.5, 0.5)):
        ticks = iter(range(10**6))
        scheduler = talker().scheduler(slots=3, chunk_seconds=seconds, clock=lambda ticks=ticks: float(next(ticks)))
        assert chunks_a_round(scheduler, 20) == pytest.approx(chunks, abs=0.1)


def chunks_a_round(scheduler: Scheduler, rounds: int) -> float:
    """Of 16 tokens, of a long prompt that comes while another request answers; the first rounds are not looked at."""
    answering = scheduler.submit(prompt(9), max_new_tokens=200)
    while not answering.tokens:
        scheduler.step()
    long = scheduler.submit(prompt(2000), max_new_tokens=1)
    for _ in range(4):
        scheduler.step()
    left, tokens = long._left, len(answering.tokens)
    for _ in range(rounds):
        scheduler.step()
    assert len(answering.tokens) == tokens + rounds
    return (left - long._left) / 16 / rounds


class Device:
    """A GPU to the scheduler's eyes: chunks are launched in no time and take a second each; a decode step waits."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.launched = self.done = 0.0  # seconds of work
        self.marks = 0
        self.decode = scheduler._decode

    def mark(self) -> Any:
        self.marks += 1
        self.launched += (self.marks + 1) % 2  # the second one of a chunk lies behind it
        return Event(self, self.launched)

    def step(self) -> None:
        self.decode()
        self.done = self.launched


class Event:
    def __init__(self, device: Device, at: float) -> None:
        self.device, self.at = device, at

    def query(self) -> bool:
        return self.device.done >= self.at

    def synchronize(self) -> None:
        self.device.done = max(self.device.done, self.at)

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


@pytest.mark.parametrize(("seconds", "chunks"), [(3.0, 3.0), (0.5, 0.5)])
def test_what_a_gpu_takes_for_a_chunk_counts_not_what_its_launch_takes(
    seconds: float, chunks: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's clock was taken once, which sees launches only: rounds then had as many chunks as there were."""
    scheduler = talker().scheduler(slots=3, chunk_seconds=seconds, clock=lambda: 0.0)
    device = Device(scheduler)
    monkeypatch.setattr(scheduler, "_mark", device.mark)
    monkeypatch.setattr(scheduler, "_decode", device.step)
    assert chunks_a_round(scheduler, 20) == pytest.approx(chunks)
    long = scheduler.requests[-1]
    scheduler.run()
    assert long.output.stats.prefill_seconds == len(long.cost.chunks)


@pytest.mark.gpu
def test_chunks_are_charged_what_a_gpu_takes_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits 20 ms on the device; the launches of the tiny model take some 2."""
    forward = Reader._forward

    def slow(*args: Any, **options: Any) -> Any:
        torch.cuda._sleep(40_000_000)
        return forward(*args, **options)

    monkeypatch.setattr(Reader, "_forward", slow)
    llm = llm_of(speak(build_tiny_model("llama", head_dim=64).cuda()), "full", **OPTIONS)
    scheduler = llm.scheduler(slots=3, chunk_seconds=0.01)
    assert 0.2 < chunks_a_round(scheduler, 40) < 0.6
    assert 0.015 < scheduler._token_seconds * 16 < 0.06


@pytest.mark.parametrize("when", ["waiting", "prefill", "decode"])
def test_cancelling_frees_the_slot_at_once(when: str) -> None:
    llm = talker()
    scheduler = llm.scheduler(slots=1)
    if when == "waiting":
        scheduler.submit(prompt(9), max_new_tokens=3)
    request = scheduler.submit(prompt(60), max_new_tokens=50)
    scheduler.step()
    while request.status != when:
        scheduler.step()
    free = scheduler.free_slots
    request.cancel()
    assert request.status is Status.CANCELLED
    assert scheduler.free_slots == free + (when != "waiting")
    assert scheduler.used_bytes == 0 or when == "waiting"
    assert request._reader is None
    assert request.output.finish_reason == "cancelled"
    after = scheduler.submit(PROMPTS[2], max_new_tokens=4)
    scheduler.run()
    assert after.output.tokens == llm.generate(PROMPTS[2], max_new_tokens=4).tokens  # type: ignore[union-attr]
    assert request.status is Status.CANCELLED


def test_cancelling_inside_its_own_callback() -> None:
    scheduler = talker().scheduler(slots=2)
    other = scheduler.submit(prompt(9), max_new_tokens=5)
    request = scheduler.submit(prompt(9), max_new_tokens=50, on_text=lambda _: request.cancel())
    scheduler.run()
    assert request.status is Status.CANCELLED
    assert len(request.tokens) == 1
    assert len(other.output.tokens) == 5


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("method", ["knorm", "full"])
def test_a_poisoned_request_fails_alone(method: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = speak(build_tiny_model("llama"))
    model.model.embed_tokens.weight[POISON] = float("nan")
    llm = llm_of(model, method, **OPTIONS)
    clean = [[t for t in ids if t != POISON] for ids in PROMPTS]
    scheduler = llm.scheduler(slots=6, exact=exact)
    requests = [scheduler.submit(ids, max_new_tokens=9) for ids in clean]
    bad = scheduler.submit([*clean[2], POISON, *clean[2]], max_new_tokens=9)
    caches: dict[Request, Any] = {}
    start = scheduler._start

    def starting(request: Request) -> None:
        start(request)
        assert request._reader is not None
        caches[request] = weakref.ref(request._reader.cache)

    monkeypatch.setattr(scheduler, "_start", starting)
    scheduler.run()
    assert bad.status is Status.FAILED
    gc.collect()
    assert caches[bad]() is None, "the error's frames hold the cache"
    with pytest.raises(NumericsError, match="NaN"):
        _ = bad.output
    for ids, request in zip(clean, requests, strict=True):
        assert request.output.tokens == llm.generate(ids, max_new_tokens=9).tokens  # type: ignore[union-attr]


@pytest.mark.parametrize("exact", [True, False])
def test_poison_while_decoding_fails_alone(exact: bool) -> None:
    """The cache of one request is broken behind the scheduler's back."""
    llm = talker("full")
    scheduler = llm.scheduler(slots=4, exact=exact)
    bad, good = (scheduler.submit(ids, max_new_tokens=20) for ids in PROMPTS[1:3])
    while not (len(bad.tokens) > 2 and len(good.tokens) > 2):
        scheduler.step()
    assert bad._reader is not None
    with torch.inference_mode():
        bad._reader.cache.layers[0].slab.v.fill_(float("nan"))  # type: ignore[union-attr]
    scheduler.run()
    assert bad.status is Status.FAILED
    assert isinstance(bad.error, NumericsError)
    assert good.output.tokens == llm.generate(PROMPTS[2], max_new_tokens=20).tokens  # type: ignore[union-attr]


@pytest.mark.parametrize("ahead", [True, False])
def test_no_memory_for_a_longer_neighbour_harms_nobody(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slab longer than any before needs a new capture."""
    llm = talker("full")
    scheduler = llm.scheduler(slots=4, exact=False)
    lengths = (20, 20, 1500)
    requests = [scheduler.submit(prompt(length, i), max_new_tokens=30) for i, length in enumerate(lengths[:2])]
    while len(requests[0].tokens) < 5:
        scheduler.step()
    assert scheduler._together is not None
    graph = scheduler._together.graph
    assert graph is not None
    monkeypatch.setattr(graph, "ahead", ahead)

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory for a capture")

    monkeypatch.setattr(graph._step, "prepare", full)
    requests.append(scheduler.submit(prompt(lengths[2], 2), max_new_tokens=5))
    scheduler.run()
    for i, request in enumerate(requests):
        alone = llm.generate(prompt(lengths[i], i), max_new_tokens=len(request.output.tokens))
        assert request.output.tokens == alone.tokens  # type: ignore[union-attr]
    assert [len(request.tokens) for request in requests] == [30, 30, 5]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}])
def test_infinite_logits_fail_their_request(sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    llm = talker("full")
    scheduler = llm.scheduler()
    request = scheduler.submit(prompt(20), max_new_tokens=9, **sampling)
    while not request.tokens:
        scheduler.step()
    assert request._reader is not None
    monkeypatch.setattr(request._reader, "step", lambda tokens: torch.full((1, 300), math.inf))
    scheduler.run()
    with pytest.raises(NumericsError, match="infinite"):
        _ = request.output


def test_an_interrupted_step_fails_what_it_was_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the token was read is not known, so nothing is made up."""
    llm = talker("full")
    scheduler = llm.scheduler()
    request, waiting = (scheduler.submit(prompt(20, i), max_new_tokens=9) for i in range(2))
    while not request.tokens:
        scheduler.step()

    def interrupted(tokens: Any) -> None:
        raise KeyboardInterrupt

    assert request._reader is not None
    monkeypatch.setattr(request._reader, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scheduler.run()
    assert request.status is Status.FAILED
    scheduler.run()
    assert waiting.finished
    after = scheduler.submit(prompt(20), max_new_tokens=3)
    scheduler.run()
    assert len(after.output.tokens) == 3


def test_what_never_fits_is_refused_with_the_arithmetic() -> None:
    llm = talker("full")
    small = llm.scheduler().submit(prompt(40), max_new_tokens=5).cost
    scheduler = llm.scheduler(max_bytes=2 * _needed([small]))
    with pytest.raises(CapacityError, match=r"can never be admitted: slabs [\d,]+ B \+ .* = [\d,]+ B, and the limit"):
        scheduler.submit(prompt(1000), max_new_tokens=5)
    assert not scheduler.step()


def test_what_does_not_fit_now_waits() -> None:
    llm = talker()
    one = llm.scheduler().submit(prompt(130), max_new_tokens=5).cost
    limit = _needed([one, one]) + one.slabs // 2
    scheduler = llm.scheduler(slots=8, max_bytes=limit)
    requests = [scheduler.submit(prompt(130, i), max_new_tokens=5) for i in range(5)]
    most = 0
    while scheduler.step():
        most = max(most, len(scheduler.requests))
        assert scheduler.used_bytes <= limit
    assert most == 2
    assert all(r.status is Status.DONE for r in requests)


def test_counted_bytes_are_allocated_bytes() -> None:
    """And there is one workspace for all."""
    scheduler = talker().scheduler(slots=4)
    for n in (20, 130, 60):
        scheduler.submit(prompt(n), max_new_tokens=30)
    while any(r.status is not Status.DECODE for r in scheduler.requests) or not scheduler.requests:
        scheduler.step()
    caches = [r._reader.cache for r in scheduler.requests if r._reader is not None]
    assert [r.cost.slabs for r in scheduler.requests] == [c.nbytes for c in caches]
    assert len({id(c.workspace) for c in caches}) == 1
    assert max(r.cost.workspace for r in scheduler.requests) == caches[0].workspace_bytes


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   CapacityError("no memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_out_of_memory_while_admitting_refuses_that_request_only(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = talker()
    scheduler = llm.scheduler(slots=3)
    good = scheduler.submit(PROMPTS[0], max_new_tokens=20)
    scheduler.step()
    bad, later = (scheduler.submit(ids, max_new_tokens=4) for ids in PROMPTS[1:3])
    start = Reader.start

    def no_memory(*args: Any, prompt_len: int, **options: Any) -> Reader:
        if prompt_len == len(PROMPTS[1]):
            raise error
        return start(*args, prompt_len=prompt_len, **options)

    monkeypatch.setattr(Reader, "start", no_memory)
    scheduler.run()
    monkeypatch.undo()
    assert bad.status is Status.FAILED
    with pytest.raises(CapacityError, match=r"out of memory .*slabs [\d,]+ B .*beside 1 other"):
        bad.wait()
    for ids, request, n in ((PROMPTS[0], good, 20), (PROMPTS[2], later, 4)):
        assert request.output.tokens == llm.generate(ids, max_new_tokens=n).tokens  # type: ignore[union-attr]


def test_requests_from_other_threads() -> None:
    llm = talker()
    scheduler = llm.scheduler(slots=3)
    requests: list[Any] = []

    def submit(i: int) -> None:
        requests.append(scheduler.submit(prompt(9 + i), max_new_tokens=3))

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    while len(requests) < 8 or scheduler.step():
        pass
    assert all(len(r.output.tokens) == 3 for r in requests)


def test_protected_text_stays() -> None:
    llm = talker()
    text = "x" * 50 + "the code is 4711" + "y" * 90
    request = llm.scheduler().submit(text, protect=("4711",), max_new_tokens=8)
    assert request.wait().tokens == llm.generate(text, protect=("4711",), max_new_tokens=8).tokens  # type: ignore


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: talker().scheduler(slots=0), "slots is 0"),
        (lambda: talker().scheduler(chunk_seconds=-1), "chunk_seconds is -1"),
        (lambda: talker().scheduler().submit("a", max_tokens=3), "max_new_tokens"),
        (lambda: talker().scheduler().submit("  "), "prompt is empty"),
    ],
)
def test_bad_input_says_what_is_allowed(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_the_public_way_in() -> None:
    assert isinstance(talker().scheduler(), Scheduler)
