"""`recipes/grids/table.sh` without a GPU or a model: what it starts, and with which environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "grids" / "table.sh"
# says what it was started with; the script writes that to a log a process
PYTHON = """#!/bin/bash
[[ " $* " == *" --prepare "* ]] && echo "$*" >"$PREPARED" && exit 0
echo "$RANK of $WORLD_SIZE on GPU ${CUDA_VISIBLE_DEVICES-of its choice}"
"""


def started(tmp_path: Path, *arguments: str, listed: int = 0, **environment: str) -> list[str]:
    """What the script starts on a machine whose nvidia-smi lists so many GPUs; 0: there is none to ask."""
    programs = tmp_path / "programs"
    programs.mkdir()
    smi = "echo 'no driver' >&2; exit 9" if not listed else f'for i in {{1..{listed}}}; do echo "GPU $i: H100"; done'
    for name, text in {"python": PYTHON, "nvidia-smi": f"#!/bin/bash\n{smi}\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("GPUS", "CUDA_VISIBLE_DEVICES", "GRID")}
    kept |= {"PATH": f"{programs}:{kept['PATH']}", "PYTHON": str(programs / "python"), **environment}
    kept["PREPARED"] = str(tmp_path / "prepared")
    output = tmp_path / "run"
    done = subprocess.run(["bash", SCRIPT, output, *arguments], env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run.tgz").exists()
    logs = sorted(output.glob("process-*.log"), key=lambda log: int(log.stem.partition("-")[2]))
    return [log.read_text().strip() for log in logs]


def test_processes_are_dealt_out_to_all_gpus_in_turn(tmp_path: Path) -> None:
    assert started(tmp_path, "60", "4", listed=2) == [f"{rank} of 4 on GPU {rank % 2}" for rank in range(4)]


@pytest.mark.parametrize(("listed", "processes"), [(0, 7), (1, 7), (2, 14)])
def test_seven_processes_a_gpu_unless_told_otherwise(tmp_path: Path, listed: int, processes: int) -> None:
    found = started(tmp_path, listed=listed)
    assert len(found) == processes
    assert ("of its choice" in found[0]) == (not listed)


def test_fewer_gpus_than_there_are(tmp_path: Path) -> None:
    assert started(tmp_path, "60", "2", listed=4, GPUS="1") == ["0 of 2 on GPU 0", "1 of 2 on GPU 0"]


def test_samples_are_made_by_a_process_a_core(tmp_path: Path) -> None:
    """nproc answers OMP_NUM_THREADS where that is set, and the script sets it to 1: one process made all samples."""
    started(tmp_path, "60", "1", OMP_NUM_THREADS="1")
    assert f"--prepare {len(os.sched_getaffinity(0))} " in (tmp_path / "prepared").read_text()
