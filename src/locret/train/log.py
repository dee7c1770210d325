"""log.jsonl, and TensorBoard or W&B beside it where they are asked for and installed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locret.errors import ConfigError, HeadsError
from locret.files import write_text

LOG_FILE = "log.jsonl"


class Log:
    """One JSON object a line, each with its step; numbers in it also go to the other loggers."""

    def __init__(self, folder: Path, also: Sequence[str] = ()) -> None:
        self.path = folder / LOG_FILE
        self._others = [_OTHERS[name](folder) for name in also]

    def write(self, step: int, **values: Any) -> None:
        """Append a line. Raises: HeadsError: it cannot be written."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise HeadsError(f"{self.path} cannot be written: {error}") from error
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        for other in self._others:
            other.write(step, numbers)

    def trim(self, step: int) -> None:
        """Drop what was logged after `step`, a checkpoint's: those steps are run again."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        try:
            write_text(self.path, "".join(line + "\n" for line in lines if _step_of(line) <= step))
        except OSError as error:
            raise HeadsError(
                f"{self.path} cannot be written: {error}; choose a folder with room for the heads"
            ) from error

    def close(self) -> None:
        """Flush the other loggers."""
        for other in self._others:
            other.close()


class NoLog(Log):
    """Of processes that write no files."""

    def __init__(self) -> None:
        self._others = []

    def write(self, step: int, **values: Any) -> None:
        """Nothing."""

    def trim(self, step: int) -> None:
        """Nothing."""


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        writer = _optional("torch.utils.tensorboard", "tensorboard")
        self._writer = writer.SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path) -> None:
        self._run = _optional("wandb", "wandb").init(project="locret", name=folder.name, dir=str(folder))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


_OTHERS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _WandB}


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"log_to names {package!r}, which is not installed: pip install {package}, or leave it out"
        ) from error


def _step_of(line: str) -> float:
    try:
        step: float = json.loads(line)["step"]
        return step if step > 0 else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut in the middle by a kill
