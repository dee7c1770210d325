"""The benchmark runs all engines on the same weights and says what it measured; its numbers are not judged here."""

from __future__ import annotations

import contextlib
import itertools
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from oracles import llm_of

from locret import bench
from locret.bench import Card, Report, Row, Spread, random_llm, svg
from locret.cli import main
from locret.cli.bench import _show
from locret.config import CacheConfig
from locret.errors import CapacityError, ConfigError
from locret.plan import Shape, footprint, prefill_work, stand_in_method

OPTIONS: dict[str, Any] = dict(budget=40, chunk_size=16)


def test_every_engine_length_and_batch_is_a_row() -> None:
    llm = llm_of(**OPTIONS)
    report = bench.run(llm, lengths=[90, 30], batches=[3, 1], new_tokens=4, repeats=2)
    cases = [(r.engine, r.length, r.batch) for r in report.rows]
    assert cases == [(e, n, b) for n in (30, 90) for e in ("locret", "transformers") for b in (1, 3)]
    for row in report.rows:
        assert (row.ttft is not None) == (row.batch == 1)
        assert row.tpot is not None
        assert 0 < row.tpot.low <= row.tpot.median <= row.tpot.high
        assert row.tpot_floor is not None
        assert row.tpot_floor > 0
        assert row.peak_bytes is None or row.peak_bytes > 2**20
    mine = next(r for r in report.rows if (r.engine, r.length, r.batch) == ("locret", 90, 3))
    one = footprint(Shape.of_backbone(llm.backbone), llm.method, llm.config, prompt_len=90, new_tokens=4,
                    dtype=torch.float32)  # fmt: skip
    assert mine.kv_bytes == 3 * one.slabs
    full = next(r for r in report.rows if (r.engine, r.length, r.batch) == ("transformers", 90, 3))
    assert full.kv_bytes == 3 * 93 * 2 * 2 * 8 * 2 * 4  # rows, tokens, layers, KV heads, D, K and V, fp32
    assert llm.backbone.model.config._attn_implementation == "sdpa"


def test_a_batch_does_not_pay_for_the_larger_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copies are gone when the peak starts anew."""
    llm = llm_of(**OPTIONS)
    engine, empty = bench._Locret(llm, Shape.of_backbone(llm.backbone)), []
    monkeypatch.setattr(bench, "_reset_peak", lambda device: empty.append(engine._reader is None))
    with torch.inference_mode():
        run = bench._case(engine, torch.arange(3, 60)[None], [3, 1], 3)
    assert run.tpot.keys() == {3, 1}
    assert empty == [True, True, True]


def test_the_two_engines_run_the_same_model() -> None:
    """With everything kept: equal logits, of the prompt and of a step at a batch."""
    llm = llm_of(budget=500, chunk_size=16)
    shape, ids = Shape.of_backbone(llm.backbone), bench._ids(llm, 50)
    logits = []
    with torch.inference_mode():
        for engine in (bench._Locret(llm, shape), bench._Full(llm, shape)):
            first = engine.start(ids, 4)
            engine.grow(2)
            logits.append(torch.cat((first, engine.step(first.argmax(-1).expand(2)))))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_floor_of_a_full_cache_counts_all_pairs() -> None:
    shape = Shape.of(build_tiny_model("llama").config)
    method = stand_in_method("full")
    one = footprint(shape, method, CacheConfig(), prompt_len=100, new_tokens=1, dtype=torch.float32)
    want = 2 * 100 * shape.matmul + 2 * 4 * 8 * 8 * 100 * 101 / 2
    assert prefill_work(shape, one, method, torch.float32).flop == want


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), CapacityError("no memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_out_of_memory_is_a_result(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU torch says it by a message only, which once ended the run."""

    def no_memory(self: Any, ids: Any, new_tokens: int) -> Any:
        raise error

    monkeypatch.setattr(bench._Full, "start", no_memory)
    report = bench.run(llm_of(**OPTIONS), lengths=[40], batches=[1], new_tokens=2, repeats=1)
    assert [r.failed for r in report.rows] == ["", "out of memory"]
    ratio = {"peer": "transformers", "length": 40, "batch": 1, "ttft": None, "tpot": None, "failed": "out of memory"}
    assert report.ratios() == [ratio]


def test_cudnn_is_left_out_where_there_is_none_and_the_report_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    report = bench.run(llm_of(**OPTIONS), lengths=[40], batches=[1], new_tokens=2, repeats=1)
    assert report.settings["peers"] == ["transformers"]
    assert report.settings["left_out"] == {"transformers-cudnn": "cuDNN needs a CUDA device"}
    _show(report)
    assert "transformers-cudnn left out: cuDNN needs a CUDA device" in capsys.readouterr().out
    alone = bench.run(llm_of(**OPTIONS), lengths=[40], batches=[1], new_tokens=2, repeats=1, peers=False)
    assert alone.settings["peers"] == []
    assert alone.settings["left_out"] == {}, "nobody asked for it"


def test_cudnn_alone_reads_the_prompt_and_takes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """At batch 1, with a ratio of its own. What sdpa is held to is only noted here: a CPU has no cuDNN."""
    held: list[list[str]] = []

    def note(kernels: Any) -> Any:
        held.append([kernel.name for kernel in kernels])
        return contextlib.nullcontext()

    monkeypatch.setattr(bench, "_without_cudnn", lambda backbone, batches: "")
    monkeypatch.setattr(bench, "sdpa_kernel", note)
    report = bench.run(llm_of(**OPTIONS), lengths=[40], batches=[1, 2], new_tokens=4, repeats=1)
    prompt, step = ["CUDNN_ATTENTION"], ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    assert held == [prompt, step, prompt, *[step] * 3]  # warms up with one step
    assert report.settings["peers"] == ["transformers", "transformers-cudnn"]
    assert [(r.engine, r.batch) for r in report.rows][2:] == [
        ("transformers", 1), ("transformers", 2), ("transformers-cudnn", 1),
    ]  # fmt: skip
    assert [(r["peer"], r["batch"]) for r in report.ratios()] == [(r.engine, r.batch) for r in report.rows][2:]


