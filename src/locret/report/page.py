"""The report: one HTML page that holds its own style, script and pictures, and the same tables as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from locret.errors import ConfigError
from locret.evaluate.summary import Cell
from locret.files import write_text
from locret.report.charts import NUM_COLOURS, Point, Series, heat, plot
from locret.report.markdown import markdown
from locret.report.study import (
    Row,
    Study,
    column_text,
    depth_map,
    length_text,
    load_studies,
    p_against_full,
    retention_map,
)

_HERE = Path(__file__).parent


def write_report(paths: Sequence[Path], folder: Path) -> Path:
    """Write report.html and report.md into `folder` from results files or folders; returns the page's path."""
    studies = load_studies(paths)
    if not any(study.cells for study in studies):
        raise ConfigError("these results hold no cell; run `locret eval` first")
    write_text(folder / "report.html", html(studies))
    write_text(folder / "report.md", markdown(studies))
    return folder / "report.html"


def html(studies: Sequence[Study]) -> str:
    """The page's text."""
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    body = "".join(_study(study, alone=len(studies) == 1) for study in studies)
    first = studies[0].runs[0].get("provenance", {}) if studies[0].runs else {}
    what = " · ".join(filter(None, [study.title for study in studies][:1] if len(studies) == 1 else []))
    facts = " · ".join(filter(None, (what, first.get("date", ""), first.get("machine", ""))))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>locret evaluation</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{style}</style></head><body><main><header><div><h1>What a smaller KV cache costs</h1>"
        f'<p class="muted">{escape(facts)}</p></div><button id="theme" type="button">dark / light</button></header>'
        f"{body}</main><script>{script}</script></body></html>\n"
    )


def _study(study: Study, *, alone: bool) -> str:
    knows = (
        "Query-aware: every question was known when its context was compressed."
        if study.query_aware
        else "Query-agnostic: contexts were compressed before their questions were known."
    )
    parts = [f"<section>{'' if alone else f'<h2>{escape(study.title)}</h2>'}"
             f"<p>{knows} All variants saw the same samples. Intervals are 95 %. {escape(study.note)}</p>"]  # fmt: skip
    parts.append(_pareto(study))
    parts += [_leaderboard(study, length) for length in study.lengths]
    parts += [_curves(study), _matrix(study), _depths(study), _retention(study), _tasks(study)]
    parts.append(_provenance(study))
    return "".join([*parts, "</section>"])


# --- tables


@dataclass(frozen=True)
class Field:
    """One field of a table: what is shown (HTML) and what it is sorted by (None: empty, always last)."""

    shown: str
    value: float | str | None
    style: str = ""


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Field]], *, sorted_by: int | None = None) -> str:
    """A sortable table. columns: (head, what it means)."""
    rows = [list(row) for row in rows]
    heads = []
    for i, (name, meaning) in enumerate(columns):
        kind = "text" if any(isinstance(row[i].value, str) for row in rows) else "number"
        order = ' aria-sort="descending"' if i == sorted_by else ""
        heads.append(f'<th scope="col" data-kind="{kind}"{order} title="{escape(meaning)}">'
                     f'<button type="button">{escape(name)}</button></th>')  # fmt: skip
    body = "".join(
        "<tr>" + "".join(f'<td data-v="{"" if f.value is None else escape(str(f.value))}"{f.style}>{f.shown}</td>'
                         for f in row) + "</tr>" for row in rows
    )  # fmt: skip
    return f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: float | None, form: Callable[[float], str]) -> Field:
    return Field("", None) if value is None else Field(form(value), value)


def _score(score: float, interval: Sequence[float]) -> Field:
    return Field(f"{score:.1f}<small>{interval[0]:.1f}–{interval[1]:.1f}</small>", score)


def _signed(value: float | None, digits: int = 1) -> Field:
    if value is None:
        return Field("", None)
    return Field(f"{value:+.{digits}f}".replace("-", "−"), value)


def _name(study: Study, column: tuple[str, Any]) -> Field:
    at = study.methods.index(column[0])
    return Field(f'<span class="c{at % NUM_COLOURS}"><span class="swatch"></span></span>'
                 f"{escape(column_text(column))}", column_text(column))  # fmt: skip


def _leaderboard(study: Study, length: int) -> str:
    rows = study.rows(length)
    tasks = study.tasks_at(length)
    columns = [
        ("method and budget", ""), ("mean score", "mean over tasks, 95 % interval"),
        ("vs. full", "points; the full cache on the same samples"),
        ("KV bytes", "measured, a sequence, metadata included"), ("smaller", "full cache's bytes / these"),
        ("peak bytes", "with what one layer needs for a chunk"), ("gold kept", "share of the gold facts' units held"),
        ("KL", "KL(full || this) on the answers, nats a token"), ("ΔNLL", "of the right answer, nats a token"),
        ("first token", "seconds from the context's first token to the answer's"),
        ("per token", "seconds for each further token"), ("n", "samples"),
    ]  # fmt: skip
    body = [_leader(study, row, len(tasks)) for row in rows]
    names = ", ".join(tasks)
    return (
        f"<h3>Leaderboard at {escape(length_text(length))}</h3>"
        f'<p class="muted">Mean over {len(tasks)} task{"s" if len(tasks) > 1 else ""}: {escape(names)}.</p>'
        + table(columns, body, sorted_by=1)
    )


