"""Decode speed of many requests at once: one captured step for all slots, attention row by row, and each by itself.

    python benchmarks/serving.py        on a GPU, about a minute; results/serving.json
    python benchmarks/serving.py --shape 2x64x96x4x2x264 --prompt 300 --budget 64 --new 12 --output x.json    anywhere

A model of the named shape with random weights and heads; prompts of random tokens. Counted are the rounds in which
nobody reads and as many answer as ever do (long prompts leave one slot free): their seconds, and the tokens that they
gave out. Evictions are in them, the capture of the graph is not. Modes:

    graph   scheduler(exact=False)
    rows    scheduler(exact=False, graph=False)
    exact   scheduler()
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, provenance

from locret.bench import random_llm
from locret.config import CacheConfig
from locret.engine import LLM
from locret.files import write_text
from locret.scheduler import Scheduler, Status

MODES: dict[str, dict[str, Any]] = {"graph": dict(exact=False), "rows": dict(exact=False, graph=False), "exact": {}}


def prompts(args: argparse.Namespace, vocab: int) -> list[list[int]]:
    """The same ones in every mode."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, vocab, (args.requests, args.prompt), generator=generator).tolist()


def rounds(scheduler: Scheduler) -> list[tuple[int, float]]:
    """How many answered, and seconds, of every round in which nobody read and nobody came."""
    found: list[tuple[int, float]] = []
    going = True
    while going:
        before = {r: len(r.tokens) for r in scheduler.requests if r.status is Status.DECODE}
        idle = len(before) == len(scheduler.requests)
        started = time.perf_counter()
        going = scheduler.step()
        took = time.perf_counter() - started
        if idle and before.keys() >= set(scheduler.requests) and all(len(r.tokens) == n + 1 for r, n in before.items()):
            found.append((len(before), took))
    return found


def measure(llm: LLM, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """All requests through one scheduler."""
    scheduler = llm.scheduler(slots=args.slots, chunk_seconds=3600.0, **MODES[mode])  # whoever reads, reads to the end
    vocab = llm.backbone.model.config.vocab_size
    requests = [scheduler.submit(ids, max_new_tokens=args.new) for ids in prompts(args, vocab)]
    started = time.perf_counter()
    found = rounds(scheduler)
    in_all = time.perf_counter() - started
    failed = [str(r.error) for r in requests if r.error is not None]
    assert not failed, failed
    answering = max(n for n, _ in found)
    seconds = [took for n, took in found if n == answering][1:]  # the first one may capture the graph
    cuts = statistics.quantiles(seconds, n=10)
    return {
        "answering": answering, "rounds": len(seconds), "round_seconds": statistics.median(seconds),
        "round_seconds_p10": cuts[0], "round_seconds_p90": cuts[-1], "round_seconds_most": max(seconds),
        "decode_tokens_per_second": answering * len(seconds) / sum(seconds), "seconds_in_all": in_all,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=20_000, help="tokens of each")
    parser.add_argument("--budget", type=int, default=6000)
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=["graph", "rows"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving.json")
    args = parser.parse_args()
    started = time.perf_counter()
    llm = random_llm(args.shape, device=args.device, dtype=args.dtype, method="locret",
                     config=CacheConfig(budget=args.budget))  # fmt: skip
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "modes")}
    result: dict[str, Any] = {"provenance": provenance(), "settings": settings, "modes": {}}
    for mode in args.modes:
        print(f"{time.perf_counter() - started:6.1f} s  {mode} ...", flush=True)
        cell = result["modes"][mode] = measure(llm, mode, args)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # a scheduler goes by what is free
        print(f"{time.perf_counter() - started:6.1f} s  {mode}: {cell['decode_tokens_per_second']:,.0f} tokens/s, "
              f"{1000 * cell['round_seconds']:.2f} ms a round of {cell['answering']}", flush=True)  # fmt: skip
        write_text(args.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