def test_attention_that_cudnn_refuses_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CPU does, where sdpa has nothing else to choose from."""
    monkeypatch.setattr(bench, "_without_cudnn", lambda backbone, batches: "")
    report = bench.run(llm_of(**OPTIONS), lengths=[40], batches=[1], new_tokens=2, repeats=1)
    assert [r.failed for r in report.rows] == ["", "", "cuDNN does not take this model's attention"]


@pytest.mark.gpu
def test_both_peers_on_a_gpu_give_the_same_logits() -> None:
    """The one by whatever torch chooses; the other's prompt by cuDNN, or torch would raise. fp32 is none of cuDNN's."""
    llm = llm_of(build_tiny_model("llama", head_dim=64).to("cuda", torch.bfloat16), **OPTIONS)
    shape, ids, logits = Shape.of_backbone(llm.backbone), bench._ids(llm, 50), []
    assert not bench._without_cudnn(llm.backbone, [1])
    with torch.inference_mode():
        for engine in (bench._Full(llm, shape), bench._Cudnn(llm, shape)):
            first = engine.start(ids, 4)
            engine.grow(1)
            logits.append(torch.cat((first, engine.step(torch.tensor([20], device="cuda")))).float())
    assert (logits[0] - logits[1]).norm() <= 3e-2 * logits[0].norm()
    report = bench.run(llm, lengths=[40], batches=[2, 1], new_tokens=3, repeats=1)
    assert [(r.engine, r.batch, r.failed) for r in report.rows] == [
        ("locret", 1, ""), ("locret", 2, ""), ("transformers", 1, ""), ("transformers", 2, ""),
        ("transformers-cudnn", 1, ""),
    ]  # fmt: skip
    whole = llm_of(build_tiny_model("llama", head_dim=64).cuda(), **OPTIONS)
    assert bench._without_cudnn(whole.backbone, [1]) == "cuDNN's attention takes bfloat16 and float16"


def made_up(ratio: float, device: str = "cpu", embedded: bool = True, cudnn: float | None = None) -> Report:
    speeds = {
        "locret": 2.0,
        "transformers": 2.0 * ratio,
        **({} if cudnn is None else {"transformers-cudnn": 2 * cudnn}),
    }
    rows = [
        Row(engine, length, 1, Spread(s, s, s), s / 2, Spread(1.0, 1.0, 1.0), 0.5)
        for length in (1024, 32_768)
        for engine, s in speeds.items()
    ]
    machine = {"device": device, "name": "a <cpu>"}
    settings = {"embedded": embedded, "model": "m", "method": "locret"}
    return Report(machine, Card("cpu", 0, 1e9, 1e9, ""), settings, rows)


def test_the_bar_speaks_only_of_its_own_case() -> None:
    assert (made_up(2.5).bar() or "").endswith("2.50x: met")
    assert (made_up(1.5).bar() or "").endswith("1.50x: missed")
    assert made_up(2.5, device="cuda").bar() is None
    assert made_up(2.5, embedded=False).bar() is None
    assert (made_up(2.5, cudnn=1.5).bar() or "").endswith("2.50x: met")


def test_the_plot_is_svg_with_a_line_for_each_case_and_its_floor() -> None:
    root = ET.fromstring(svg(made_up(2.5)))
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 8  # two panels, two engines, value and floor
    assert any("locret, batch 1" in (e.text or "") for e in root.iter())


def test_names_of_lines_that_end_together_do_not_lie_on_each_other() -> None:
    root = ET.fromstring(svg(made_up(2.5, cudnn=2.5)))  # decode steps of all three take the same time
    names = [(e.get("x"), float(e.get("y") or 0)) for e in root.iter() if (e.text or "").endswith("batch 1")]
    assert len(names) == 6
    for (x, y), (other_x, other_y) in itertools.combinations(names, 2):
        assert x != other_x or abs(y - other_y) >= 12


@pytest.mark.parametrize("method", ["locret", "sirllm"])
def test_random_weights_of_a_shape(method: str) -> None:
    llm = random_llm("2x64x96x8x2x264", device="cpu", dtype="auto", method=method, config=CacheConfig(**OPTIONS))
    report = bench.run(llm, lengths=[60], batches=[1, 2], new_tokens=3, repeats=1, peers=False)
    assert [(r.engine, r.batch) for r in report.rows] == [("locret", 1), ("locret", 2)]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "bench.svg"
    arguments = ["bench", "--shape", "2x64x96x8x2x264", "--device", "cpu", "--method", "knorm", "--budget", "40",
                 "--lengths", "60", "--batches", "1", "--new-tokens", "3", "--repeats", "1"]  # fmt: skip
    assert main([*arguments, "--json", "--plot", str(plot)]) == 0
    value = json.loads(capsys.readouterr().out)
    assert {"machine", "card", "settings", "rows", "ratios", "bar"} == set(value)
    assert value["rows"][0]["prefill_of_floor"] > 0
    assert plot.read_text().startswith("<svg")
    assert main(arguments) == 0
    assert "transformers' seconds / locret's: TTFT" in capsys.readouterr().out


def test_bad_numbers_say_what_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--lengths", "1k", "--shape", "2x64x96x8x2x264"]) == 2
    assert "1024,4096" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="repeats is 0"):
        bench.run(llm_of(**OPTIONS), lengths=[9], repeats=0)
