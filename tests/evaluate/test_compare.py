"""Cells and comparisons by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import build_byte_tokenizer, build_tiny_model
from eval_samples import grid, source

from locret.backbone import Backbone
from locret.errors import ConfigError
from locret.evaluate.compare import compare
from locret.evaluate.summary import load_results, summarise


def line(method: str, index: int, score: float, **more: Any) -> dict[str, Any]:
    turn = {"prediction": "x", "score": score, "tokens": 3 if method == "full" else 5, "nll": 1.0 + index,
            "delta": 0.5, "kl": 0.25, "agreement": 0.75}  # fmt: skip
    return {"task": "key", "length": 64, "seed": 0, "index": index, "method": method,
            "budget": None if method == "full" else 16, "sample": f"s{index}", "score": score, "turns": [turn],
            "prompt_tokens": 64, "units": 64 if method == "full" else 16, "kv_bytes": 100, "peak_kv_bytes": 200,
            "kv_bytes_full": 400, "depth": index / 4, "ceiling": 25.0 + index, "gold": 4, "kept": [[4, index], [0, 2]],
            "seconds": {"ttft": 1.0, "tpot": None}, **more}  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    backbone = Backbone(build_tiny_model("llama"), build_byte_tokenizer())
    lines = [line("full", i, 100.0) for i in range(4)] + [line("recency", i, 100.0 * (i % 2)) for i in range(4)]
    return summarise(grid(), backbone, source(), lines)


def test_cells_by_hand(results: dict[str, Any]) -> None:
    full, recency = results["cells"]
    assert (full["score"], recency["score"], recency["n"]) == (100.0, 50.0, 4)
    assert recency["against_full"] == -50.0
    assert recency["length_shift"] == 2.0
    assert "against_full" not in full
    assert (recency["nll"], recency["delta"], recency["kl"], recency["agreement"]) == (2.5, 0.5, 0.25, 0.75)
    assert recency["retention_map"] == [[1.0, 0.375], [0.0, 0.5]]
    assert recency["retention"] == pytest.approx((1 + 0.375 + 0 + 0.5) / 4, abs=1e-4)
    assert recency["ceiling"] == 26.5
    assert recency["depths"] == [0.0, 0.25, 0.5, 0.75]
    low, high = recency["interval"]
    assert 10 < low < 50 < high < 90


def test_compare_says_what_changed(results: dict[str, Any]) -> None:
    other = copy.deepcopy(results)
    other["cells"][1]["scores"] = [100.0] * 4
    found = compare(results, other)
    assert [(c.method, c.difference) for c in found.changes] == [("full", 0.0), ("recency", 50.0)]
    assert found.changes[1].p == 0.5  # two samples changed, both for the better: McNemar 2 / 4
    assert found.changes[1].p_adjusted == 1.0
    assert not found.changes[1].significant
    assert found.settings == {}


def test_a_large_change_is_significant(results: dict[str, Any]) -> None:
    many = copy.deepcopy(results)
    for cell in many["cells"]:
        cell["samples"] = [f"0/{i}/s" for i in range(20)]
        cell["scores"] = [0.0] * 20
    better = copy.deepcopy(many)
    better["cells"][1]["scores"] = [100.0] * 10 + [0.0] * 10
    full, recency = compare(many, better).changes
    assert (full.significant, recency.significant) == (False, True)
    assert recency.p == pytest.approx(2 / 2**10)


def test_only_the_same_texts_are_paired(results: dict[str, Any]) -> None:
    other = copy.deepcopy(results)
    other["cells"] = other["cells"][1:]
    other["cells"][0]["samples"] = [*other["cells"][0]["samples"][:3], "0/3/another"]
    found = compare(results, other)
    assert (found.changes[0].n, found.only_a) == (3, ["key/64/full/None"])
    other["cells"][0]["samples"] = list("abcd")
    with pytest.raises(ConfigError, match="no cell"):
        compare(results, other)


def test_query_modes_are_never_compared(results: dict[str, Any]) -> None:
    other = copy.deepcopy(results)
    other["grid"]["query_aware"] = True
    with pytest.raises(ConfigError, match="never compared"):
        compare(results, other)


def test_other_settings_are_named(results: dict[str, Any]) -> None:
    other = copy.deepcopy(results)
    other["grid"]["cache"] = {"num_sinks": 0}
    assert compare(results, other).settings == {"cache": ({}, {"num_sinks": 0})}


def test_files_that_are_no_results(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read results"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ConfigError, match="no results file"):
        load_results(tmp_path)
