"""The report's tables as Markdown, for pages that are read in a repository."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from locret.evaluate.summary import Cell
from locret.report.study import Row, Study, column_text, length_text


def markdown(studies: Sequence[Study]) -> str:
    """Leaderboards, scores by task, and how they were made."""
    return "\n".join(line for study in studies for line in _study(study)) + "\n"


def _study(study: Study) -> list[str]:
    lines = [
        f"# {study.title}",
        "",
        f"95 % intervals in brackets. All variants saw the same samples. {study.note}".rstrip(),
        "",
    ]
    for length in study.lengths:
        tasks = study.tasks_at(length)
        lines += [f"## Mean over {len(tasks)} tasks at {length_text(length)}", ""]
        lines += _table(
            ["method", "score", "vs. full", "KV bytes", "smaller", "gold kept", "KL", "n"],
            [_leader(row, len(tasks)) for row in study.rows(length)],
        )
        lines += [f"## Tasks at {length_text(length)}", ""]
        columns = study.columns
        by_cell = {(c["task"], c["method"], c["budget"]): c for c in study.of(length=length)}
        columns = [column for column in columns if any((task, *column) in by_cell for task in tasks)]
        lines += _table(
            ["task", *map(column_text, columns)],
            [[task, *(_score(by_cell.get((task, *column))) for column in columns)] for task in tasks],
        )
        if any("ceiling" in cell for cell in by_cell.values()):
            lines += ["max: what a method that has not seen the question can expect.", ""]
    for run in study.runs:
        facts = run.get("provenance", {})
        if facts:
            lines += [
                f"`{facts['command']}`",
                "",
                ", ".join(f"{k} {v}" for k, v in facts.items() if k != "command"),
                "",
            ]
    return lines


def _leader(row: Row, tasks: int) -> list[str]:
    partly = "" if row.tasks == tasks else f" ({row.tasks} of {tasks} tasks)"
    return [
        column_text(row.column) + partly, f"{row.score:.1f} [{row.interval[0]:.1f}, {row.interval[1]:.1f}]",
        "" if row.against_full is None else f"{row.against_full:+.1f}", f"{row.kv_bytes:,.0f}", f"{row.smaller:.1f}×",
        "" if row.retention is None else f"{100 * row.retention:.0f} %", "" if row.kl is None else f"{row.kl:.3f}",
        str(row.n),
    ]  # fmt: skip


def _score(cell: Cell | None) -> str:
    if cell is None:
        return ""
    ceiling = f" (max {cell['ceiling']:.0f})" if "ceiling" in cell else ""
    return f"{cell['score']:.1f} [{cell['interval'][0]:.0f}, {cell['interval'][1]:.0f}]{ceiling}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(fields: Sequence[str]) -> str:
        return "| " + " | ".join(field.replace("|", "\\|") for field in fields) + " |"

    return [line(heads), "|---" * len(heads) + "|", *map(line, rows), ""]
