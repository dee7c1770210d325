"""`locret eval`: run a grid of tasks, methods and budgets; compare two results; write their report."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from locret.cli.options import OutputOptions, with_options
from locret.cli.output import bytes_text, emit, note, progress, say, table
from locret.cli.session import quiet_transformers
from locret.errors import ConfigError

if TYPE_CHECKING:
    from locret.backbone import Backbone
    from locret.evaluate.compare import Change, Comparison
    from locret.evaluate.grid import Grid
    from locret.evaluate.samples import Samples
    from locret.evaluate.source import Source
    from locret.evaluate.summary import Results
    from locret.heads import RetainingHeads

_GRID = "Grid (over what the file says)"


@with_options
def evaluate(
    output: OutputOptions,
    grid: Annotated[Path | None, Argument(help="TOML file with the grid; flags win over it.")] = None,
    destination: Annotated[
        Path | None, Option("--output", help="Folder for samples, results and report; the same one resumes.")
    ] = None,
    tasks: Annotated[
        str | None, Option("--tasks", help="Names or groups, separated by commas: ruler,niah.", rich_help_panel=_GRID)
    ] = None,
    methods: Annotated[
        str | None,
        Option(
            "--methods",
            help="As full,locret,snapkv:window=64; see `locret methods`; also oracle_gold, oracle_cis, oracle_mass.",
            rich_help_panel=_GRID,
        ),
    ] = None,
    budgets: Annotated[
        str | None, Option("--budgets", help="Units, bytes or shares: 1024,2MiB,5%.", rich_help_panel=_GRID)
    ] = None,
    lengths: Annotated[
        str | None, Option("--lengths", help="Tokens of a generated sample: 4096,16384.", rich_help_panel=_GRID)
    ] = None,
    samples: Annotated[
        int | None, Option("--samples", help="Samples per task, length and seed.", rich_help_panel=_GRID)
    ] = None,
    query_aware: Annotated[
        bool | None,
        Option(
            "--query-aware/--query-agnostic",
            help="Whether the question is known when the context is compressed (default: it is not).",
            rich_help_panel=_GRID,
        ),
    ] = None,
    even_lengths: Annotated[
        bool | None,
        Option(
            "--even-lengths/--natural-lengths",
            help="Whether blank lines make all samples of a task equally long, so that they run as batches.",
            rich_help_panel=_GRID,
        ),
    ] = None,
    batch_size: Annotated[
        int | None, Option("--batch-size", help="Samples of equal length run together.", rich_help_panel=_GRID)
    ] = None,
    batch_tokens: Annotated[
        int | None,
        Option("--batch-tokens", help="Instead: as many as have so many context tokens.", rich_help_panel=_GRID),
    ] = None,
    model: Annotated[
        str | None,
        Option("--model", help="Folder or Hugging Face id. (default: the embedded model)", rich_help_panel=_GRID),
    ] = None,
    heads: Annotated[
        str | None, Option("--heads", help="Folder or id of trained retaining heads.", rich_help_panel=_GRID)
    ] = None,
    dtype: Annotated[
        str | None, Option("--dtype", help="auto, float32, bfloat16 or float16.", rich_help_panel=_GRID)
    ] = None,
    device: Annotated[str, Option("--device", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    sample_files: Annotated[
        Path | None, Option("--sample-files", help="Folder to keep samples in, for runs and processes to share.")
    ] = None,
    prepare: Annotated[
        int | None, Option("--prepare", help="Only make the files of --sample-files, with so many processes.")
    ] = None,
    export_kvpress: Annotated[
        Path | None,
        Option("--export-kvpress", help="Only write the grid's samples to this .jsonl, in kvpress's schema."),
    ] = None,
    stop_after: Annotated[
        float | None,
        Option(
            "--stop-after", help="Begin nothing more after so many seconds; the same command goes on. 0: only sum up."
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        Option("--compare", help="Two results.json (or folders): what changed, and is it significant."),
    ] = None,
    report: Annotated[
        list[Path] | None,
        Option("--report", help="Write the report of results that are there into --output; may be repeated."),
    ] = None,
) -> None:
    """Measure what is lost at a budget: tasks x methods x budgets x lengths, with intervals, bytes and a report.

    Stop it whenever you like; the same command goes on where it was. Under torchrun every process takes a share.
    """
    started = time.monotonic()
    if compare is not None:
        _compare(compare, output)
        return
    flags: dict[str, Any] = {
        "tasks": _split(tasks), "methods": _split(methods), "budgets": _numbers(budgets), "lengths": _numbers(lengths),
        "samples": samples, "query_aware": query_aware, "even_lengths": even_lengths, "batch_size": batch_size,
        "batch_tokens": batch_tokens, "model": model, "heads": heads, "dtype": dtype,
    }  # fmt: skip
    given = {name: value for name, value in flags.items() if value is not None}
    if report:
        _report(report, _somewhere(destination), output)
        return
    wanted = _grid(grid, given)
    if prepare is not None:
        _prepare(wanted, sample_files, prepare)
        return
    if export_kvpress is not None:
        _export(wanted, export_kvpress)
        return
    deadline = None if stop_after is None else started + stop_after
    _run(wanted, _somewhere(destination), device, output, sample_files, deadline)


def _somewhere(destination: Path | None) -> Path:
    if destination is None:
        raise ConfigError("nowhere to write to; add --output DIR")
    return destination


def _grid(path: Path | None, flags: dict[str, Any]) -> Grid:
    from locret.evaluate.grid import Grid

    if path is not None:
        return Grid.from_toml(path, **flags)
    if "tasks" not in flags:
        raise ConfigError("no grid; give a TOML file, or --tasks NAME,NAME ...")
    return Grid.from_dict(flags)


@dataclass(frozen=True)
class _Place:
    """Which of how many processes this is, as torchrun says."""

    rank: int
    world: int
    local: int

    @classmethod
    def of_environment(cls) -> _Place:
        rank, world, local = (int(os.environ.get(name, default)) for name, default in
                              (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
        return cls(rank, world, local)

    def device(self, asked: str) -> str:
        import torch

        if asked == "auto" and self.world > 1 and torch.cuda.is_available():
            return f"cuda:{self.local % torch.cuda.device_count()}"
        return asked


def _prepare(grid: Grid, folder: Path | None, workers: int) -> None:
    from locret.evaluate.samples import prepare

    if folder is None or workers < 1:
        raise ConfigError("--prepare N wants N >= 1 processes, and --sample-files DIR to write to")
    samples = _samples(grid, folder)
    with progress("writing samples", unit="files") as report:
        prepare(samples, workers, report)
    say(f"samples: {folder}")


def _export(grid: Grid, path: Path) -> None:
    from locret.evaluate.exchange import export_grid

    say(f"{export_grid(_samples(grid, None), path)} rows: {path}")


def _samples(grid: Grid, folder: Path | None) -> Samples:
    """The samples of a grid, without its model."""
    from transformers import AutoTokenizer

    from locret.backbone import EMBEDDED
    from locret.evaluate.run import check
    from locret.evaluate.samples import Samples

    source = suite_source()
    grid = grid.expanded(source.groups())
    check(grid, source)
    quiet_transformers()
    return Samples(grid, source, AutoTokenizer.from_pretrained(grid.model or EMBEDDED), folder)


def _run(
    grid: Grid, destination: Path, device: str, output: OutputOptions, files: Path | None, deadline: float | None
) -> None:
    from locret.backbone import Backbone
    from locret.evaluate.run import check, run
    from locret.evaluate.summary import finish
    from locret.report.page import write_report

    source = suite_source()
    grid = grid.expanded(source.groups())
    check(grid, source)
    quiet_transformers()
    place = _Place.of_environment()
    backbone = Backbone.load(grid.model, device=place.device(device), dtype=grid.dtype)
    with progress("evaluating", unit="samples") as report:
        try:
            found = run(
                grid, backbone, source, destination, heads=_heads(grid, backbone), rank=place.rank, world=place.world,
                samples=files, deadline=deadline, on_progress=report if place.rank == 0 else None,
            )  # fmt: skip
        except KeyboardInterrupt:
            note(f"stopped; what is done is in {destination}, the same command goes on")
            raise typer.Exit(130) from None
    stopped = deadline is not None and time.monotonic() >= deadline
    if found.missing:
        left = f"{found.missing} of {len(found.keys)} answers are missing"
        if stopped:
            note(f"stopped by --stop-after; {left}: the same command goes on")
        elif place.world > 1:
            note(f"process {place.rank} of {place.world} is done; {left} that are still running in others")
        else:
            note(f"{left}: see the warnings above")
        if place.world > 1 or not found.lines:
            return
    command = "locret " + shlex.join(sys.argv[1:])
    results = finish(destination, grid, backbone, source, found, command=command)
    page = write_report([destination], destination)
    if output.json:
        emit({"output": str(destination), "report": str(page), "cells": _plain_cells(results)})
        return
    _show(results)
    say(f"report: {page}")


def suite_source() -> Source:
    """The project's own tasks."""
    from locret.evaluate.suite import SuiteSource

    return SuiteSource()


