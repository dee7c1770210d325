"""Exact match of a model on generated tasks: full cache against every budget and method, the same samples for all.

    python benchmarks/quality.py --text CORPUS_FOLDER --output benchmarks/results/quality.json
    python benchmarks/quality.py --text CORPUS_FOLDER --suites budget --samples 40 --methods locret recency

Documents are held-out natural text from the folder with facts planted in it, or nothing but distractor facts (dense
tasks). The result file is rewritten after every cell, so a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import provenance

from locret.backbone import EMBEDDED, Backbone
from locret.config import CacheConfig
from locret.engine import LLM
from locret.files import write_text
from locret.tasks.build import TASKS, build, score
from locret.tasks.filler import CorpusFiller

SPARSE = ("number", "word", "fact", "passkey", "chain")
DENSE = ("multikey2", "multikey3", "kv")
METHODS = ("full", "locret", "recency", "random", "knorm", "snapkv")
SEED = 900_000  # far from every training seed


@dataclass(frozen=True)
class Cell:
    """One number of the table."""

    suite: str
    task: str
    length: int
    method: str = "full"
    budget: str = "100%"
    wording: str = "train"
    shape: str = "one_turn"
    positions: str = "compact"

    @property
    def key(self) -> str:
        return "/".join(str(value) for value in dataclasses.astuple(self))


def cells(suites: list[str], methods: list[str]) -> list[Cell]:
    """Every cell of the chosen suites, cheap ones first."""
    made: list[Cell] = []
    if "full" in suites:
        made += [Cell("full", task, length) for length in (4096, 16384, 32768) for task in SPARSE]
        made += [Cell("full", task, length) for length in (4096, 16384) for task in DENSE]
    if "wording" in suites:
        made += [Cell("wording", task, 4096, wording="heldout") for task in ("number", "word", "fact", "passkey")]
    if "shapes" in suites:
        made += [
            Cell("shapes", task, 4096, shape=shape)
            for shape in ("one_turn", "two_turns", "conversation")
            for task in ("number", "word", "fact", "chain")  # a document has one pass key: no third question
        ]
    if "budget" in suites:
        made += [Cell("budget", task, 16384, "full", "100%") for task in SPARSE if "full" in methods]
        small = [method for method in methods if method != "full"]
        made += [Cell("budget", task, 16384, m, budget) for budget in ("5%", "2.5%") for m in small for task in SPARSE]
    if "dense" in suites:
        made += [Cell("dense", task, 16384, m, "5%") for m in methods if m != "full" for task in DENSE]
    if "long" in suites:
        made += [Cell("long", task, 131_072, m, "1.25%") for m in methods if m != "full" for task in SPARSE]
        ours = ("number", "fact") if "locret" in methods else ()
        made += [Cell("long", task, 131_072, "locret", "1.25%", positions="original") for task in ours]
    return made


class Samples:
    """Prompts by (task, length, wording, shape), made by worker processes and shared by all methods."""

    def __init__(self, text: Path, cache: Path, model: Path, workers: int) -> None:
        self._pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(text, cache, model))
        self._made: dict[tuple[Any, ...], list[tuple[list[int], str]]] = {}

    def get(self, cell: Cell, count: int) -> list[tuple[list[int], str]]:
        """(prompt ids, answer) of the first `count` seeds."""
        key = (cell.task, cell.length, cell.wording, cell.shape)
        have = self._made.setdefault(key, [])
        jobs = [(*key, SEED + i) for i in range(len(have), count)]
        have.extend(self._pool.map(_make, jobs, chunksize=4))
        return have[:count]


def _start_worker(text: Path, cache: Path, model: Path) -> None:
    global _filler, _tokenizer
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    _filler = CorpusFiller.from_folder(text, _tokenizer, split="heldout", cache=cache)


def _make(job: tuple[str, int, str, str, int]) -> tuple[list[int], str]:
    task, length, wording, shape, seed = job
    third = shape == "conversation"  # the third question of a conversation
    question = 2 if third else 0

    def made(document: int) -> tuple[list[int], str]:
        sample = build(
            task, seed=seed, length=document, tokenizer=_tokenizer, filler=_filler, wording=wording, values="any",
            num_questions=3 if third else 1,
        )  # fmt: skip
        return list(sample.prompt_ids(_tokenizer, question, shape)), sample.questions[question].answer

    ids, answer = made(length)
    if len(ids) != length:  # `build` fits the shape one_turn; prompts of one length run as one batch
        ids, answer = made(2 * length - len(ids))
    assert len(ids) == length, f"{task}, {shape}: {len(ids)} tokens instead of {length}"
    return ids, answer


def run_cell(
    cell: Cell, backbone: Backbone, heads: Path, prompts: list[tuple[list[int], str]], batch: int
) -> dict[str, Any]:
    """Generate and score; bytes are per sequence."""
    config = CacheConfig(budget=cell.budget, positions=cell.positions)
    llm = LLM.build(backbone, heads=heads, method=cell.method, config=config)
    started, right, outputs = time.perf_counter(), [], []
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        outputs = llm.generate([ids for ids, _ in part], max_new_tokens=TASKS[cell.task].max_new_tokens)
        right += [score(answer, out.text, cell.task) for (_, answer), out in zip(part, outputs, strict=True)]
    stats = outputs[0].stats
    return {
        **dataclasses.asdict(cell), "n": len(right), "score": sum(right) / len(right),
        "interval_95": wilson(sum(right), len(right)), "budget_units": stats.budget, "kv_bytes": stats.kv_bytes,
        "peak_kv_bytes": stats.peak_kv_bytes, "kv_bytes_full": stats.kv_bytes_full,
        "seconds": round(time.perf_counter() - started, 2),
    }  # fmt: skip


def wilson(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson score)."""
    p, w = right / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + w / (4 * n))
    return tuple(round(max(0.0, min(1.0, (p + w / 2 + sign * half) / (1 + w))), 4) for sign in (-1, 1))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--text", type=Path, required=True, help="folder with natural text (.jsonl, .jsonl.xz, .txt)")
    parser.add_argument("--cache", type=Path, default=Path("runs/tokens"), help="where tokenised text is kept")
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--heads", type=Path, help="default: the folder heads of the model")
    parser.add_argument("--suites", nargs="+", default=["full", "wording", "shapes", "budget", "dense", "long"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--tasks", nargs="+", default=[*SPARSE, *DENSE])
    parser.add_argument("--budgets", nargs="+", default=["100%", "5%", "2.5%", "1.25%"])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument(
        "--baseline-samples", type=int, default=40, help="samples for methods other than locret and full"
    )
    parser.add_argument("--long-samples", type=int, default=40)
    parser.add_argument("--batch-tokens", type=int, default=2_000_000)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    done: dict[str, Any] = {}
    if args.output.exists():
        done = {row["key"]: row for row in json.loads(args.output.read_text())["cells"]}
    samples = Samples(args.text, args.cache, args.model, args.workers)
    backbone = Backbone.load(args.model)
    for cell in cells(args.suites, args.methods):
        if cell.key in done or cell.task not in args.tasks or cell.budget not in args.budgets:
            continue
        n = args.samples if cell.method in ("full", "locret") else args.baseline_samples
        n = min(n, args.long_samples) if cell.suite == "long" else n
        prompts = samples.get(cell, n)
        row = run_cell(
            cell, backbone, args.heads or args.model / "heads", prompts, max(1, args.batch_tokens // cell.length)
        )
        done[cell.key] = {"key": cell.key, **row}
        print(f"{cell.key:60} {row['score']:.3f} {row['interval_95']} {row['seconds']:6.1f} s", flush=True)
        write_text(args.output, json.dumps({"provenance": provenance(), "cells": list(done.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
