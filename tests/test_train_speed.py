"""benchmarks/train_speed.py runs where there is no GPU, and says what it says it says."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "train_speed.py"


def test_the_training_benchmark_runs_on_a_cpu(tmp_path, monkeypatch):
    flags = "--tiny --device cpu --tokens 64 --answer 4 --steps 4 --warmup 1 --forwards 2 --d-r 16"
    command = [sys.executable, str(SCRIPT), *flags.split(), "--work", str(tmp_path), "--output", str(tmp_path / "x")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values == json.loads((tmp_path / "x").read_text())
    assert values["steps_measured"] == 4
    assert values["overhead_over_own_forward"] > 0
    assert values["minutes_for_3000_steps"] * 60 / 3000 == values["step_seconds"]["median"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    row = importlib.import_module("train_speed").table([values]).splitlines()[-1]
    assert f"{values['overhead_over_forward']:.2f}x" in row
    assert "n = 4" in row