def _leader(study: Study, row: Row, tasks: int) -> list[Field]:
    name = _name(study, row.column)
    if row.tasks < tasks:
        name = Field(f"{name.shown}<small>{row.tasks} of {tasks} tasks</small>", name.value)
    return [
        name, _score(row.score, row.interval), _signed(row.against_full), _number(row.kv_bytes, _bytes),
        _number(row.smaller, lambda v: f"{v:.1f}×"), _number(row.peak_kv_bytes, _bytes),
        _number(row.retention, lambda v: f"{100 * v:.0f} %"), _number(row.kl, lambda v: f"{v:.3f}"),
        _signed(row.delta, 3), _number(row.ttft, _seconds), _number(row.tpot, _seconds),
        _number(row.n, lambda v: f"{v:.0f}"),
    ]  # fmt: skip


def _matrix(study: Study) -> str:
    """Variants by tasks, shaded."""
    parts = []
    for length in study.lengths:
        tasks = study.tasks_at(length)
        if len(tasks) < 2:
            continue
        rows = []
        for column in study.columns:
            by_task = {cell["task"]: cell for cell in study.of(column=column, length=length)}
            if by_task:
                rows.append([_name(study, column), *(_shaded(by_task.get(task)) for task in tasks)])
        columns = [("method and budget", ""), *((task, study.tasks[task]["summary"]) for task in tasks)]
        ceilings = _ceilings(study, length)
        note = f'<p class="muted">{ceilings}</p>' if ceilings else ""
        parts.append(f"<h3>Scores by task at {escape(length_text(length))}</h3>{note}{table(columns, rows)}")
    return "".join(parts)


def _shaded(cell: Cell | None) -> Field:
    if cell is None:
        return Field("", None)
    ceiling = f"<small>max {cell['ceiling']:.0f}</small>" if "ceiling" in cell else ""
    return Field(f"{cell['score']:.0f}{ceiling}", cell["score"], f' class="cell" style="--v:{cell["score"] / 100:.3f}"')


def _ceilings(study: Study, length: int) -> str:
    dense = list(dict.fromkeys(cell["task"] for cell in study.of(length=length) if "ceiling" in cell))
    if not dense:
        return ""
    return (
        f"In {escape(', '.join(dense))} every part of the context is as likely to be asked for as any other; "
        "max is what a method that has not seen the question can expect."
    )


def _tasks(study: Study) -> str:
    """One table a task, folded."""
    columns = [
        ("method and budget", ""), ("length", "tokens"), ("score", "95 % interval"),
        ("set", "the benchmark's number for the whole set, not the mean over samples"), ("ceiling", "query-agnostic"),
        ("vs. full", "points, same samples"), ("p", "of being as good as the full cache; paired"),
        ("gold kept", "share of the gold facts' units held"), ("KL", "nats a token, on the answer"),
        ("ΔNLL", "of the right answer"), ("agreement", "same likeliest next token as the full cache"),
        ("perplexity", "of the context's last tokens"), ("answer tokens", "mean length of the answers"),
        ("KV bytes", "a sequence"), ("n", "samples"),
    ]  # fmt: skip
    parts = ["<h3>Task by task</h3>"]
    for task, facts in study.tasks.items():
        full = {cell["length"]: cell for cell in study.of(task=task) if cell["budget"] is None}
        rows = [_task_row(study, cell, full.get(cell["length"])) for cell in study.of(task=task)]
        kept = [i for i in range(len(columns)) if i < 3 or any(row[i].value is not None for row in rows)]
        parts.append(
            f"<details><summary>{escape(task)} <span class=muted>{escape(facts['summary'])}"
            f"{' · dense' if facts['dense'] else ''} · {escape(facts['metric'])}</span></summary>"
            + table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows])
            + "</details>"
        )
    return "".join(parts)


def _task_row(study: Study, cell: Cell, full: Cell | None) -> list[Field]:
    p = p_against_full(cell, full)
    return [
        _name(study, (cell["method"], cell["budget"])), Field(length_text(cell["length"]), cell["length"]),
        _score(cell["score"], cell["interval"]), _number(cell.get("corpus"), lambda v: f"{v:.1f}"),
        _number(cell.get("ceiling"), lambda v: f"{v:.0f}"),
        _signed(cell.get("against_full")), _number(p, lambda v: "&lt; 0.001" if v < 0.001 else f"{v:.3f}"),
        _number(cell.get("retention"), lambda v: f"{100 * v:.0f} %"), _number(cell["kl"], lambda v: f"{v:.3f}"),
        _signed(cell["delta"], 3), _number(cell["agreement"], lambda v: f"{100 * v:.0f} %"),
        _number(cell.get("tail", {}).get("perplexity"), lambda v: f"{v:.2f}"),
        _number(cell["tokens"], lambda v: f"{v:.1f}"), _number(cell["kv_bytes"], _bytes),
        _number(cell["n"], lambda v: f"{v}"),
    ]  # fmt: skip


