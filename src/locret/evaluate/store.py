"""The journal of a run: one JSON line a sample, on disk before the next one starts, readable after any kind of end.

    DIR/grid.json          what is being run; a folder holds one grid
    DIR/journal/*.jsonl    a file per process, in the order in which samples were done, with seconds
    DIR/machines/*.json    what each of these processes ran on
    DIR/samples.jsonl      at the end: all samples in a fixed order, without seconds
    DIR/results.json       at the end: a cell per (task, length, method, budget), with its samples' scores
    DIR/run.json           at the end: seconds, command, commit, machine, date

Seconds live in the journal and in run.json only, so the other files of an interrupted and resumed run equal those of
an uninterrupted one byte for byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from locret.errors import ConfigError, DataError
from locret.files import write_text

Line = dict[str, Any]
Key = tuple[Any, ...]
_FREE = ("tasks", "methods", "budgets", "lengths", "seeds", "samples", "part", "public")  # may grow later


def key_of(line: Line) -> Key:
    """What a line is about."""
    return tuple(line[name] for name in ("task", "length", "seed", "index", "method", "budget"))


class Journal:
    """Append lines; a line that was cut off by a kill is dropped when the file is opened again."""

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / "journal" / f"{rank:03}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115  (closed by __exit__)
        whole = path.read_bytes()
        self._file.truncate(whole.rfind(b"\n") + 1)

    def write(self, lines: Iterable[Line]) -> None:
        """On disk when this returns."""
        self._file.write(b"".join(dump(line).encode() for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def dump(line: Any) -> str:
    """One line of JSON, the same bytes for the same value."""
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"


def read_journals(folder: Path) -> dict[Key, Line]:
    """All whole lines of all processes; of two lines about one thing the first counts.

    Raises: DataError naming file and line: a line in the middle that is no JSON object of ours.
    """
    found: dict[Key, Line] = {}
    for path in sorted((folder / "journal").glob("*.jsonl")):
        for line in _whole_lines(path):
            found.setdefault(key_of(line), line)
    return found


def _whole_lines(path: Path) -> Iterator[Line]:
    for number, raw in enumerate(path.read_bytes().split(b"\n")[:-1], 1):  # behind the last line end: nothing, or torn
        try:
            line = json.loads(raw)
            key_of(line)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number} is broken ({error}); remove that line and run again") from error
        yield line


def claim(folder: Path, grid: dict[str, Any]) -> None:
    """Make `folder` the place of this grid, or check that it is. Axes may change: what is there already is kept.

    Raises: ConfigError: it holds results of a grid with another model, mode or cache.
    """
    path = folder / "grid.json"
    if not path.exists():
        if any(folder.glob("journal/*.jsonl")):
            raise ConfigError(f"{folder} has a journal but no grid.json; give another --output")
        write_text(path, json.dumps(grid, indent=1) + "\n")
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is broken ({error}); give another --output") from error
    other = [name for name in grid if name not in _FREE and old.get(name) != grid[name]]
    if other:
        shown = "; ".join(f"{name} was {old.get(name)!r}, now {grid[name]!r}" for name in other)
        raise ConfigError(f"{folder} holds results of another grid: {shown}; give another --output")
    if old != grid:
        write_text(path, json.dumps(grid, indent=1) + "\n")
