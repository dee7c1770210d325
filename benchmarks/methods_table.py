"""Every method on the embedded model, and every store under locret: bytes as allocated and CPU time beside the full
cache's.

    python benchmarks/methods_table.py            measure, write results/methods-cpu.json and the tables
    python benchmarks/methods_table.py --write    only write the tables in docs/methods.md

One prompt of random tokens a method, read in chunks, then some decode steps; times are processor time of one thread
(others use the machine too), of the fastest round where there are several, as ratios to the fastest of `full`.
Whatever is stored is in the bytes: K, V, scores, positions, flags, a method's own numbers, lengths of ragged heads,
scales and tables of stores. Files that methods need are made of random numbers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, fill, provenance
from methods_speed import cases, weights_file

from locret.backbone import EMBEDDED, Backbone
from locret.config import CacheConfig
from locret.heads import RetainingHeads
from locret.methods import get_method, list_methods
from locret.prefill import Reader

RESULT = RESULTS / "methods-cpu.json"
PAGE = ROOT / "docs" / "methods.md"
TOKENS, STEPS, ROUNDS = 4096, 32, 1
CACHE = dict(budget=512, chunk_size=512)


def measure(backbone: Backbone, case: str, ids: torch.Tensor, folder: Path) -> dict[str, Any]:
    """One prefill and STEPS decode steps."""
    name, _, storage = case.partition(" + ")
    heads = RetainingHeads.from_pretrained(EMBEDDED / "heads").eval() if name == "locret" else None
    method = get_method(name, heads=heads, **weights_file(name, backbone, folder))
    config = CacheConfig(**CACHE, storage=storage or "dense")
    with torch.inference_mode():
        reader = Reader.start(backbone, method, config, batch=1, prompt_len=TOKENS, new_tokens=STEPS)
        started = time.process_time()
        reader.read(ids)
        read = time.process_time()
        for step in range(STEPS):
            reader.step(ids[:, step])
        done = time.process_time()
    return {
        "prefill_seconds": read - started,
        "step_seconds": (done - read) / STEPS,
        "kv_bytes": reader.cache.nbytes,
        "peak_kv_bytes": reader.cache.peak_bytes,
    }


def run() -> dict[str, Any]:
    torch.set_num_threads(1)
    backbone = Backbone.load(device="cpu")
    ids = torch.randint(300, 4000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as made:
        measure(backbone, "full", ids, Path(made))  # warm-up
        runs = [{name: measure(backbone, name, ids, Path(made)) for name in cases()} for _ in range(ROUNDS)]
    cells = []
    for name in cases():
        cell: dict[str, Any] = {"method": name}
        for key in ("prefill_seconds", "step_seconds"):
            seconds = [turn[name][key] for turn in runs]
            cell[key] = seconds
            cell[key.replace("seconds", "ratio")] = min(seconds) / min(turn["full"][key] for turn in runs)
        cells.append({**cell, **{key: runs[0][name][key] for key in ("kv_bytes", "peak_kv_bytes")}})
    return {
        "provenance": provenance(), "threads": 1,
        "tokens": TOKENS, "steps": STEPS, "rounds": ROUNDS, **CACHE, "cells": cells,
    }  # fmt: skip


def measured_table(result: dict[str, Any]) -> str:
    lines = ["| method | KV bytes | of the full cache | peak KV bytes | prefill time, x full | decode step, x full |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    full = next(cell["kv_bytes"] for cell in result["cells"] if cell["method"] == "full")
    for cell in result["cells"]:
        times = [f"{cell[key]:.2f}" for key in ("prefill_ratio", "step_ratio")]
        lines.append(f"| `{cell['method']}` | {cell['kv_bytes']:,} | {cell['kv_bytes'] / full:.1%} | "
                     f"{cell['peak_kv_bytes']:,} | " + " | ".join(times) + " |")  # fmt: skip
    return "\n".join(lines)


def methods_table() -> str:
    lines = ["| method | keeps | paper | reads the question | trained | differs from its paper |", "|---" * 6 + "|"]
    yes = {True: "yes", False: ""}
    for i in list_methods():
        cells = (i.summary, i.paper, yes[i.query_aware], yes[i.trained], i.variant)
        lines.append(f"| `{i.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables from what was measured before")
    if not parser.parse_args().write:
        RESULT.write_text(json.dumps(run(), indent=1) + "\n", encoding="utf-8")
    fill(PAGE, "methods", methods_table())
    fill(PAGE, "measured", measured_table(json.loads(RESULT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
