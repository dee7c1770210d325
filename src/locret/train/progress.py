"""What a run tells while it goes on and when it has ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locret.heads import RetainingHeads


@dataclass(frozen=True)
class TrainProgress:
    """What `on_progress` is told after every step. loss and overlap are the last ones known, None before."""

    step: int
    steps: int
    loss: float | None
    overlap: float | None
    skipped: int
    tokens_per_second: float
    warning: str = ""  # samples whose loss rose far above the mean, since the last step


@dataclass(frozen=True)
class TrainResult:
    """A finished or stopped run."""

    output: Path
    heads: RetainingHeads
    step: int
    steps: int
    skipped: int  # samples that were dropped; output/data.json says which and why
    loss: float | None  # mean of the last log_every steps
    overlap: float | None  # mean over layers, heads and held-out samples
    overlap_per_head: list[list[float]] | None  # [L][Hkv]; layers with a sliding window have no budget and read 0
    seconds: float
    stopped: str | None  # "SIGINT" or "SIGTERM"; None: finished
    dropped: str = ""  # one line about dropped samples; empty: none were

    @property
    def finished(self) -> bool:
        return self.stopped is None

    def summary(self) -> str:
        """One line for people."""
        if self.stopped:
            return (
                f"stopped by {self.stopped} at step {self.step} of {self.steps}; "
                f"checkpoint saved in {self.output}: the same command goes on from there"
            )
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        overlap = "" if self.overlap is None else f", top-10% overlap {self.overlap:.3f}"
        dropped = f", {self.dropped}" if self.dropped else ""
        return f"trained {self.step} steps in {self.seconds:.0f} s{loss}{overlap}{dropped}; heads in {self.output}"


class ProgressBar:
    """A rich bar for `train`: itself `on_progress`, its method `checked` `on_check`."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._task = bar, bar.add_task("", total=None, note="")

    def __call__(self, p: TrainProgress) -> None:
        loss = "" if p.loss is None else f"loss {p.loss:.4f}"
        overlap = "" if p.overlap is None else f"  overlap {p.overlap:.3f}"
        speed = f"  {p.tokens_per_second:,.0f} tok/s" if p.tokens_per_second else ""
        self._bar.update(self._task, completed=p.step, total=p.steps, note=loss + overlap + speed)
        if p.warning:
            self._bar.console.print(p.warning, markup=False)

    def checked(self, done: int, total: int) -> None:
        """Samples looked at before the first step."""
        self._bar.update(self._task, completed=done, total=total, note="samples checked")


@contextlib.contextmanager
def progress_bar(console: Any = None) -> Iterator[ProgressBar]:
    """A rich progress bar with loss and overlap: `with progress_bar() as report: train(..., on_progress=report)`."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(TextColumn("train"), *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        yield ProgressBar(bar)
