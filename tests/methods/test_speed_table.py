"""benchmarks/methods_speed.py runs where there is no GPU, goes on where it was, and tabulates what it measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from locret.config import STORAGE
from locret.methods import list_methods

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
TINY = "--shape 2x64x96x8x2x128 --tokens 300 --budget 90 --chunk 64 --steps 2 --device cpu --dtype float32"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("methods_speed", BENCHMARKS / "methods_speed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_and_every_store_is_a_case(script):
    stores = [f"locret + {name}" for name in STORAGE if name != "dense"]
    assert sorted(script.cases()) == sorted([info.name for info in list_methods()] + stores)
    assert script.cases()[:2] == ["full", "locret"]


def test_a_run_that_goes_on_measures_what_is_missing_only(script, tmp_path, monkeypatch, capsys):
    """And what cannot run says why, in its cell, and stops nothing."""
    path = tmp_path / "speed.json"
    cases = ["full", "locret", "lococo", "lagkv", "locret + kivi2"]

    def run(*flags):
        monkeypatch.setattr(
            sys, "argv", ["methods_speed.py", *TINY.split(), "--output", str(path), "--only", *cases, *flags]
        )
        script.main()
        return json.loads(path.read_text())["cells"]

    first = run("--rounds", "1")
    assert {name: len(cell["runs"]) for name, cell in first.items()} == {**dict.fromkeys(cases, 1), "lagkv": 0}
    assert "lag 128 keeps up to 256 units waiting" in first["lagkv"]["failed"]
    second = run("--rounds", "2")
    assert second["full"]["runs"][0] == first["full"]["runs"][0]
    assert len(second["full"]["runs"]) == 2
    assert run("--rounds", "2", "--seconds", "0") == second
    assert "run it again to go on" in capsys.readouterr().out

    result = json.loads(path.read_text())
    rows = {
        line.split("`")[1]: line.split(" | ") for line in script.table(result).splitlines() if line.startswith("| `")
    }
    assert list(rows) == ["full", "locret", "lococo", "locret + kivi2"]
    assert rows["full"][2] == rows["locret"][3] == "1.00"
    kept = result["cells"]["locret"]["runs"][0]["kv_bytes"]
    assert rows["locret"][7] == f"{16 * kept / 2**20:,.0f}"  # 2 layers stand for 32
