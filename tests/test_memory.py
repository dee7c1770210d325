"""Chunks that nobody asked for are as long as memory allows, and the same for whoever must get the same."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from oracles import llm_of, method_of, reader_of, speak, tokens

from locret.attached import attach
from locret.backbone import Backbone
from locret.config import CacheConfig
from locret.context import Context
from locret.engine import LLM
from locret.errors import ConfigError
from locret.memory import RESERVE, free_bytes, longest_chunk, mlp_width, token_bytes
from locret.plan import RUNTIME_BYTES, Card, Shape, get_card, make_plan, shape_config
from locret.prefill import Reader
from locret.train.evicted import Learner, read_evicting

ROOT = Path(__file__).parent.parent
BUDGET, LENGTH = 1100, 2500
SHORT = pytest.warns(UserWarning, match=r"in chunks of 512 tokens: .*\(--chunk-size 512, chunk_size=512\)")


def talker(method: str = "knorm", **options: Any) -> LLM:
    """Never ends by itself."""
    return llm_of(speak(build_tiny_model("llama")), method, **{"budget": BUDGET, **options})


def prompt(length: int = LENGTH, seed: int = 0) -> list[int]:
    return tokens(length, seed=seed)[0].tolist()


def room(llm: LLM, chunk: int, *, rows: int = 1) -> int:
    """Free bytes that are enough for so many tokens of a chunk and not for 256 more."""
    reader = reader_of(llm.backbone, llm.method, None, batch=rows, budget=BUDGET)
    return RESERVE + reader.layer_bytes + (chunk + 100) * reader.token_bytes


def limit(patch: pytest.MonkeyPatch, free: int | None) -> None:
    """What the device says is free; stand-ins of plans have no device."""
    for module in ("prefill", "scheduler"):
        patch.setattr(f"locret.{module}.free_bytes", lambda device: None if device.type == "meta" else free)


# ---------------------------------------------------------------------- the functions


@pytest.mark.parametrize(
    ("free", "each", "most", "chunk"),
    [
        (3072, 1, 3072, 3072), (3071, 1, 3072, 2816), (10**12, 999, 3072, 3072), (512_000, 1000, 3072, 512),
        (511_999, 1000, 3072, 256), (255_999, 1000, 3072, 256), (0, 1000, 3072, 256), (-(10**9), 1000, 3072, 256),
        (1000, 1, 1000, 1000), (999, 1, 1000, 768), (50, 1, 100, 100), (10**9, 1, 300, 300),
    ],
)  # fmt: skip
def test_the_longest_chunk_that_fits(free: int, each: int, most: int, chunk: int) -> None:
    assert longest_chunk(free, each, most) == chunk


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (dict(intermediate_size=14336), 14336),
        (dict(intermediate_size=[64, 96]), 96),
        (dict(), 4 * 2048),
        (dict(intermediate_size=6144, moe_intermediate_size=768, num_experts_per_tok=8), 8 * (768 + 2048)),
        (dict(intermediate_size=14336, num_experts_per_tok=2), 2 * (14336 + 2048)),
        (dict(intermediate_size=14336, num_experts_per_tok=None), 14336),
    ],
)
def test_width_of_an_mlp(config: dict[str, Any], width: int) -> None:
    assert mlp_width(SimpleNamespace(hidden_size=2048, **config)) == width


# MB that torch had allocated at most while a chunk was read, beside weights and slabs of 4,096 units: one H200, three
# layers, bfloat16, transformers 5.17's modules; (hidden, inner, query heads, KV heads, head dim, mixture), chunk, MB
MEASURED = [
    ((4096, 14336, 32, 8, 128, {}), 3072, 365.0),
    ((4096, 14336, 32, 8, 128, {}), 1024, 121.7),
    ((2048, 8192, 32, 8, 64, {}), 3072, 201.4),
    ((2048, 6144, 32, 4, 128, dict(moe_intermediate_size=768, num_experts_per_tok=8)), 3072, 454.5),
    ((4096, 14336, 32, 8, 128, dict(num_experts_per_tok=2)), 3072, 856.0),
]


@pytest.mark.parametrize(("shape", "chunk", "megabytes"), MEASURED)
def test_modules_take_what_is_estimated(shape: tuple[Any, ...], chunk: int, megabytes: float) -> None:
    hidden, inner, q_heads, kv_heads, dim, mixture = shape
    config = SimpleNamespace(hidden_size=hidden, intermediate_size=inner, **mixture)
    rotated = 4096 * kv_heads * dim * 2
    estimate = chunk * token_bytes(config, q_heads, kv_heads, dim, 2)
    assert 1.1 * (1e6 * megabytes - rotated) < estimate < 1.3 * (1e6 * megabytes - rotated)


def test_the_recorded_peak_of_llama_8b_is_below_the_plan_s_and_near_it() -> None:
    """Our own walk through the layers takes half of what the modules do or less; the heads' and cuBLAS's 0.1 GB are
    weights and runtime of the plan."""
    runs = json.loads((ROOT / "benchmarks" / "results" / "bench-h200.json").read_text())["runs"]
    rows = [row for run in runs if "--budget 16384" in run["command"] for row in run["rows"]
            if (row["engine"], row["length"], row["batch"]) == ("locret", 131_072, 1)]  # fmt: skip
    recorded = max(rows, key=lambda row: row["peak_bytes"])
    assert recorded["peak_bytes"] == pytest.approx(18.59e9, rel=1e-3)  # docs/bench.md
    plan = make_plan(Shape.of(shape_config("llama-3.1-8b")), get_card("h200"), context=131_072, budget=16384)
    assert plan.chunk_size == 3072
    weights, cache, _, scratch, activations, _ = (item.bytes for item in plan.items)
    took = recorded["peak_bytes"] - weights - cache
    assert took < scratch + activations < 2.5 * took


def test_without_a_gpu_nothing_is_asked_or_changed() -> None:
    assert free_bytes(torch.device("cpu")) is None
    assert free_bytes(torch.device("meta")) is None
    llm = talker()
    config = CacheConfig(budget=BUDGET)
    assert reader_of(llm.backbone, "knorm", LENGTH, budget=BUDGET).plan == config.resolve(
        prompt_len=LENGTH, unit_bytes=1
    )
    for budget, chunk in ((40, 256), (BUDGET, BUDGET), (16384, 3072)):
        assert reader_of(llm.backbone, "knorm", None, budget=budget).plan.chunk_size == chunk


# ---------------------------------------------------------------------- one reader


@pytest.mark.parametrize("method", ["knorm", "h2o", "sirllm", "full"])
def test_with_little_memory_a_prompt_is_read_as_with_the_smaller_chunk_given(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, asked = talker(method, num_sinks=4), talker(method, num_sinks=4, chunk_size=512)
    limit(monkeypatch, room(llm, 512))
    with SHORT:
        answer = llm.generate(prompt(), max_new_tokens=8)
    given = asked.generate(prompt(), max_new_tokens=8)
    assert not isinstance(answer, list)
    assert not isinstance(given, list)
    assert answer.tokens == given.tokens
    assert answer.stats.chunk_size == given.stats.chunk_size == 512
    assert answer.to_dict()["chunk_size"] == 512


def test_a_default_that_fits_and_a_prompt_that_fits_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are errors here."""
    llm = talker()
    limit(monkeypatch, room(llm, BUDGET))
    assert reader_of(llm.backbone, "knorm", LENGTH, budget=BUDGET).plan.chunk_size == BUDGET
    limit(monkeypatch, room(llm, 512))
    short = llm.generate(prompt(200), max_new_tokens=8)
    assert not isinstance(short, list)
    assert short.stats.chunk_size == BUDGET