# --- pictures


def _figure(caption: str, picture: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{picture}</figure>"


def _legend(study: Study) -> str:
    items = [f'<li class="c{i % NUM_COLOURS}"><span class="swatch"></span><span>{escape(method)}</span></li>'
             for i, method in enumerate(study.methods)]  # fmt: skip
    return f'<ul class="legend">{"".join(items)}</ul>'


def _pareto(study: Study) -> str:
    figures = []
    for length in study.lengths:
        complete = len(study.tasks_at(length))
        rows = [row for row in study.rows(length) if row.tasks == complete]
        series = _series(study, rows, lambda row: row.kv_bytes)
        full = next((row for row in rows if row.column[1] is None), None)
        picture = plot(
            series, x_label="KV cache, bytes a sequence", y_label="mean score", x_text=_bytes,
            label=f"mean score over KV cache bytes at {length_text(length)}",
            level=full.score if full else None, level_text="full cache",
        )  # fmt: skip
        figures.append(_figure(f"Accuracy and memory at {length_text(length)}", picture))
    return f'<h3>Accuracy and memory</h3>{_legend(study)}<div class="grid">{"".join(figures)}</div>'


def _curves(study: Study) -> str:
    """Score over length, a picture a budget; only tasks that were run at every length."""
    lengths = [length for length in study.lengths if length]
    if len(lengths) < 2:
        return ""
    shared = set.intersection(*(set(study.tasks_at(length)) for length in lengths))
    if not shared:
        return ""
    common = Study(study.title, study.query_aware, study.tasks, [c for c in study.cells if c["task"] in shared])
    figures = []
    for budget in dict.fromkeys(b for _, b in study.columns if b is not None):
        rows = [row for length in lengths for row in common.rows(length) if row.column[1] in (None, budget)]
        rows = [row for row in rows if row.tasks == len(shared)]
        picture = plot(
            _series(study, rows, lambda row: row.length), x_label="context, tokens", y_label="mean score",
            x_text=lambda x: length_text(round(x)), label=f"mean score over length at budget {budget}",
        )  # fmt: skip
        figures.append(_figure(f"Budget {budget}, mean over {len(shared)} tasks", picture))
    return f'<h3>Accuracy and length</h3>{_legend(study)}<div class="grid">{"".join(figures)}</div>'


def _series(study: Study, rows: Sequence[Row], x: Callable[[Row], float]) -> list[Series]:
    made = []
    for colour, method in enumerate(study.methods):
        points = [
            Point(x(row), row.score, *row.interval,
                  f"{column_text(row.column)} at {length_text(row.length)}: {row.score:.1f} "
                  f"[{row.interval[0]:.1f}, {row.interval[1]:.1f}], {_bytes(row.kv_bytes)}")
            for row in rows if row.column[0] == method
        ]  # fmt: skip
        if points:
            made.append(Series(method, colour, points))
    return made


def _depths(study: Study) -> str:
    figures = []
    for column in study.columns:
        values = depth_map(study.of(column=column))
        if values is not None:
            name = column_text(column)
            figures.append(_figure(name, heat(values, label=f"score by depth and length, {name}", row_name="depth",
                                              column_name="length")))  # fmt: skip
    if not figures:
        return ""
    return (
        '<h3>Where the needle lies</h3><p class="muted">Mean score by depth of the fact in the context (rows) and '
        f'length (columns), over all tasks with one fact a sample.</p><div class="grid small">{"".join(figures)}</div>'
    )


def _retention(study: Study) -> str:
    figures = []
    for column in study.columns:
        values = None if column[1] is None else retention_map(study.of(column=column))
        if values is not None:
            name = column_text(column)
            figures.append(_figure(name, heat(values, label=f"gold units kept, {name}", row_name="layer",
                                              column_name="KV head")))  # fmt: skip
    if not figures:
        return ""
    return (
        '<h3>Which layers and heads keep the facts</h3><p class="muted">Share of the gold facts\' units that are still '
        f'held when the context has been read.</p><div class="grid small">{"".join(figures)}</div>'
    )


def _provenance(study: Study) -> str:
    parts = ["<h3>How these numbers were made</h3>"]
    for run, grid in zip(study.runs, study.grids, strict=True):
        facts = run.get("provenance", {})
        if facts.get("command"):
            parts.append(f"<pre>{escape(facts['command'])}</pre>")
        shown = {name: value for name, value in facts.items() if name != "command" and value}
        items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in shown.items())
        parts.append(f"<dl>{items}</dl>")
        parts.append(f"<details><summary>the grid</summary><pre>{escape(json.dumps(grid, indent=1))}</pre></details>")
    return "".join(parts)


def _bytes(count: float) -> str:
    for name in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if name == "B" else f"{count:.3g} {name}"
        count /= 1024
    return f"{count:.3g} GiB"


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
