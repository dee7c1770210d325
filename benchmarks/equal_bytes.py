"""Exact match of the embedded model when the KV cache may take so many bytes, by how its units are stored.

    python benchmarks/equal_bytes.py --output benchmarks/results/equal-bytes.json

bfloat16 on the CPU, the embedded heads, the same samples for every storage. `multikey2` is dense: distractors only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import provenance

from locret.backbone import EMBEDDED, Backbone
from locret.config import STORAGE, CacheConfig
from locret.engine import LLM
from locret.files import write_text
from locret.tasks.build import TASKS, build, score
from locret.tasks.filler import ProseFiller

SEED = 900_000  # far from every training seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["multikey2", "number"])
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--budget", default="1MiB")
    parser.add_argument(
        "--storages", nargs="+", choices=STORAGE, default=["dense", "int8", "int4", "int2", "think-int4"]
    )
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    backbone = Backbone.load(device="cpu", dtype="bfloat16")
    tokenizer = backbone.need_tokenizer()
    filler = ProseFiller.from_seed(1, tokenizer)
    rows = []
    print("| task | storage | units | KV bytes | exact match |\n|---|---|---|---|---|")
    for task in args.tasks:
        samples = [build(task, seed=SEED + i, length=args.length, tokenizer=tokenizer, filler=filler)
                   for i in range(args.samples)]  # fmt: skip
        for storage in args.storages:
            llm = LLM.build(backbone, heads=EMBEDDED / "heads", config=CacheConfig(args.budget, storage=storage))
            right = 0.0
            for sample in samples:
                output = llm.generate(sample.prompt_ids(tokenizer), max_new_tokens=TASKS[task].max_new_tokens)
                right += score(sample.questions[0].answer, output.text, task)
            stats = output.stats
            rows.append(dict(task=task, storage=storage, units=stats.budget, kv_bytes=stats.kv_bytes,
                             peak_kv_bytes=stats.peak_kv_bytes, right=int(right), samples=len(samples)))  # fmt: skip
            print(
                f"| {task} | {storage} | {stats.budget} | {stats.kv_bytes:,} | {int(right)} / {len(samples)} |",
                flush=True,
            )
    if args.output:
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        write_text(args.output, json.dumps({"provenance": provenance(), **settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