def _heads(grid: Grid, backbone: Backbone) -> RetainingHeads | None:
    from locret.backbone import EMBEDDED
    from locret.heads import RetainingHeads

    where = grid.heads or (EMBEDDED / "heads" if grid.model is None else None)
    return None if where is None else RetainingHeads.from_pretrained(where)


def _plain_cells(results: Results) -> list[dict[str, Any]]:
    hidden = ("samples", "scores", "depths", "retention_map")
    return [{name: value for name, value in cell.items() if name not in hidden} for cell in results["cells"]]


def _show(results: Results) -> None:
    """A table a length."""
    grid = results["grid"]
    mode = f"{'query-aware' if grid['query_aware'] else 'query-agnostic'}, {grid['mode']}"
    for length in dict.fromkeys(cell["length"] for cell in results["cells"]):
        cells = [cell for cell in results["cells"] if cell["length"] == length]
        title = f"{f'{length:,} tokens' if length else 'public sets'}, {mode}, n {_span([cell['n'] for cell in cells])}"
        table(("task", "method", "score", "95 %", "max", "gold", "KV cache"), map(_show_cell, cells), title=title)
    say("max: what a method that has not seen the question can expect; gold: share of the facts' units that were kept")


def _show_cell(cell: dict[str, Any]) -> tuple[str, ...]:
    low, high = cell["interval"]
    return (
        cell["task"], " ".join(map(str, filter(None, (cell["method"], cell["budget"])))), f"{cell['score']:.1f}",
        f"{low:.0f}-{high:.0f}", f"{cell['ceiling']:.0f}" if "ceiling" in cell else "",
        f"{100 * cell['retention']:.0f} %" if "retention" in cell else "", bytes_text(cell["kv_bytes"]),
    )  # fmt: skip


