"""`locret eval` beside kvpress's presses in kvpress's own environment: same texts, same metrics, their bytes and ours.

    locret eval recipes/grids/kvpress.toml --output RUN
    python benchmarks/kvpress_eval.py RUN --peer FOLDER/bin/python    (kvpress 0.5.5 needs transformers < 5.3)

Takes the finished run's grid, writes its samples in kvpress's schema (`locret eval --export-kvpress`), has them
answered there by kvpress's own pipeline (one shot: the context in one piece, compressed once, then the question; a row
a question, resumable in RUN/kvpress.jsonl), and scores the answers here. Any model that both read: the grid names it.
Bytes are those of the cache when the context has been read. Writes results/kvpress-eval.json and the table in
docs/evaluate.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "kvpress-eval.json"
PAGE = ROOT / "docs" / "evaluate.md"
PRESSES = {"snapkv": "SnapKV", "streamingllm": "StreamingLLM", "knorm": "Knorm",
           "expected_attention": "ExpectedAttention"}  # fmt: skip
Line = dict[str, Any]


# ---------------------------------------------------------------------- in the other environment


def answer(rows: Path, out: Path, model_name: str, dtype: str, share: float, limit: float) -> None:
    """Append a line for every row and press that `out` lacks."""
    import time

    import kvpress
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

    stop = time.monotonic() + limit
    torch.set_num_threads(1)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    ask = pipeline("kv-press-text-generation", model=model.to(device).eval(), tokenizer=tokenizer, device=device)
    done = {tuple(line["key"]) for line in _lines(out)} if out.exists() else set()
    with out.open("a", encoding="utf-8") as file:
        for number, row in enumerate(_lines(rows)):
            for name in ("none", *PRESSES.values()):
                if (number, name) in done or time.monotonic() > stop:
                    continue
                press = None if name == "none" else getattr(kvpress, f"{name}Press")(compression_ratio=1 - share)
                cache = DynamicCache()
                with torch.no_grad():
                    given = ask(row["context"], question=row["question"], answer_prefix=row["answer_prefix"],
                                press=press, max_new_tokens=row["max_new_tokens"], cache=cache)  # fmt: skip
                held = [layer for layer in cache.layers if layer.keys is not None]
                file.write(json.dumps({
                    "key": [number, name], "prediction": given["answer"],
                    "units": sum(layer.keys.shape[2] for layer in held) / len(held),
                    "bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in held),
                }) + "\n")  # fmt: skip
                file.flush()


def _lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


# ---------------------------------------------------------------------- here


def cells(rows: list[Line], answers: list[Line], results: Line) -> list[Line]:
    """One per task and method or press: ours from the results, theirs scored with the rows' metrics."""
    from locret.evaluate.stats import mean_interval
    from locret.tasks import metrics

    found: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for (number, press), line in {tuple(line["key"]): line for line in answers}.items():  # each once
        row = rows[number]
        found[row["task"], press].append({**line, "score": metrics.score(row["metric"], line["prediction"],
                                                                         row["answers"]), "row": row})  # fmt: skip
    made: list[Line] = []
    ours = {(cell["task"], cell["method"]): cell for cell in results["cells"]}
    for (task, method), cell in ours.items():
        made.append({"side": "locret", "task": task, "name": method, "n": cell["n"], "score": cell["score"],
                     "interval": cell["interval"], "units": cell["units"], "bytes": cell["kv_bytes"]})  # fmt: skip
    for (task, press), lines in found.items():
        names = {f"{line['row']['seed']}/{line['row']['index']}/{line['row']['sample']}" for line in lines}
        assert names <= set(ours[task, "full"]["samples"]), "the same texts on both sides"
        scores = [line["score"] for line in lines]
        made.append({"side": "kvpress", "task": task, "name": press, "n": len(lines),
                     "score": sum(scores) / len(scores), "interval": list(mean_interval(scores)),
                     "units": sum(line["units"] for line in lines) / len(lines),
                     "bytes": round(sum(line["bytes"] for line in lines) / len(lines))})  # fmt: skip
    return made


def table(made: list[Line]) -> str:
    tasks = list(dict.fromkeys(cell["task"] for cell in made))
    lines = [f"| | {' | '.join(tasks)} | units | KV bytes |", "|---" * (len(tasks) + 3) + "|"]
    for side, name in dict.fromkeys((cell["side"], cell["name"]) for cell in made):
        mine = {cell["task"]: cell for cell in made if (cell["side"], cell["name"]) == (side, name)}
        label = f"`{name}`" if side == "locret" else f"kvpress, {'no press' if name == 'none' else name}"
        fewest = min(cell["n"] for cell in mine.values())
        label += f" (n from {fewest})" if fewest < max(cell["n"] for cell in made) else ""
        shown = " | ".join(f"{mine[task]['score']:.0f} [{mine[task]['interval'][0]:.0f}, "
                           f"{mine[task]['interval'][1]:.0f}]" if task in mine else "" for task in tasks)  # fmt: skip
        units, size = (sum(cell[what] for cell in mine.values()) / len(mine) for what in ("units", "bytes"))
        lines.append(f"| {label} | {shown} | {units:,.0f} | {size:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished `locret eval` with one budget, a share")
    parser.add_argument("--peer", required=True, help="python of an environment with kvpress")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which kvpress begins nothing more")
    parser.add_argument("--answer", nargs=4, help=argparse.SUPPRESS)  # we are the peer: rows, model, dtype, share
    arguments = parser.parse_args()
    out = arguments.run / "kvpress.jsonl"
    if arguments.answer:
        rows, model, dtype, share = arguments.answer
        answer(Path(rows), out, model, dtype, float(share), arguments.limit)
        return
    from common import fill, provenance  # not in the peer's environment, which has no locret
    from transformers import AutoTokenizer

    from locret.backbone import EMBEDDED
    from locret.evaluate.exchange import export_grid
    from locret.evaluate.grid import Grid
    from locret.evaluate.samples import Samples
    from locret.evaluate.suite import SuiteSource
    from locret.evaluate.summary import load_results

    results = load_results(arguments.run)
    grid = Grid.from_dict(results["grid"])
    [budget] = grid.budgets
    share = float(str(budget).removesuffix("%")) / 100
    model = grid.model or str(EMBEDDED)
    rows = arguments.run / "samples.kvpress.jsonl"
    export_grid(Samples(grid, SuiteSource(), AutoTokenizer.from_pretrained(model)), rows)
    dtype = results["model"]["dtype"].removeprefix("torch.")
    peer = [arguments.peer, __file__, str(arguments.run), "--peer", arguments.peer, "--limit", str(arguments.limit)]
    subprocess.run([*peer, "--answer", str(rows), model, dtype, str(share)], check=True)
    made = cells(_lines(rows), _lines(out), results)
    versions = subprocess.run(
        [arguments.peer, "-c", "from importlib.metadata import version as v; print(v('kvpress'), v('transformers'))"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    result = {"provenance": {**provenance(), "command": "python benchmarks/kvpress_eval.py RUN --peer PYTHON"},
              "grid": results["grid"], "kvpress": versions[0], "their_transformers": versions[1],
              "cells": made}  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    fill(PAGE, "kvpress-eval", table(made))


if __name__ == "__main__":
    sys.exit(main())
