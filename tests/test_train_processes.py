"""Several processes: one run, the same weights everywhere, resumable on another number of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import SMALL, Stop, make_backbone, make_samples, stop_at

from locret.errors import ConfigError
from locret.heads import RetainingHeads
from locret.train import CHECKPOINT_FILE, LOG_FILE, TrainConfig, train

CONFIG = dict(
    steps=10,
    hidden_size=16,
    accumulate=3,
    eval_samples=3,
    eval_every=5,
    log_every=2,
    checkpoint_every=4,
    bucketing=True,
)  # three samples a step on two processes: one learns from two of them, the other from one

CHILD = """
import hashlib, os, sys, time
sys.path.insert(0, {tests!r})
from test_train import *
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
data = make_samples(12)
if {poison}:
    data[5] = Sample(data[5].prompt_ids[:-1] + [999], data[5].answer_ids, "bad")
progress = []
def report(p):
    progress.append((p.step, p.loss, p.overlap))
    time.sleep({pause})
result = train(make_backbone(), data, {output!r}, TrainConfig.from_dict({config!r}), on_progress=report)
digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in result.heads.parameters())).hexdigest()
print(f"RANK {{rank}}", digest, result.step, result.stopped, result.loss, result.overlap, progress[-1:], flush=True)
"""


def start(output: Path, size: int, *, pause: float = 0.0, poison: bool = False, **changes) -> list[subprocess.Popen]:
    """`torchrun`'s environment without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = {**CONFIG, **changes}
    code = CHILD.format(tests=str(Path(__file__).parent), output=str(output), config=config, pause=pause, poison=poison)
    env = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]  # fmt: skip


def finish(children: list[subprocess.Popen], code: int = 0) -> list[list[str]]:
    """What each rank printed: digest, step, stopped, loss, overlap ...; none is left running."""
    lines = []
    try:
        for child in children:
            out, err = child.communicate(timeout=60)
            assert child.returncode == code, err
            lines += [line.split(" ", 7)[2:] for line in out.splitlines() if line.startswith("RANK")] or [[err]]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    return lines


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return train(make_backbone(), make_samples(12), folder, TrainConfig(**CONFIG))


def close(folder: Path, heads: RetainingHeads, tolerance=1e-4) -> bool:
    """Sums of gradients in another order; Adam's first steps magnify that up to the learning rate, 5e-4."""
    ours = RetainingHeads.from_pretrained(folder)
    return all((a - b).abs().max() < tolerance for a, b in zip(ours.parameters(), heads.parameters(), strict=True))


def records(folder: Path, *names: str) -> list[list]:
    lines = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    return [[r.get(name) for name in ("step", *names)] for r in lines if "risen" not in r]


def test_two_processes_are_one_run(alone, tmp_path):
    """All ranks bit-equal, the losses and overlaps of one process, one log."""
    ranks = finish(start(tmp_path, 2))
    assert ranks[0] == ranks[1]
    assert ranks[0][1:3] == ["10", "None"]
    assert close(tmp_path, alone.heads)
    for ours, theirs in zip(
        records(tmp_path, "loss", "overlap"), records(alone.output, "loss", "overlap"), strict=True
    ):
        assert ours == [None if x is None else pytest.approx(x, rel=1e-3) for x in theirs]


def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    """One process to step 6 (checkpoint 4), two to a SIGTERM, three to the end: the same steps as undisturbed."""
    with pytest.raises(Stop):
        train(make_backbone(), make_samples(12), tmp_path, TrainConfig(**CONFIG), on_progress=stop_at(6))
    assert torch.load(tmp_path / CHECKPOINT_FILE, weights_only=True)["state"]["step"] == 4
    children = start(tmp_path, 2, pause=0.3)
    deadline = time.time() + 60
    while time.time() < deadline and children[0].poll() is None and not any(r[0] >= 8 for r in records(tmp_path)):
        time.sleep(0.05)
    children[1].send_signal(signal.SIGTERM)  # one of them hears it, all stop after the same step
    ranks = finish(children)
    state = torch.load(tmp_path / CHECKPOINT_FILE, weights_only=True)["state"]
    assert ranks[0][:3] == ranks[1][:3]
    assert ranks[0][1:3] == [str(state["step"]), "SIGTERM"]
    assert 8 <= state["step"] < 10
    ranks = finish(start(tmp_path, 3))
    assert len({tuple(rank) for rank in ranks}) == 1
    assert close(tmp_path, alone.heads)
    ours, theirs = records(tmp_path, "loss"), records(alone.output, "loss")
    assert ours == [[step, None if loss is None else pytest.approx(loss, rel=1e-3)] for step, loss in theirs]


def test_a_bad_sample_is_dropped_on_all(tmp_path):
    ranks = finish(start(tmp_path, 2, poison=True, steps=4, max_dropped=0.5))
    assert ranks[0] == ranks[1]
    assert json.loads((tmp_path / "data.json").read_text())["dropped"]["token id outside the vocabulary"]["count"] == 1


def test_a_step_must_hold_a_sample_for_each_process(tmp_path):
    children = start(tmp_path, 2, accumulate=1)
    errors = [error for (error,) in finish(children, code=1)]
    assert all("accumulate is 1, but 2 processes each need a sample a step; set accumulate to 2" in e for e in errors)


def test_what_a_checkpoint_weighs(tmp_path):
    """Heads and two moments, never the backbone: three times the heads' bytes, and a little."""
    backbone = make_backbone()
    with pytest.raises(Stop):
        train(backbone, make_samples(), tmp_path, TrainConfig(**{**SMALL, "hidden_size": 512}), on_progress=stop_at(5))
    heads = 2 * 512 * (64 + 2) * 4
    assert (tmp_path / CHECKPOINT_FILE).stat().st_size < 3.1 * heads
    written = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file() and p.suffix in (".pt", ".safetensors"))
    assert written < 4 * heads
    with pytest.raises(ConfigError, match="unknown schedule 'linea'"):
        TrainConfig(schedule="linea")
