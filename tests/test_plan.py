"""The plan's bytes are those that a run measures; its seconds are a roofline worked by hand."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from conftest import FAMILIES, build_tiny_model
from oracles import llm_of, tokens
from torch import nn

from locret.backbone import Backbone
from locret.cli import main
from locret.config import CacheConfig
from locret.errors import BackboneError, ConfigError
from locret.plan import (
    CARDS,
    Card,
    Shape,
    _most_rotated,
    decode_work,
    footprint,
    get_card,
    make_plan,
    prefill_work,
    shape_config,
    stand_in_method,
)

SLOW = Card("slow", 10**9, bandwidth=1e6, flops=1e7, source="made up")


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_of_a_config_is_what_the_loaded_model_has(family: str) -> None:
    model = build_tiny_model(family)
    backbone, shape = Backbone(model), Shape.of(model.config)
    assert shape.windows == tuple(layer.window for layer in backbone.layers)
    assert (shape.num_q_heads, shape.num_kv_heads, shape.head_dim) == (
        backbone.num_q_heads, backbone.num_kv_heads, backbone.head_dim)  # fmt: skip
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_matmul_counts_the_linears_of_a_dense_model_and_active_experts_of_a_mixture() -> None:
    model = build_tiny_model("llama")
    linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    assert Shape.of(model.config).matmul == sum(m.weight.numel() for m in linears)
    moe = build_tiny_model("qwen3-moe")
    experts = sum(p.numel() for name, p in moe.named_parameters() if ".experts." in name)
    rest = sum(p.numel() for name, p in moe.model.layers.named_parameters() if p.dim() > 1 and ".experts." not in name)
    assert Shape.of(moe.config).matmul == rest + experts // 2  # 2 of 4


RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "knorm", dict(budget=40, chunk_size=16)),
    ("llama", "knorm", dict(budget=40, chunk_size=16, positions="original")),
    ("llama", "knorm", dict(budget=40, chunk_size=200)),  # one chunk, up to the local window
    ("llama", "knorm", dict(budget=500)),  # holds everything
    ("llama", "locret", dict(budget=33, chunk_size=50)),
    ("llama", "full", dict(chunk_size=16)),
    ("llama", "knorm", dict(budget=40, chunk_size=16, storage="int4")),
    ("llama", "streamingllm", dict(budget=40, chunk_size=16)),
    ("mistral-window", "knorm", dict(budget=40, chunk_size=16)),
    ("gemma2-window", "knorm", dict(budget=40, chunk_size=16)),
    ("llama", "sirllm", dict(budget=40, chunk_size=16)),
]


def test_rotated_keys_of_a_chunk_that_stays_beside_the_slab_are_of_one_part_at_a_time() -> None:
    edges = [0, 16, 32, 48, 64]
    assert _most_rotated(20, 21, edges, 70) == 21  # the step behind a full cache; slab or chunk before
    assert _most_rotated(10, 11, edges, 70) == 16
    assert _most_rotated(20, 70, edges, 70) == 36  # joined
    assert _most_rotated(70, 70, edges, 70) == 69


@pytest.mark.parametrize(("family", "method", "options"), RUNS, ids=lambda value: str(value)[:40])
def test_planned_bytes_are_measured_bytes(family: str, method: str, options: dict[str, Any]) -> None:
    llm = llm_of(family, method, **options)
    llm.backbone.model.generation_config.eos_token_id = None  # every answer has its full length
    output = llm.generate(tokens(123)[0].tolist(), max_new_tokens=7)
    shape = Shape.of(llm.backbone.model.config)
    one = footprint(shape, stand_in_method(method), CacheConfig(**options), prompt_len=123, new_tokens=7,
                    dtype=torch.float32)  # fmt: skip
    assert one.slabs == output.stats.kv_bytes
    assert one.peak == output.stats.peak_kv_bytes
    assert sum(one.chunks) == 123


def test_work_by_hand() -> None:
    """One chunk of 4 behind nothing, then 2 behind 4; one layer, 1 head of 2, so K + V of a unit are 16 bytes."""
    shape = Shape("hand", 2, 4, 1, 1, 2, 10, (None,), 100, matmul=30, output=20, max_length=64)
    method = stand_in_method("knorm")
    config = CacheConfig(budget=64, chunk_size=4, num_sinks=0, local_window=0)
    one = footprint(shape, method, config, prompt_len=6, new_tokens=1, dtype=torch.float32)
    assert one.chunks == (4, 2)
    work = prefill_work(shape, one, method, torch.float32)
    assert work.parts == ((2 * 4 * 30 + 4 * 4 * 2 * 2.5, 120), (2 * 2 * 30 + 4 * 2 * 2 * 5.5, 120 + 4 * 16))
    assert work.seconds(SLOW) == pytest.approx(120e-6 + 184e-6)  # bytes bind
    assert work.seconds(dataclasses.replace(SLOW, flops=1e6)) == pytest.approx(320e-6 + 208e-6)  # FLOP bind
    step = decode_work(shape, one, torch.float32, rows=3, prompt_len=6)
    assert step.parts == ((2 * 3 * 50 + 4 * 3 * 2 * 7, 50 * 4 + 3 * 7 * 16),)


def test_llama_8b_on_an_h200_is_near_what_was_measured() -> None:
    """Measured (specs/engine.md 2.3, 2.4): prefill 18,722 to 23,135 tok/s, decode floor 4.2 ms, peak 18.9 GB."""
    shape = Shape.of(shape_config("llama-3.1-8b"))
    assert shape.parameters == 8_030_261_248
    plan = make_plan(shape, get_card("h200"), context=131_072, budget=16384)
    assert 20_000 < 131_072 / plan.prefill_seconds < 40_000
    assert plan.decode_seconds == pytest.approx(4.2e-3, rel=0.1)
    assert 18.0e9 < plan.peak_bytes < 20e9
    assert plan.fits
    assert plan.full_cache_bytes == (131_072 + 256) * 131_072


def test_without_a_budget_the_largest_that_fits_is_found() -> None:
    shape = Shape.of(shape_config("llama-3.1-8b"))
    plan = make_plan(shape, get_card("rtx-4090"), context=131_072, users=2, new_tokens=64)
    assert plan.budget is not None
    assert plan.fits
    options: dict[str, Any] = dict(context=131_072, users=2, new_tokens=64, budget=plan.budget + 1)
    assert not make_plan(shape, plan.card, chunk_size=3072, **options).fits
    assert make_plan(shape, plan.card, **options).chunk_size < plan.chunk_size == 3072
    everything = make_plan(shape, get_card("h200"), context=4096, new_tokens=10)
    assert everything.budget == 4106
    many = make_plan(shape, get_card("rtx-4090"), context=131_072, users=600)
    assert many.fits
    assert many.budget is not None
    assert many.budget < 256
    little = get_card("rtx-4090", memory=17_000_000_000)  # not even for what is pinned
    pinned = make_plan(shape, little, context=131_072, num_stabilizers=3000)
    assert not pinned.fits
    assert pinned.budget is not None
    assert pinned.budget > 3000
    assert make_plan(shape, get_card("h200"), context=1, new_tokens=1).fits
    nothing = make_plan(shape, get_card("rtx-4090", memory=10**10), context=131_072)
    assert not nothing.fits
    assert nothing.to_dict()["free_bytes"] < 0


def test_quantised_units_leave_room_for_more() -> None:
    shape, card = Shape.of(shape_config("llama-3.1-8b")), get_card("rtx-4090")
    dense, int4 = (make_plan(shape, card, context=500_000, storage=s).budget for s in ("dense", "int4"))
    assert dense is not None
    assert int4 is not None
    assert int4 > 2 * dense


def test_the_arithmetic_of_the_cache_multiplies_out() -> None:
    plan = make_plan(Shape.of(shape_config("2x64x96x8x2x264")), SLOW, context=500, users=3, budget=100)
    item = plan.items[1]
    assert "3 users x (2 layers x 101 units x 2 KV heads x 41 B a unit" in item.arithmetic
    assert f"= {2 * 101 * 2 * 41:,}," in item.arithmetic


def test_what_is_given_replaces_the_table() -> None:
    card = get_card("h200", memory=5, bandwidth=7.0, flops=9.0)
    assert (card.memory, card.bandwidth, card.flops) == (5, 7.0, 9.0)
    assert "given: memory, bandwidth, flops" in card.source
    assert len(CARDS) == len(set(CARDS))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_card("h20"), "did you mean 'h200'"),
        (lambda: get_card("h200", bandwidth=0.0), "bandwidth is 0.0; it must be positive"),
        (lambda: get_card("h200", flops=float("nan")), "flops is nan"),
        (lambda: shape_config("llama-3.1-8"), "did you mean 'llama-3.1-8b'"),
        (lambda: shape_config("2x65x96x8x2x264"), "multiple of 8 heads"),
        (lambda: make_plan(Shape.of(shape_config("2x64x96x8x2x264")), SLOW, context=0), "context is 0"),
        (lambda: make_plan(Shape.of(shape_config("2x64x96x8x2x264")), SLOW, context=9, dtype="fp8"), "unknown dtype"),
        (lambda: make_plan(Shape.of(shape_config("2x64x96x8x2x264")), SLOW, context=9, method="nrom"), "knorm"),
    ],
)
def test_bad_input_says_what_is_allowed(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_missing_config_is_named(tmp_path: Any) -> None:
    with pytest.raises(BackboneError, match=r"config\.json"):
        Shape.load(str(tmp_path / "none"))


def test_the_command_prints_the_arithmetic_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--shape", "llama-3.1-8b", "--card", "rtx-4090", "--budget", "6000", "--users", "2"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "8,030,261,248 parameters" in text
    assert "fits" in text
    assert main(["plan", "--shape", "llama-3.1-8b", "--memory", "10GB", "--budget", "6000", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert not value["fits"]
    assert value["peak_bytes"] == sum(item["bytes"] for item in value["items"])
    assert main(["plan", "--json", "--context", "32768", "--budget", "2048"]) == 0  # the embedded model
    assert json.loads(capsys.readouterr().out)["budget"] == 2048


def test_a_memory_without_unit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--memory", "24"]) == 2
    assert "24GB or 16GiB" in capsys.readouterr().err
