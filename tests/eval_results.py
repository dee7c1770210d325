"""Results files with numbers of every kind, as `locret eval` writes them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from conftest import build_byte_tokenizer, build_tiny_model
from eval_samples import fake_score, grid

from locret.backbone import Backbone
from locret.evaluate.run import Expected
from locret.evaluate.source import ListSource, TaskFacts
from locret.evaluate.store import key_of
from locret.evaluate.summary import finish

TASKS = {
    "niah_single_1": TaskFacts("one number in prose", "ruler", "string_match_all"),
    "niah_multikey_2": TaskFacts("a number among nothing but numbers", "ruler", "string_match_all", dense=True),
    "vt": TaskFacts("variables & chains <of> them", "ruler", "string_match_all"),
}
METHODS = {"locret": 0.93, "snapkv:window=64": 0.4, "recency": 0.2, "random": 0.1}


def write_results(folder: Path, *, samples: int = 20, lengths: tuple[int, ...] = (4096, 16384), seed: int = 0) -> Path:
    """A complete run's folder, with invented scores."""
    rng = random.Random(seed)
    budgets = ["10%", "5%", "2.5%"]
    lines = []
    for task in TASKS:
        for length in lengths:
            for method, budget in [("full", None), *((m, b) for m in METHODS for b in budgets)]:
                lines += [_line(rng, task, length, i, method, budget) for i in range(samples)]
    backbone = Backbone(build_tiny_model("llama"), build_byte_tokenizer())
    given = grid(tasks=list(TASKS), methods=["full", *METHODS], budgets=budgets, lengths=list(lengths), samples=samples)
    found = Expected([key_of(line) for line in lines], {key_of(line): line for line in lines})
    source = ListSource({task: [] for task in TASKS}, fake_score, TASKS)
    finish(folder, given, backbone, source, found, command="locret eval grid.toml --output <runs>")
    return folder


def _line(rng: random.Random, task: str, length: int, index: int, method: str, budget: str | None) -> dict[str, Any]:
    share = 1.0 if budget is None else float(budget[:-1]) / 100
    good = 0.97 if budget is None else METHODS[method] * (0.6 + 4 * share) * (0.5 if TASKS[task].dense else 1)
    score = 100.0 * (rng.random() < good) if task != "vt" else round(100 * min(1, good) * rng.random(), 2)
    kl = 0.0 if budget is None else round((1 - good) * 3, 4)
    turn = {"prediction": "x", "score": score, "tokens": 5, "nll": 0.1 + kl, "delta": kl, "kl": kl,
            "agreement": 1.0 if budget is None else round(good, 3)}  # fmt: skip
    full = 192 * length
    line = {"task": task, "length": length, "seed": 0, "index": index, "method": method, "budget": budget,
            "sample": f"{index:x}", "score": score, "turns": [turn], "prompt_tokens": length,
            "units": int(share * length), "kv_bytes": int(full * share * 1.05),
            "peak_kv_bytes": int(full * share * 1.3),
            "kv_bytes_full": full, "gold": 10, "kept": [[rng.randint(0, int(10 * min(1, good))) for _ in range(3)]
                                                         for _ in range(8)],
            "seconds": {"ttft": 0.7 * length / 4096, "tpot": 0.011}}  # fmt: skip
    if task.startswith("niah"):
        line["depth"] = (index + 0.5) / 20 % 1
    if TASKS[task].dense and budget is not None:
        line["ceiling"] = 100 * share
    return json.loads(json.dumps(line))