def test_a_chunk_size_that_was_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = talker(chunk_size=2000)
    limit(monkeypatch, 0)
    reader = reader_of(llm.backbone, "knorm", LENGTH, budget=BUDGET, chunk_size=2000)
    assert (reader.plan.chunk_size, reader.cache.chunk_size) == (2000, 2000)
    scheduler = llm.scheduler(max_bytes=10**9)
    assert scheduler.submit(prompt(), max_new_tokens=2).wait().stats.chunk_size == 2000


def test_no_chunk_is_shorter_than_256(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether even that fits, the allocation itself says."""
    limit(monkeypatch, 0)
    with pytest.warns(UserWarning, match="chunks of 256 tokens"):
        assert reader_of(talker().backbone, "knorm", LENGTH, budget=BUDGET).plan.chunk_size == 256
    assert reader_of(talker().backbone, "knorm", LENGTH, budget=200).plan.chunk_size == 256


def test_a_layer_s_turn_by_hand() -> None:
    """Rotated keys, and slots of all layers; of codes also what is decoded; where logits are capped, three copies of
    256 rows of them."""
    backbone = talker().backbone
    keys = 3 * backbone.num_kv_heads * (BUDGET + 1) * backbone.head_dim * 4
    for storage, copies in (("dense", 1), ("int4", 3)):
        reader = reader_of(backbone, "knorm", None, batch=3, budget=BUDGET, storage=storage)
        slots = 4 * 3 * backbone.num_kv_heads * (BUDGET + 1) * backbone.num_layers
        assert reader.layer_bytes == copies * keys + slots
    capped = Backbone(build_tiny_model("gemma2-window"))
    reader = reader_of(capped, "knorm", None, batch=3, budget=BUDGET)
    keys = 3 * capped.num_kv_heads * (BUDGET + 1) * capped.head_dim * 4
    assert reader.layer_bytes == keys + 3 * 256 * 4 * 3 * capped.num_q_heads * (2 * BUDGET + 1)


def test_rows_of_a_batch_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = talker()
    limit(monkeypatch, room(llm, 512, rows=3))
    with SHORT:
        outputs = llm.generate([prompt(seed=i) for i in range(3)], max_new_tokens=2)
    assert isinstance(outputs, list)
    assert [each.stats.chunk_size for each in outputs] == [512] * 3


def test_a_window_longer_than_the_shortened_chunk_is_refused_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = talker().backbone
    method = method_of("snapkv", backbone, window=300)
    limit(monkeypatch, 0)
    with (
        pytest.warns(UserWarning, match="chunks of 256 tokens"),
        pytest.raises(ConfigError, match="window 300 is larger than the chunk"),
    ):
        reader_of(backbone, method, LENGTH, budget=BUDGET)


def test_a_context_keeps_its_chunk_when_memory_is_free_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    llm = talker()
    limit(monkeypatch, room(llm, 512))
    with SHORT:
        context = llm.compress(prompt())
    limit(monkeypatch, 10**12)
    context.save(tmp_path / "short.ctx")
    for each in (context, context.fork(), Context.load(tmp_path / "short.ctx", llm)):
        assert (each.plan.chunk_size, each._reader.cache.chunk_size) == (512, 512)
        each.append(prompt(900, seed=3))
        assert each.held == context.held


def test_groups_of_attach_leave_room_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's cache is there before the second one's, which takes some of what was free."""
    model = speak(build_tiny_model("llama"))
    started: list[Reader] = []
    llm = talker()
    left = iter([10**12, 10**12, room(llm, 512), room(llm, 512)])  # two starts, and once more for each
    monkeypatch.setattr("locret.prefill.free_bytes", lambda device: next(left))
    allocate = Reader._allocate.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Reader, "_allocate", classmethod(lambda cls, *args: started.append(allocate(cls, *args)) or started[-1])
    )
    ids = torch.cat([tokens(LENGTH, seed=1), tokens(LENGTH, seed=2)])
    mask = torch.ones_like(ids)
    mask[0, :300] = 0
    with attach(model, method="knorm", budget=BUDGET), SHORT:
        model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    assert [reader.plan.chunk_size for reader in started] == [512, 512]


