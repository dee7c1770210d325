"""The large table of `locret eval`: a small file of every cell, and the tables of docs/results.md.

    python benchmarks/eval_table.py RUN ...     sum up finished or cut-off runs, write the file and the tables
    python benchmarks/eval_table.py             only write the tables from the file

RUN is a folder with results.json and run.json. `bash recipes/grids/table.sh RUN` makes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, fill

from locret.evaluate.stats import tasks_interval
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
MEAN = ("kind", "length", "method", "budget", "tasks", "n", "score", "low", "high", "smaller")
TIMES = {"10%": 10, "5%": 20, "2.5%": 40}


def cell_row(study: Study, cell: Cell) -> list[Any]:
    """One cell without its samples."""
    seconds = study.seconds(cell)
    fields = {**cell, "low": cell["interval"][0], "high": cell["interval"][1], **seconds}
    return [_short(fields.get(name)) for name in CELL]


def mean_rows(study: Study) -> list[list[Any]]:
    """The mean over the tasks of each kind, where a variant was run on all of them."""
    rows = []
    for length in study.lengths:
        for column in study.columns:
            cells = {cell["task"]: cell for cell in study.of(column=column, length=length)}
            for kind, tasks in KINDS.items():
                mine = [cells[task] for task in tasks if task in cells]
                if len(mine) < len(tasks):
                    continue
                low, high = tasks_interval([cell["scores"] for cell in mine])
                score = sum(cell["score"] for cell in mine) / len(mine)
                smaller = sum(cell["kv_bytes_full"] / cell["kv_bytes"] for cell in mine) / len(mine)
                counts = min(cell["n"] for cell in mine)
                values = [kind, length, *column, len(mine), counts, score, low, high, smaller]
                rows.append([_short(value) for value in values])
    return rows


def write_result(study: Study) -> None:
    """One line a cell, so that a change of one number is a change of one line."""
    head = {"provenance": study.runs[0].get("provenance", {}), "grid": study.grids[0], "cell": CELL, "mean": MEAN}
    lines = ",\n".join(f'"{name}": {json.dumps(value)}' for name, value in head.items())
    cells = ",\n".join(json.dumps(cell_row(study, cell), separators=(",", ":")) for cell in study.cells)
    means = ",\n".join(json.dumps(row, separators=(",", ":")) for row in mean_rows(study))
    write_text(RESULT, f'{{\n{lines},\n"means": [\n{means}\n],\n"cells": [\n{cells}\n]\n}}\n')


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
        write_result(study)
    fill_page(json.loads(RESULT.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
