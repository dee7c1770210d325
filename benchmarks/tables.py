"""Write the tables of docs/results.md and README.md from benchmarks/results/*.json: python benchmarks/tables.py"""

from __future__ import annotations

import json
from typing import Any

from common import RESULTS, ROOT, fill

Cell = dict[str, Any]


def cells(name: str) -> list[Cell]:
    """The cells of one result file."""
    found: list[Cell] = json.loads((RESULTS / name).read_text(encoding="utf-8"))["cells"]
    return found


def table(rows: dict[str, list[Cell]], columns: list[str]) -> str:
    """Rows of cells by task; every number with its 95 % interval and n."""
    lines = ["| | " + " | ".join(columns) + " | mean |", "|---" * (len(columns) + 2) + "|"]
    for label, found in rows.items():
        by_task = {cell["task"]: cell for cell in found}
        shown = [by_task.get(task) for task in columns]
        scores = [cell["score"] for cell in shown if cell]
        texts = ["" if cell is None else score(cell) for cell in shown]
        lines.append(f"| {label} | " + " | ".join(texts) + f" | {sum(scores) / len(scores):.2f} |")
    return "\n".join(lines)


def score(cell: Cell) -> str:
    low, high = cell["interval_95"]
    return f"{cell['score']:.2f} [{low:.2f}, {high:.2f}]"


def group(found: list[Cell], suite: str, *names: str) -> dict[str, list[Cell]]:
    """Cells of a suite by the fields `names`, in order."""
    rows: dict[str, list[Cell]] = {}
    for cell in found:
        if cell["suite"] == suite:
            rows.setdefault(", ".join(str(cell[name]) for name in names), []).append(cell)
    return rows


def main() -> None:
    sparse, dense = ["number", "word", "fact", "passkey", "chain"], ["multikey2", "multikey3", "kv"]
    full, small = cells("quality-full-cache-h200.json"), cells("quality-budget-h200.json")
    others = cells("quality-baselines-h100.json")
    page = ROOT / "docs" / "results.md"
    lengths = group(full, "full", "length")
    fill(page, "full-sparse", table(lengths, sparse))
    fill(page, "full-dense", table({k: v for k, v in lengths.items() if k != "32768"}, dense))
    fill(page, "wording", table(group(full, "wording", "wording"), ["number", "word", "fact", "passkey"]))
    fill(page, "shapes", table(group(full, "shapes", "shape"), ["number", "word", "fact", "chain"]))
    rows = group(small, "budget", "method", "budget") | group(others, "budget", "method", "budget")
    rows = {label.replace("%", " %"): found for label, found in rows.items()}
    fill(page, "budget", table(rows, sparse))
    fill(ROOT / "README.md", "readme-budget", table(rows, sparse))
    long = group(small, "long", "method", "budget", "positions") | group(
        others, "long", "method", "budget", "positions"
    )
    fill(page, "long", table({k.replace("%", " %"): v for k, v in long.items()}, sparse))


if __name__ == "__main__":
    main()