def test_training_reads_the_same_chunks_whatever_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on after a kill gives the same heads; warnings are errors here."""
    llm = talker("locret")
    sizes: list[int] = []

    def learn(layer: int, inputs: Any, start: int) -> torch.Tensor:
        sizes.append(inputs.k.shape[2])
        return inputs.k.float().norm(dim=-1)

    limit(monkeypatch, 0)
    learner = Learner(llm.method.heads, learn)  # type: ignore[attr-defined]
    read_evicting(llm.backbone, learner, CacheConfig(budget=BUDGET), SimpleNamespace(prompt_ids=prompt()))  # type: ignore[arg-type]
    assert max(sizes) == BUDGET


# ---------------------------------------------------------------------- many requests


@pytest.mark.parametrize("exact", [True, False])
def test_all_requests_of_a_scheduler_have_the_chunk_of_its_start(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is free when they come, so that a request gets among others what it gets alone."""
    llm, asked = talker(), talker(chunk_size=512)
    one = asked.scheduler(max_bytes=10**12).submit(prompt(), max_new_tokens=8).cost
    caches = 3 * (one.slabs + one.rope) + one.workspace + one.scratch
    limit(monkeypatch, caches + room(llm, 512))
    scheduler = llm.scheduler(slots=3, max_bytes=10**12, exact=exact)
    prompts = [prompt(length, seed=length) for length in (LENGTH, 1300, 700, 2000)]
    requests = []
    with SHORT:
        for number, ids in enumerate(prompts):
            limit(monkeypatch, number * 10**9)
            requests.append(scheduler.submit(ids, max_new_tokens=8))
            scheduler.step()
        scheduler.run()
    limit(monkeypatch, None)
    for ids, request in zip(prompts, requests, strict=True):
        alone = asked.scheduler(slots=3, exact=exact).submit(ids, max_new_tokens=8).wait()
        assert request.output.tokens == alone.tokens
        assert request.output.stats.chunk_size == request.cost.plan.chunk_size == 512
        assert max(request.cost.chunks) <= 512


