"""Prefill and decode speed of every method, and of every store under locret, at Llama-3.1-8B's layer shape.

    python benchmarks/methods_speed.py            measure on a GPU (about 100 s), results/methods-speed.json
    python benchmarks/methods_speed.py --write    only write the table in docs/methods.md

A stack of a few layers with random weights and a small vocabulary stands for the model: seconds and bytes of its layers
are multiplied up to 32, the embedding and output matrices are not in them, nor is what `sirllm` pays for logits of a
full vocabulary. Methods take turns; whoever stops it (or `--seconds`) can run it again, and it goes on where it was.
Files that methods need are made of random numbers: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, fill, provenance

sys.path.insert(0, str(ROOT / "tests"))
from peer_files import write_fastkvzip, write_kvzap

from locret.backbone import Backbone
from locret.bench import random_llm
from locret.config import STORAGE, CacheConfig
from locret.errors import LocretError
from locret.files import write_text
from locret.gate import Gate, Gates
from locret.heads import HeadsConfig, RetainingHeads
from locret.lococo import ConvMerge, Mergers
from locret.methods import get_method, list_methods, wants_heads
from locret.prefill import Reader

RESULT = RESULTS / "methods-speed.json"
PAGE = ROOT / "docs" / "methods.md"
LAYERS = 32  # of Llama-3.1-8B


def cases() -> list[str]:
    """Methods; then stores, as "locret + NAME". Full and locret first: the others are compared with them."""
    names = [info.name for info in list_methods() if info.name not in ("full", "locret")]
    return ["full", "locret", *names, *(f"locret + {name}" for name in STORAGE if name != "dense")]


def weights_file(name: str, backbone: Backbone, folder: Path) -> dict[str, Any]:
    """Options of a method that reads a file: one with random numbers."""
    layers, hidden = backbone.num_layers, backbone.model.config.hidden_size
    heads, group = backbone.num_kv_heads, backbone.num_q_heads // backbone.num_kv_heads
    if name == "kvzap":
        return {"path": str(write_kvzap(folder / name, layers=layers, hidden=hidden, heads=heads, width=512))}
    if name == "fastkvzip":
        sizes = dict(hidden=hidden, heads=heads, group=group)
        return {"path": str(write_fastkvzip(folder / name, layers=layers, **sizes))}
    if name == "attention_gate":
        Gates((Gate(hidden, heads) for _ in range(layers)), backbone.fingerprint()).save(folder / name)
        return {"path": str(folder / name)}
    if name == "lococo":
        made = Mergers((ConvMerge(backbone.head_dim, 8) for _ in range(layers)), backbone.fingerprint())
        made.save(folder / name)
        return {"path": str(folder / name)}
    return {}


def measure(backbone: Backbone, case: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One prefill and some decode steps; seconds and bytes of `args.layers` layers, as they are."""
    name, _, storage = case.partition(" + ")
    heads = None
    if wants_heads(name):
        heads = RetainingHeads(HeadsConfig.of(backbone)).to(backbone.device, backbone.dtype).requires_grad_(False)
    method = get_method(name, heads=heads, **weights_file(name, backbone, folder))
    config = CacheConfig(budget=args.budget, chunk_size=args.chunk, storage=storage or "dense")
    ids = torch.randint(0, backbone.model.config.vocab_size, (1, args.tokens), device=backbone.device)
    before = _start(backbone.device)
    reader = Reader.start(backbone, method, config, batch=1, prompt_len=args.tokens, new_tokens=args.steps)
    reader.read(ids)
    seconds = _now(backbone.device) - before
    steps = []
    for i in range(args.steps):
        before = _now(backbone.device)
        reader.step(ids[:, i])
        steps.append(_now(backbone.device) - before)
    return {
        "prefill_seconds": seconds, "step_seconds": statistics.median(steps), "slowest_step_seconds": max(steps),
        "kv_bytes": reader.cache.nbytes, "peak_kv_bytes": reader.cache.peak_bytes,
        "device_peak_bytes": torch.cuda.max_memory_allocated() if backbone.device.type == "cuda" else None,
    }  # fmt: skip