def _span(counts: Sequence[int]) -> str:
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _report(folders: Sequence[Path], destination: Path, output: OutputOptions) -> None:
    from locret.report.page import write_report

    page = write_report(folders, destination)
    if output.json:
        emit({"report": str(page)})
    else:
        say(f"report: {page}")


def _compare(paths: tuple[Path, Path], output: OutputOptions) -> None:
    from locret.evaluate.compare import compare
    from locret.evaluate.summary import load_results

    found = compare(load_results(paths[0]), load_results(paths[1]))
    if output.json:
        changes = [{**vars(change), "significant": change.significant} for change in found.changes]
        emit({**vars(found), "changes": changes})
        return
    _show_comparison(found)


def _show_comparison(found: Comparison) -> None:
    for name, (a, b) in found.settings.items():
        note(f"{name} differs: {a!r} in A, {b!r} in B")
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        if names:
            note(f"only in {side}: {', '.join(names)}")
    for length in dict.fromkeys(change.length for change in found.changes):
        title = f"{f'{length:,} tokens' if length else 'public sets'}, paired on the same samples"
        columns = ("task", "method", "n", "A", "B", "B - A", "95 %", "p", "")
        table(columns, [_show_change(c) for c in found.changes if c.length == length], title=title)
    say("p: McNemar's test where all scores are 0 or 100, else by permutation; adjusted for all cells (Holm)")
    better = sum(c.significant and c.difference > 0 for c in found.changes)
    worse = sum(c.significant and c.difference < 0 for c in found.changes)
    say(f"{len(found.changes)} cells compared: {better} significantly better, {worse} significantly worse in B")


def _show_change(change: Change) -> tuple[str, ...]:
    low, high = change.interval
    return (
        change.task, " ".join(map(str, filter(None, (change.method, change.budget)))), str(change.n),
        f"{change.a:.1f}", f"{change.b:.1f}", f"{change.difference:+.1f}", f"{low:+.0f} .. {high:+.0f}",
        f"{change.p_adjusted:.3f}", ("better" if change.difference > 0 else "worse") if change.significant else "",
    )  # fmt: skip


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str | None) -> list[int | str] | None:
    """Whole numbers as such; whatever else stays text for the grid to judge."""
    parts = _split(text)
    return None if parts is None else [int(part) if part.isdecimal() else part for part in parts]