def test_a_scheduler_leaves_caches_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default nine tenths of what is free are theirs; the rest, or what full slots leave, is for a chunk."""
    llm = talker()
    limit(monkeypatch, 10**11)
    assert llm.scheduler(slots=1)._most_chunk == 3072
    assert llm.scheduler(slots=10**9)._most_chunk == 3072  # of a tenth of 100 GB
    assert llm.scheduler(slots=10**9, max_bytes=10**11)._most_chunk == 256
    assert llm.scheduler().max_bytes == 9 * 10**10
    share = talker(budget="5%").scheduler(max_bytes=10**11)  # of long prompts
    assert share._most_chunk == 3072
    assert talker(budget=20, num_stabilizers=30).scheduler()._most_chunk == 3072  # no request can have that budget


# ---------------------------------------------------------------------- plans


def card(memory: int) -> Card:
    return Card("small", memory, 1e12, 1e14, "made up")


def test_a_plan_has_the_chunk_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = talker()
    shape = Shape.of_backbone(llm.backbone)
    weights = sum(p.numel() for p in llm.backbone.model.parameters()) * 4
    chunks = []
    for spare in (0, 300, 500, 600, 800, 10_000):
        free = RESERVE + spare * reader_of(llm.backbone, "knorm", None, budget=BUDGET).token_bytes
        reader = reader_of(llm.backbone, "knorm", LENGTH, budget=BUDGET)
        cache = reader.cache.nbytes + 2 * reader.rope.length * llm.backbone.head_dim * 4
        plan = make_plan(shape, card(free + RUNTIME_BYTES - RESERVE + weights + cache), context=LENGTH, new_tokens=8,
                         budget=BUDGET, method="knorm", dtype="float32")  # fmt: skip
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            limit(patch, free)
            reader = reader_of(llm.backbone, "knorm", LENGTH, budget=BUDGET)
        chunks.append((plan.chunk_size, reader.plan.chunk_size))
    # the plan counts a CPU's compaction, which takes a little more: at most one step less
    assert all(0 <= run - planned <= 256 for planned, run in chunks), chunks
    assert chunks[0] == (256, 256)
    assert chunks[-1] == (BUDGET, BUDGET)
    assert len(set(chunks)) > 2


def test_a_12_gb_card_gets_a_shorter_chunk_only_where_its_budget_leaves_too_little() -> None:
    shape = Shape.of(shape_config("llama-3.2-1b"))
    options: dict[str, Any] = dict(context=500_000, method="recency")
    small = get_card("rtx-4090", memory=12 * 10**9)
    roomy = make_plan(shape, small, budget=16384, **options)
    assert roomy.fits
    assert roomy.chunk_size == 3072
    largest = make_plan(shape, small, **options)  # chosen beside whole chunks
    assert largest.fits
    assert largest.chunk_size == 3072
    assert largest.budget is not None
    tight = make_plan(shape, small, budget=largest.budget + 2000, **options)
    assert tight.fits
    assert 256 <= tight.chunk_size < 3072
    assert tight.chunk_size % 256 == 0
    assert make_plan(shape, small, budget=largest.budget + 2000, chunk_size=3072, **options).chunk_size == 3072
    assert not make_plan(shape, small, budget=2 * largest.budget, **options).fits
    bare = get_card("rtx-4090", memory=roomy.items[0].bytes + RUNTIME_BYTES + 120 * 10**6)  # for no whole chunk
    plan = make_plan(shape, bare, **options)
    assert plan.fits
    assert plan.chunk_size < 3072


# ---------------------------------------------------------------------- a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False])
def test_a_gpu_with_little_left_reads_a_prompt_without_running_out(fused: bool) -> None:
    """torch may have 180 MiB more than is set aside, for the cache and a chunk of which a token takes 138 kB."""
    device, before = torch.device("cuda"), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            wide = dict(hidden_size=2048, intermediate_size=16384, num_attention_heads=16, num_key_value_heads=8)
            model = build_tiny_model("llama-plain", head_dim=128, **wide)
    finally:
        torch.set_default_dtype(before)
    backbone = Backbone(model.to(device).eval())
    assert backbone.fused is not None
    if not fused:
        backbone.fused = None
    method = method_of("knorm", backbone)
    ids = tokens(20_000)
    total = torch.cuda.mem_get_info()[1]

    def read(chunk_size: int | None, spare: int) -> int:
        torch.cuda.empty_cache()
        allowed = torch.cuda.memory_reserved() + spare
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        try:
            config = CacheConfig(budget=4096, chunk_size=chunk_size)
            reader = Reader.start(backbone, method, config, batch=1, prompt_len=ids.shape[1], new_tokens=1)
            with torch.inference_mode():
                reader.read(ids)
            torch.cuda.synchronize()
            return reader.plan.chunk_size
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    assert read(None, 8 * 2**30) == 3072
    with pytest.warns(UserWarning, match="in chunks of"):
        chosen = read(None, RESERVE + 180 * 2**20)
    assert 256 <= chosen < 2048
