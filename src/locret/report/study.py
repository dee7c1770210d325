"""Results as a page needs them: cells that may stand side by side, grouped and averaged.

Cells stand side by side only under one model, one query mode and one task mode: each combination is a `Study`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from locret.evaluate.oracle import REFERENCES
from locret.evaluate.stats import Interval, paired_test, tasks_interval
from locret.evaluate.summary import Cell, cell_name, load_results, load_run

Column = tuple[str, int | str | None]  # method, budget
DEPTH_BINS = 10


@dataclass(frozen=True)
class Row:
    """One variant at one length, over all tasks of the study.

    Attributes:
        tasks: how many of the study's tasks it was run on; only rows with all of them can be ranked.
        against_full: mean difference to the full cache, in points; None without one.
    """

    column: Column
    length: int
    tasks: int
    n: int
    score: float
    interval: Interval
    against_full: float | None
    kv_bytes: float
    smaller: float  # bytes of a full cache / bytes of this one
    peak_kv_bytes: float
    ttft: float | None
    tpot: float | None
    retention: float | None
    kl: float | None
    delta: float | None


@dataclass
class Study:
    """All cells that may be compared with each other."""

    title: str
    query_aware: bool
    tasks: dict[str, dict[str, Any]]
    cells: list[Cell] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)  # provenance of each results file
    grids: list[dict[str, Any]] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return sorted({cell["length"] for cell in self.cells})

    @property
    def columns(self) -> list[Column]:
        """Variants in the order of the grid, the full cache first."""
        found = dict.fromkeys((cell["method"], cell["budget"]) for cell in self.cells)
        return sorted(found, key=lambda column: column[1] is not None)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for method, _ in self.columns))

    @property
    def note(self) -> str:
        """What a reader must know of rows that are no methods; empty where there are none."""
        named = [f"{name} ({REFERENCES[name].summary})" for name in self.methods if name in REFERENCES]
        if not named:
            return ""
        return (
            f"Not methods but references: {'; '.join(named)}. They know the questions and the right answers, under the "
            "same budget and pins."
        )

    def of(self, *, column: Column | None = None, length: int | None = None, task: str | None = None) -> list[Cell]:
        return [
            cell for cell in self.cells
            if (column is None or (cell["method"], cell["budget"]) == column)
            and (length is None or cell["length"] == length) and (task is None or cell["task"] == task)
        ]  # fmt: skip

    def rows(self, length: int) -> list[Row]:
        """The leaderboard of a length: complete rows first, best first."""
        made = [self._row(column, length) for column in self.columns if self.of(column=column, length=length)]
        return sorted(made, key=lambda row: (-row.tasks, -row.score))

    def tasks_at(self, length: int) -> list[str]:
        return list(dict.fromkeys(cell["task"] for cell in self.of(length=length)))

    def seconds(self, cell: Cell) -> dict[str, float | None]:
        name = cell_name(cell)
        return next((run["seconds"][name] for run in self.runs if name in run.get("seconds", {})), {})

    def _row(self, column: Column, length: int) -> Row:
        cells = self.of(column=column, length=length)
        full = {cell["task"]: cell["score"] for cell in self.of(length=length) if cell["budget"] is None}
        shared = [cell["score"] - full[cell["task"]] for cell in cells if cell["task"] in full]
        return Row(
            column, length, len(cells), sum(cell["n"] for cell in cells), _mean([cell["score"] for cell in cells]),
            tasks_interval([cell["scores"] for cell in cells]),
            _mean(shared) if shared and column[1] is not None else None,
            _mean([cell["kv_bytes"] for cell in cells]),
            _mean([cell["kv_bytes_full"] / cell["kv_bytes"] for cell in cells]),
            _mean([cell["peak_kv_bytes"] for cell in cells]),
            *(_known([self.seconds(cell).get(part) for cell in cells]) for part in ("ttft", "tpot")),
            *(_known([cell.get(name) for cell in cells]) for name in ("retention", "kl", "delta")),
        )  # fmt: skip


@dataclass(frozen=True)
class Heat:
    """A map of means 0..1 with None where nothing was measured."""

    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]


def load_studies(paths: Iterable[Path]) -> list[Study]:
    """Read results files or folders; those with one model, query mode, task mode and cache become one study."""
    studies: dict[str, Study] = {}
    for path in paths:
        results, run = load_results(path), load_run(path)
        grid = results["grid"]
        same = {name: grid[name] for name in ("query_aware", "mode", "model", "heads", "dtype", "cache", "text")}
        key = json.dumps([same, results["model"]], sort_keys=True)
        if key not in studies:
            name = Path(results["model"]["name"]).name
            kind = "query-aware" if grid["query_aware"] else "query-agnostic"
            studies[key] = Study(f"{name}, {kind}, {grid['mode']}", grid["query_aware"], {})
        study = studies[key]
        study.tasks.update(results["tasks"])
        study.runs.append(run)
        study.grids.append(grid)
        for cell in results["cells"]:
            _add(study, cell)
    return list(studies.values())


def depth_map(cells: Sequence[Cell]) -> Heat | None:
    """Mean score by depth (rows) and length (columns) of cells whose samples have one depth each."""
    known = [cell for cell in cells if "depths" in cell and all(_is_depth(d) for d in cell["depths"])]
    if not known:
        return None
    lengths = sorted({cell["length"] for cell in known})
    found: dict[tuple[int, int], list[float]] = {}
    for cell in known:
        for depth, score in zip(cell["depths"], cell["scores"], strict=True):
            at = min(DEPTH_BINS - 1, int(depth * DEPTH_BINS))
            found.setdefault((at, cell["length"]), []).append(score / 100)
    values = [[_known(found.get((at, length), [])) for length in lengths] for at in range(DEPTH_BINS)]
    rows = [f"{100 * at // DEPTH_BINS} %" for at in range(DEPTH_BINS)]
    return Heat(rows, [length_text(length) for length in lengths], values)


def retention_map(cells: Sequence[Cell]) -> Heat | None:
    """Share of gold units kept, layer (rows) by KV head (columns), mean over cells."""
    maps = [np.array(cell["retention_map"]) for cell in cells if "retention_map" in cell]
    if not maps:
        return None
    mean = np.mean(maps, axis=0)
    return Heat([str(i) for i in range(mean.shape[0])], [str(i) for i in range(mean.shape[1])], mean.tolist())


def p_against_full(cell: Cell, full: Cell | None) -> float | None:
    """p of "as good as the full cache", on the samples that both have."""
    if full is None or cell["budget"] is None:
        return None
    theirs = dict(zip(full["samples"], full["scores"], strict=True))
    pairs = [(theirs[s], score) for s, score in zip(cell["samples"], cell["scores"], strict=True) if s in theirs]
    return paired_test([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None


def column_text(column: Column) -> str:
    method, budget = column
    return method if budget is None else f"{method} {budget}"


def length_text(length: int) -> str:
    """4096 -> "4K"; 0 -> "as it is" (public sets)."""
    if length == 0:
        return "as it is"
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


def _add(study: Study, cell: Cell) -> None:
    """A cell that is there already stays if it has more samples."""
    name = cell_name(cell)
    for i, other in enumerate(study.cells):
        if cell_name(other) == name:
            if cell["n"] > other["n"]:
                study.cells[i] = cell
            return
    study.cells.append(cell)


def _is_depth(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None
