"""The large table of `locret eval`: a small file of every cell, and the tables of docs/results.md.

    python benchmarks/eval_table.py RUN ...     put cells of finished or cut-off runs into the file, write the tables
    python benchmarks/eval_table.py             only write the tables from the file

RUN is a folder with results.json and run.json. `bash recipes/grids/table.sh RUN` makes it. A cell that the file has
from more samples stays; so a table too long for one machine's time is filled run by run. Delete the file to begin anew.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, fill

from locret.evaluate.summary import Cell
from locret.files import write_text
from locret.report.study import Study, length_text, load_studies

RESULT = RESULTS / "eval-table.json"
PAGE = ROOT / "docs" / "results.md"
KINDS = {
    "sparse": (
        "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery",
        "vt", "passkey", "number_string", "needles_scdq",
    ),
    "dense": ("niah_multikey_2", "niah_multikey_3", "kv_retrieval", "kv_multi_turn"),
    "counting, reasoning, dialogue": ("cwe", "fwe", "qa_1", "qa_2", "math_find", "code_run", "dialogue_mask"),
}  # fmt: skip
CELL = ("task", "length", "method", "budget", "n", "score", "low", "high", "against_full", "retention", "ceiling", "kl",
        "kv_bytes", "peak_kv_bytes", "ttft", "tpot")  # fmt: skip
MEAN = ("kind", "length", "method", "budget", "tasks", "n", "score", "low", "high")
TIMES = {"10%": 10, "5%": 20, "2.5%": 40}


def cell_row(study: Study, cell: Cell) -> list[Any]:
    """One cell without its samples."""
    seconds = study.seconds(cell)
    fields = {**cell, "low": cell["interval"][0], "high": cell["interval"][1], **seconds}
    return [_short(fields.get(name)) for name in CELL]


def mean_rows(cells: list[dict[str, Any]]) -> list[list[Any]]:
    """The mean over the tasks of each kind, where a variant was run on all of them.

    Its interval is made of the cells' (MOVER, Zou and Donner 2008): tasks are independent, and runs need not be one.
    """
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for cell in cells:
        found.setdefault((cell["length"], cell["method"], cell["budget"]), {})[cell["task"]] = cell
    rows = []
    for column, of in found.items():
        for kind, tasks in KINDS.items():
            mine = [of[task] for task in tasks if task in of]
            if len(mine) < len(tasks):
                continue
            score = sum(cell["score"] for cell in mine) / len(mine)
            low, high = (
                math.sqrt(sum((cell["score"] - cell[end]) ** 2 for cell in mine)) / len(mine) for end in ("low", "high")
            )
            counts = min(cell["n"] for cell in mine)
            values = [kind, *column, len(mine), counts, score, score - low, score + high]
            rows.append([_short(value) for value in values])
    return rows


def put(study: Study) -> None:
    """Add a run's cells to the file's. One line a cell, so that a change of one number is a change of one line."""
    old: dict[str, Any] = {"runs": [], "cells": []}
    if RESULT.exists():
        old = json.loads(RESULT.read_text(encoding="utf-8"))
    key = [CELL.index(name) for name in ("task", "length", "method", "budget")]
    rows = {tuple(row[i] for i in key): row for row in old["cells"]}
    for row in (cell_row(study, cell) for cell in study.cells):
        before = rows.get(tuple(row[i] for i in key))
        if before is None or before[CELL.index("n")] <= row[CELL.index("n")]:
            rows[tuple(row[i] for i in key)] = row
    run = {"provenance": study.runs[0].get("provenance", {}), "grid": study.grids[0]}
    runs = [*(one for one in old["runs"] if one != run), run]
    means = mean_rows([dict(zip(CELL, row, strict=True)) for row in rows.values()])
    parts = {"runs": runs, "means": means, "cells": list(rows.values())}
    lists = (f'"{name}": [\n{_lines(values)}\n]' for name, values in parts.items())
    head = (f'"{name}": {json.dumps(value)}' for name, value in {"cell": CELL, "mean": MEAN}.items())
    write_text(RESULT, "{\n" + ",\n".join((*head, *lists)) + "\n}\n")


def _lines(values: list[Any]) -> str:
    return ",\n".join(json.dumps(value, separators=(",", ":")) for value in values)


def means_table(result: dict[str, Any], length: int) -> str:
    """Every variant with every kind of task, best first by the sparse ones."""
    found: dict[tuple[str, Any], dict[str, dict[str, Any]]] = {}
    for row in result["means"]:
        mean = dict(zip(MEAN, row, strict=True))
        if mean["length"] == length:
            found.setdefault((mean["method"], mean["budget"]), {})[mean["kind"]] = mean
    order = sorted(found, key=lambda column: (_times(column[1]), -_score_of(found[column], "sparse")))
    lines = [f"| smaller | method | {' | '.join(f'{kind} ({len(tasks)})' for kind, tasks in KINDS.items())} | n |",
             "|---" * (len(KINDS) + 3) + "|"]  # fmt: skip
    for column in order:
        shown = [_mean_text(found[column].get(kind)) for kind in KINDS]
        counts = [mean["n"] for mean in found[column].values()]
        lines.append(f"| {_times(column[1])}× | `{column[0]}` | {' | '.join(shown)} | {min(counts)} |")
    return "\n".join(lines)


def tasks_table(result: dict[str, Any], length: int, budget: str) -> str:
    """Every task under every method at one budget."""
    cells = [dict(zip(CELL, row, strict=True)) for row in result["cells"]]
    cells = [cell for cell in cells if cell["length"] == length and cell["budget"] in (None, budget)]
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    by_name = {(cell["task"], cell["method"]): cell for cell in cells}
    tasks = [task for tasks in KINDS.values() for task in tasks]
    lines = ["| | " + " | ".join(f"`{method}`" for method in methods) + " |", "|---" * (len(methods) + 1) + "|"]
    lines += [
        f"| {task} | " + " | ".join(_cell_text(by_name.get((task, method))) for method in methods) + " |"
        for task in tasks
    ]
    return "\n".join(lines)


def fill_page(result: dict[str, Any]) -> None:
    lengths = sorted({row[MEAN.index("length")] for row in result["means"]})
    parts = [f"### {_length(length)} tokens\n\n{means_table(result, length)}\n" for length in lengths]
    fill(PAGE, "eval-means", "\n" + "\n".join(parts))
    short = lengths[0]
    fill(PAGE, "eval-tasks", f"\n{tasks_table(result, short, '5%')}\n")


def _length(length: int) -> str:
    return f"{length:,}" if length % 1024 else length_text(length)


def _times(budget: Any) -> int:
    return 1 if budget is None else TIMES[budget]


def _score_of(kinds: dict[str, dict[str, Any]], kind: str) -> float:
    return float(kinds[kind]["score"]) if kind in kinds else -1.0


def _mean_text(mean: dict[str, Any] | None) -> str:
    return "" if mean is None else f"{mean['score']:.1f} [{mean['low']:.0f}, {mean['high']:.0f}]"


def _cell_text(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    most = f" (max {cell['ceiling']:.0f})" if cell["ceiling"] is not None else ""
    return f"{cell['score']:.0f} [{cell['low']:.0f}, {cell['high']:.0f}]{most}"


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    paths = [Path(path) for path in sys.argv[1:]]
    if paths:
        [study] = load_studies(paths)
        put(study)
    fill_page(json.loads(RESULT.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