def _start(device: torch.device) -> float:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return _now(device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def run(args: argparse.Namespace) -> None:
    settings = {name: getattr(args, name) for name in ("shape", "tokens", "budget", "chunk", "steps", "dtype")}
    result = _load(args.output, settings)
    llm = random_llm(args.shape, device=args.device, dtype=args.dtype, method="random", config=CacheConfig())
    gc.freeze()  # the model and its libraries are not searched again at every start
    try:
        _measure_all(llm.backbone, args, result)
    finally:
        gc.unfreeze()


def _measure_all(backbone: Backbone, args: argparse.Namespace, result: dict[str, Any]) -> None:
    started = time.perf_counter()
    with torch.inference_mode(), backbone.seam(), tempfile.TemporaryDirectory() as folder:
        for turn in range(1, args.rounds + 1):
            for case in args.only or cases():
                cell = result["cells"].setdefault(case, {"runs": [], "failed": ""})
                if cell["failed"] or len(cell["runs"]) >= turn:
                    continue
                if time.perf_counter() - started > args.seconds:
                    print(f"stopped after {args.seconds} s; run it again to go on", flush=True)
                    return
                try:
                    if not cell["runs"]:
                        short = argparse.Namespace(
                            **{**vars(args), "tokens": min(args.tokens, 3 * args.chunk), "steps": 2}
                        )
                        measure(backbone, case, short, Path(folder))
                    cell["runs"].append(measure(backbone, case, args, Path(folder)))
                except (LocretError, RuntimeError) as error:  # of CUDA too: the others still have their turn
                    cell["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
                print(f"{time.perf_counter() - started:6.1f} s  {_line(case, cell)}", flush=True)
                write_text(args.output, json.dumps(result, indent=1) + "\n")


def _line(case: str, cell: dict[str, Any]) -> str:
    if cell["failed"]:
        return f"{case}: {cell['failed']}"
    last = cell["runs"][-1]
    return f"{case:28s} prefill {last['prefill_seconds']:7.3f} s  step {1000 * last['step_seconds']:7.2f} ms"


def _load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What was measured before with the same settings on the same device, or nothing."""
    about = {**provenance(), "triton": os.environ.get("LOCRET_TRITON", "")}
    fresh = {"provenance": about, "settings": settings, "cells": {}}
    if not path.is_file():
        return fresh
    old = json.loads(path.read_text(encoding="utf-8"))
    same = old["settings"] == settings and old["provenance"]["device"] == fresh["provenance"]["device"]
    return {**old, "cells": {k: {**c, "failed": ""} for k, c in old["cells"].items()}} if same else fresh


def table(result: dict[str, Any]) -> str:
    """Medians, scaled to all layers; ratios of times to `full` and to `locret`."""
    settings = result["settings"]
    layers = int(settings["shape"].split("x")[0])
    scale = LAYERS / layers
    cells = {name: cell for name, cell in result["cells"].items() if cell["runs"]}

    def of(name: str, key: str) -> float:
        return statistics.median(run[key] for run in cells[name]["runs"])

    lines = ["| method | prefill, tokens/s | x full | x locret | decode step, ms | x full | x locret | KV MiB | peak |",
             "|---" * 9 + "|"]  # fmt: skip
    for name in cells:
        row = [f"`{name}`"]
        for key, text in (("prefill_seconds", f"{settings['tokens'] / scale / of(name, 'prefill_seconds'):,.0f}"),
                          ("step_seconds", f"{1000 * scale * of(name, 'step_seconds'):.1f}")):  # fmt: skip
            row += [
                text,
                *(f"{of(name, key) / of(other, key):.2f}" if other in cells else "" for other in ("full", "locret")),
            ]
        kept = of(name, "kv_bytes")
        row += [f"{size / 2**20:,.0f}" for size in (scale * kept, scale * kept + of(name, "peak_kv_bytes") - kept)]
        lines.append("| " + " | ".join(row) + " |")
    failed = [f"`{name}`: {cell['failed']}" for name, cell in result["cells"].items() if cell["failed"]]
    about = result["provenance"]
    runs = min(len(cell["runs"]) for cell in cells.values())
    lines += [
        "",
        f"{about['device']}, torch {about['torch']}, {settings['dtype']}, {settings['tokens']:,} tokens, budget "
        f"{settings['budget']:,}, chunk {settings['chunk']:,}; {layers} layers measured, scaled by {scale:g}; medians "
        f"of at least {runs} runs.",
    ]
    return "\n".join(lines + [f"Not measured: {'; '.join(failed)}."] * bool(failed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4x4096x14336x32x8x1024", help="LAYERSxHIDDENxINNERxHEADSxKVHEADSxVOCAB")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--budget", type=int, default=6000)
    parser.add_argument("--chunk", type=int, default=3072)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=100, help="begin nothing after that")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--only", nargs="+", choices=cases(), metavar="CASE", help='e.g. full locret "locret + int4"')
    parser.add_argument("--write", action="store_true", help="write the table from what was measured before")
    args = parser.parse_args()
    if not args.write:
        run(args)
    if args.write or args.output == RESULT:
        fill(PAGE, "speed", table(json.loads(args.output.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
