"""From lines to cells: one per (task, length, method, budget), with intervals, costs and distances."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from locret.backbone import Backbone
from locret.errors import ConfigError
from locret.evaluate.grid import Grid
from locret.evaluate.machine import joined, machines, provenance
from locret.evaluate.run import Expected
from locret.evaluate.source import Source
from locret.evaluate.stats import bootstrap, mean_interval
from locret.evaluate.store import Line, dump
from locret.files import write_text
from locret.tasks.metrics import longbench_e

FORMAT = "locret-eval-1"
Cell = dict[str, Any]
Results = dict[str, Any]


def finish(
    folder: Path, grid: Grid, backbone: Backbone, source: Source, found: Expected, *, command: str = ""
) -> Results:
    """Write samples.jsonl, results.json and run.json of a complete run; returns the results."""
    lines = found.ordered()
    plain = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    write_text(folder / "samples.jsonl", "".join(dump(line) for line in plain))
    results = summarise(grid, backbone, source, lines)
    write_text(folder / "results.json", json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    write_text(folder / "run.json", json.dumps(_run_facts(folder, lines, backbone, command), indent=1) + "\n")
    return results


def summarise(grid: Grid, backbone: Backbone, source: Source, lines: Sequence[Line]) -> Results:
    """Cells in the order of the grid. Nothing here depends on the clock or on the machine."""
    by_cell: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        by_cell.setdefault((line["task"], line["length"], line["method"], line["budget"]), []).append(line)
    facts = {task: source.facts(task) for task in dict.fromkeys(key[0] for key in by_cell)}
    full = {_sample(line): line for line in lines if line["budget"] is None}
    return {
        "format": FORMAT,
        "grid": grid.to_dict(),
        "model": {"name": grid.model or "embedded", **backbone.fingerprint(), "dtype": str(backbone.dtype)},
        "tasks": {task: {"summary": fact.summary, "group": fact.group, "metric": fact.metric, "dense": fact.dense}
                  for task, fact in facts.items()},
        "cells": [_cell(key, mine, full) | _set_scores(mine, source) for key, mine in by_cell.items()],
    }  # fmt: skip


def load_results(path: Path) -> Results:
    """A results.json, or the folder that holds one. Raises: ConfigError."""
    file = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read results from {path}: {error}; give a results.json of `locret eval`") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigError(f"{file} is no results file of this version ({FORMAT})")
    return found


def load_run(path: Path) -> dict[str, Any]:
    """The run.json beside results, or nothing."""
    file = (path if path.is_dir() else path.parent) / "run.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _cell(key: tuple[Any, ...], lines: list[Line], full: dict[tuple[Any, ...], Line]) -> Cell:
    task, length, method, budget = key
    scores = [line["score"] for line in lines]
    cell: Cell = {
        "task": task, "length": length, "method": method, "budget": budget, "n": len(lines),
        "score": _mean(scores), "interval": _pair(mean_interval(scores)),
        **{name: round(_mean([line[name] for line in lines])) for name in
           ("prompt_tokens", "units", "kv_bytes", "peak_kv_bytes", "kv_bytes_full")},
        "tokens": _mean([turn["tokens"] for line in lines for turn in line["turns"]]),
    }  # fmt: skip
    for name in ("nll", "delta", "kl", "agreement"):
        cell[name] = _mean_known([turn[name] for line in lines for turn in line["turns"]])
    tails = [line["tail"] for line in lines if "tail" in line]
    if tails:
        cell["tail"] = {name: _mean_known([tail[name] for tail in tails]) for name in tails[0]}
        cell["tail"]["perplexity"] = round(float(np.exp(cell["tail"]["nll"])), 4)
    pairs = [(line, full[_sample(line)]) for line in lines if _sample(line) in full]
    if pairs and budget is not None:
        differences = [line["score"] - other["score"] for line, other in pairs]
        cell["against_full"] = _mean(differences)
        cell["against_full_interval"] = _pair(bootstrap(differences))
        cell["length_shift"] = _mean([_tokens(line) - _tokens(other) for line, other in pairs])
    gold = [line for line in lines if "kept" in line]
    if gold:
        shares = np.array([np.array(line["kept"]) / line["gold"] for line in gold])  # [N, L, Hkv]
        cell["retention"] = round(float(shares.mean()), 4)
        cell["retention_map"] = shares.mean(axis=0).round(4).tolist()
    if all("ceiling" in line for line in lines):
        cell["ceiling"] = _mean([line["ceiling"] for line in lines])
    cell["samples"] = [f"{line['seed']}/{line['index']}/{line['sample']}" for line in lines]
    cell["scores"] = scores
    if all("depth" in line for line in lines):
        cell["depths"] = [line["depth"] for line in lines]
    return cell


def _set_scores(lines: list[Line], source: Source) -> Cell:
    """What a benchmark makes of a whole set where that is not, or not only, the mean over samples.

    corpus: its number for the set (L-Eval's ROUGE);  by_words: LongBench's means by length in words.
    """
    found: Cell = {}
    if all("answers" in line for line in lines):
        predictions = [turn["prediction"] for line in lines for turn in line["turns"]]
        answers = [given for line in lines for given in line["answers"]]
        value = source.corpus_score(lines[0]["metric"], predictions, answers)
        if value is not None:
            found["corpus"] = round(value, 4)
    if all("words" in line for line in lines):
        groups = longbench_e([line["score"] for line in lines], [line["words"] for line in lines])
        found["by_words"] = {name: round(value, 4) for name, value in groups.items()}
    return found


def _run_facts(folder: Path, lines: Sequence[Line], backbone: Backbone, command: str) -> dict[str, Any]:
    """What is not the same twice."""
    by_cell: dict[str, list[Line]] = {}
    for line in lines:
        by_cell.setdefault(cell_name(line), []).append(line)
    return {
        "provenance": {"command": command, **joined(machines(folder) or [provenance(backbone)])},
        "seconds": {
            name: {part: _mean_known([line["seconds"][part] for line in mine]) for part in ("ttft", "tpot")}
            for name, mine in by_cell.items()
        },
    }


def cell_name(cell: Line | Cell) -> str:
    return "/".join(str(cell[name]) for name in ("task", "length", "method", "budget"))


def _sample(line: Line) -> tuple[Any, ...]:
    return (line["task"], line["length"], line["seed"], line["index"])


def _tokens(line: Line) -> float:
    return sum(turn["tokens"] for turn in line["turns"]) / len(line["turns"])


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 6) if known else None


def _pair(interval: tuple[float, float]) -> list[float]:
    return [round(value, 4) for value in interval]
