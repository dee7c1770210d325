"""Train the embedded model's retaining heads, on generated samples that hold two families out.

    python recipes/embedded/heads.py --text FOLDER --output src/locret/models/embedded/heads
    python recipes/embedded/heads.py --text FOLDER --kept FILE --only-samples     # they need no model and no GPU

Questions about `word` and `passkey` facts, and such facts themselves, never occur in the samples
(locret.tasks.build.HELD_OUT_FAMILIES): what the heads keep of them shows whether they learnt what matters or what they
were shown.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from locret.backbone import EMBEDDED, Backbone
from locret.files import atomic_write, write_text
from locret.heads import RetainingHeads
from locret.tasks.filler import CorpusFiller, ProseFiller
from locret.tasks.mixture import head_samples
from locret.train import TrainConfig, progress_bar, train


def make_part(job: tuple[Path, Path, Path, int, int, tuple[int, int], int]) -> list[dict[str, Any]]:
    """One worker's samples: prompt and answer ids."""
    text, cache, model, count, seed, lengths, questions = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = AutoTokenizer.from_pretrained(model)
    fillers = {
        "corpus": CorpusFiller.from_folder(text, tokenizer, split="train", cache=cache),
        "prose": ProseFiller.from_seed(0, tokenizer),
    }
    found = head_samples(
        tokenizer, fillers, count=count, length_range=lengths, seed=seed, max_questions=questions
    )  # fmt: skip
    return [{"prompt_ids": list(s["prompt_ids"]), "answer_ids": list(s["answer_ids"])} for s in found]


def made_samples(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All samples: those of the file `--kept`, or made by all workers and, if it is named, kept in it."""
    if args.kept and args.kept.is_file():
        return torch.load(args.kept)["samples"]
    each = -(-args.samples // args.parts)
    jobs = [
        (args.text, args.cache, args.model, each, 1000 + i, tuple(args.lengths), args.questions)
        for i in range(args.parts)
    ]
    with ProcessPoolExecutor(args.workers) as pool:
        samples = [sample for part in pool.map(make_part, jobs) for sample in part]
    if args.kept:
        args.kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.kept, lambda path: torch.save({"samples": samples}, path))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--text", type=Path, required=True, help="folder with the corpus")
    parser.add_argument("--cache", type=Path, default=Path("runs/tokens"))
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--output", type=Path, default=EMBEDDED / "heads")
    parser.add_argument("--work", type=Path, default=Path("runs/heads"), help="checkpoint and log")
    parser.add_argument("--samples", type=int, default=4200)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--lengths", type=int, nargs=2, default=(1024, 16384))
    parser.add_argument("--questions", type=int, default=16, help="questions about one document, at most")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument(
        "--objective", default="ranking", help="one of locret.train's; see docs/train.md for why this one"
    )
    parser.add_argument("--init", default="", help="heads to go on from")
    parser.add_argument("--parts", type=int, default=14, help="of the samples, each from a seed of its own")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="processes")
    parser.add_argument("--kept", type=Path, help="file of the samples: read if it is there, else written")
    parser.add_argument("--only-samples", action="store_true", help="make the file --kept and end")
    args = parser.parse_args()
    if args.only_samples and not args.kept:
        parser.error("--only-samples keeps them where --kept says; name a file")
    began = time.perf_counter()
    samples = made_samples(args)
    print(f"{len(samples)} samples in {time.perf_counter() - began:.0f} s", flush=True)
    if args.only_samples:
        return
    config = TrainConfig(
        steps=args.steps, lr=args.lr, init=args.init, objective=args.objective, max_length=args.lengths[1],
        eval_every=max(500, args.steps // 4),
        log_every=50, checkpoint_every=1000,
        description="locret.tasks.mixture.head_samples without the families word and passkey",
    )  # fmt: skip
    with progress_bar() as report:
        result = train(Backbone.load(args.model), samples, args.work, config, on_progress=report)
    print(result.summary(), flush=True)
    RetainingHeads.from_pretrained(args.work).to(torch.bfloat16).save_pretrained(args.output)
    write_text(args.output / "training.jsonl", (args.work / "log.jsonl").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
