"""What a stopped run leaves behind: heads, optimizer and a few numbers, in one file, replaced atomically."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from locret.errors import ConfigError, HeadsError
from locret.files import atomic_write
from locret.train.options import TrainConfig

CHECKPOINT_FILE = "checkpoint.pt"
_FREE_OPTIONS = (  # may change when a run goes on
    "eval_every", "eval_budgets", "recall_budget", "log_every", "log_to", "checkpoint_every", "max_dropped",
    "token_chunk", "pack_tokens", "description",
)  # fmt: skip


@dataclass
class State:
    """What a checkpoint holds besides weights and optimizer. The order of samples follows from seed and step, and
    nothing else draws random numbers, so this is the whole state."""

    step: int = 0
    position: int = 0  # samples learned from
    skipped: int = 0
    loss: float | None = None
    overlap: float | None = None
    overlap_per_head: list[list[float]] | None = None
    seconds: float = 0.0
    finished: bool = False
    best: float | None = None  # the overlap of the heads in best/


def identity(config: TrainConfig, fingerprint: dict[str, Any], digest: str) -> dict[str, Any]:
    """What must be the same for a run to be resumed; the number of processes need not."""
    options = {f"option {k}": v for k, v in config.plain().items() if k not in _FREE_OPTIONS}
    return {**options, **{f"backbone {k}": v for k, v in fingerprint.items()}, "data": digest}


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Replace the file. Raises: HeadsError: it cannot be written; the old one is untouched."""
    try:
        atomic_write(path, lambda temporary: torch.save(content, temporary))
    except (OSError, RuntimeError) as error:  # torch's zip writer wraps a full disk in a RuntimeError
        free = shutil.disk_usage(path.parent).free / 2**20
        raise HeadsError(
            f"{path} cannot be written: {error}; {free:,.0f} MiB are free there. The checkpoint that was there is "
            "untouched: make room, and the same command goes on from it"
        ) from error


def read_checkpoint(path: Path, ours: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    """State and content of a checkpoint whose identity is `ours`.

    An option that the file does not know had its default value: it is from before that option existed.
    Raises: HeadsError: a broken file. ConfigError: another run's; the message names what differs.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        theirs, state = content["identity"], State(**content["state"])
    except Exception as error:  # a broken file raises whatever zip, pickle or a missing key raise
        raise HeadsError(f"{path} is broken ({type(error).__name__}); delete it, or start anew (resume off)") from error
    theirs = {**identity(TrainConfig(), {}, ""), **theirs}
    wrong = [f"{k}: {theirs.get(k)!r} there, {ours.get(k)!r} now" for k in ours if theirs.get(k) != ours[k]]
    if wrong:
        raise ConfigError(
            f"{path} is of another run: {'; '.join(wrong)}. Use another output folder, or start anew (resume off)"
        )
    return state, content


def state_dict(state: State) -> dict[str, Any]:
    """As `State(**...)` takes it."""
    return dataclasses.asdict(state)
