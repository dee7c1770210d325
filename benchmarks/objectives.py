"""What to train heads for: the paper's objective against its alternatives on the embedded model, same steps for all.

    python benchmarks/objectives.py --output benchmarks/results/objectives.json            # one GPU, 4 minutes
    python benchmarks/objectives.py --table benchmarks/results/objectives.json             # into docs/train.md

Every variant is trained with every seed (first weights, order of the samples) by `locret.train.train`, then answers
generated questions from a cache 10, 20, 40 and 80 times smaller than the prompt. Sparse tasks hide four facts in prose;
dense ones are nothing but distractors. The question is unknown when units are dropped, except for `query-aware` heads,
whose prompts begin with it. `passkey` is a family that no heads were trained on.

Jobs run in several processes on one GPU: all trainings, then questions in parts of --part prompts. The JSON is
rewritten after every job; the same command goes on where it was, and --seconds ends it in time with what there is:
the table uses the parts that all variants have.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, fill, provenance
from numpy.typing import NDArray

from locret.backbone import EMBEDDED, Backbone
from locret.config import CacheConfig
from locret.data import Sample, Samples
from locret.engine import LLM
from locret.files import write_text
from locret.heads import RetainingHeads
from locret.tasks.build import TASKS, Plan, compose, fit_prompt, score
from locret.tasks.filler import ProseFiller
from locret.tasks.mixture import head_samples
from locret.train import TrainConfig, train

SPARSE, DENSE = ("number", "fact", "passkey", "chain"), ("multikey2", "kv")
BUDGETS = ("10%", "5%", "2.5%", "1.25%")
FEWER_STABILIZERS = (0, 16)  # instead of a quarter of the budget, at 5 %
SEED = 700_000  # of the questions; far from every training seed
RESAMPLES = 2000


@dataclass(frozen=True)
class Variant:
    """How heads are trained, and whether their prompts begin with the question."""

    options: dict[str, Any]
    question_first: bool = False
    stabilizers: tuple[int, ...] = ()  # further numbers of them to be measured with


VARIANTS: dict[str, Variant] = {
    "paper": Variant({}, stabilizers=FEWER_STABILIZERS),
    "log-mass": Variant({"objective": "log-mass"}),
    "log-value": Variant({"objective": "log-value"}),
    "ranking": Variant({"objective": "ranking"}),
    "top-k": Variant({"objective": "top-k"}),
    "hidden": Variant({"input": "hidden"}),
    "eviction": Variant({"evict_budget": 0.1}, stabilizers=FEWER_STABILIZERS),
    "query-aware": Variant({"query_aware": True}, question_first=True),
}
REFERENCES = ("full", "shipped")  # the full cache; the heads that ship with locret


@dataclass(frozen=True)
class Job:
    """Train the heads of (variant, seed), or ask them the questions of one part."""

    variant: str
    seed: int
    part: int | None  # None: train

    @property
    def key(self) -> str:
        return f"{self.variant}/{self.seed}/{'train' if self.part is None else self.part}"


# ---------------------------------------------------------------------- in the workers


def start_worker(args: argparse.Namespace) -> None:
    """Load the model once; jobs share it."""
    global _args, _backbone
    torch.set_num_threads(1)
    _args, _backbone = args, Backbone.load(args.model, device=args.device)


def run_job(job: Job) -> dict[str, Any]:
    """What goes into the result file under the job's key."""
    began = time.perf_counter()
    found = train_heads(job) if job.part is None else ask(job, job.part)
    return {"seconds": round(time.perf_counter() - began, 2), **found}


def train_heads(job: Job) -> dict[str, Any]:
    """Heads of a variant in a folder of the work folder; finished ones are left as they are."""
    variant = VARIANTS[job.variant]
    config = TrainConfig(
        steps=_args.steps, seed=job.seed, max_length=_args.lengths[1], eval_samples=0, log_every=50,
        checkpoint_every=_args.steps, description="benchmarks/objectives.py", **variant.options,
    )  # fmt: skip
    samples = Samples(training_samples(variant.question_first), None, question_first=variant.question_first)
    result = train(_backbone, samples, heads_folder(job), config)
    return {"loss": result.loss, "training_seconds": round(result.seconds, 2)}


def heads_folder(job: Job) -> Path:
    work: Path = _args.work
    return work / f"{job.variant}-{job.seed}"


@functools.cache
def training_samples(question_first: bool) -> list[Sample]:
    """The same tasks and lengths for all variants; heads that know the question see one of each document, others 16."""
    tokenizer = _backbone.need_tokenizer()
    found = head_samples(
        tokenizer, {"prose": ProseFiller.from_seed(0, tokenizer)}, count=_args.train_samples,
        length_range=tuple(_args.lengths), seed=1, max_questions=1 if question_first else 16,
        shape="question_first" if question_first else None,
    )  # fmt: skip
    return [Sample(list(s["prompt_ids"]), list(s["answer_ids"]), f"sample {i}") for i, s in enumerate(found)]


def ask(job: Job, part: int) -> dict[str, Any]:
    """Right or wrong by "task/budget/stabilizers" for every prompt of the part."""
    heads = None
    if job.variant != "full":
        shipped = job.variant == "shipped"
        heads = RetainingHeads.from_pretrained(_args.heads if shipped else heads_folder(job))
    found = {}
    for task in _args.tasks:
        prompts = questions(task, part, job.variant in VARIANTS and VARIANTS[job.variant].question_first)
        for budget, stabilizers in cells(job.variant):
            config = CacheConfig(budget=budget, num_stabilizers=stabilizers)
            llm = LLM.build(_backbone, heads=heads, method="locret" if heads else "full", config=config)
            outputs = llm.generate([ids for ids, _ in prompts], max_new_tokens=TASKS[task].max_new_tokens)
            right = [int(score(answer, out.text, task)) for (_, answer), out in zip(prompts, outputs, strict=True)]
            found[cell_name(task, budget, stabilizers)] = right
    return {"right": found}


def cells(variant: str) -> Iterator[tuple[str, int | None]]:
    """(budget, stabilizers) that a variant is measured at; None: the default, a quarter of the budget."""
    if variant == "full":
        yield "100%", None
        return
    yield from ((budget, None) for budget in _args.budgets)
    if variant in VARIANTS and "5%" in _args.budgets:
        yield from (("5%", count) for count in VARIANTS[variant].stabilizers)


def cell_name(task: str, budget: str, stabilizers: int | None) -> str:
    return f"{task}/{budget}/{'default' if stabilizers is None else stabilizers}"


@functools.cache
def questions(task: str, part: int, question_first: bool) -> list[tuple[list[int], str]]:
    """(prompt ids, answer) of a part; all prompts have the same length, so they run as one batch."""
    tokenizer = _backbone.need_tokenizer()
    filler = ProseFiller.from_seed(1, tokenizer)
    shape = "question_first" if question_first else "one_turn"
    plan = Plan(task, "train", "any", families=TASKS[task].families)
    made = []
    for seed in range(SEED + part * _args.part, SEED + (part + 1) * _args.part):
        rng = random.Random(f"objectives:{task}:{seed}")
        sample = compose(rng, plan, tokenizer, filler, fit_prompt(tokenizer, _args.length, shape, seed), seed)
        made.append((list(sample.prompt_ids(tokenizer, 0, shape)), sample.questions[0].answer))
    return made


# ---------------------------------------------------------------------- the run


def main() -> None:
    args = parse()
    if args.table:
        write_table(json.loads(args.table.read_text(encoding="utf-8")))
        return
    began = time.perf_counter()
    names = ("variants", "seeds", "tasks", "budgets", "steps", "train_samples", "lengths", "length", "part")
    settings = json.loads(json.dumps({name: getattr(args, name) for name in names}))
    result: dict[str, Any] = {"provenance": provenance(), "settings": settings, "jobs": {}}
    if args.output.exists():
        before = json.loads(args.output.read_text(encoding="utf-8"))
        if before["settings"] != settings:
            raise SystemExit(f"{args.output} has other settings, {before['settings']}; choose another --output")
        result["jobs"] = before["jobs"]

    def finish(job: Job, found: dict[str, Any]) -> None:
        result["jobs"][job.key] = found
        write_text(args.output, json.dumps(result, indent=1) + "\n")
        passed, share = time.perf_counter() - began, mean_right(found)
        print(f"{passed:6.1f} s  {job.key:24} {found['seconds']:6.2f} s  {share}", flush=True)

    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.workers, mp_context=context, initializer=start_worker, initargs=(args,))
    with pool:
        run_all(pool, args, result["jobs"], finish, until=began + args.seconds)
    write_text(args.output, json.dumps(result, indent=1) + "\n")
    print("\n".join(tables(result).values()))


def run_all(
    pool: ProcessPoolExecutor, args: argparse.Namespace, done: dict[str, Any], finish: Any, until: float
) -> None:
    """Trainings first; a part's questions follow as soon as the heads are there, the next part's after them."""
    running: dict[Future[dict[str, Any]], Job] = {}

    def submit(job: Job) -> None:
        while job.key in done and job.part is not None:
            job = Job(job.variant, job.seed, job.part + 1)
        if job.part is None or job.part < args.parts:
            running[pool.submit(run_job, job)] = job

    for seed in range(args.seeds):
        for variant in sorted(args.variants, key=lambda name: name != "eviction"):  # the slowest first
            submit(Job(variant, seed, None))
    for name in REFERENCES:
        submit(Job(name, 0, 0))
    while running:
        ready, _ = wait(running, timeout=max(0.1, until - time.perf_counter()), return_when=FIRST_COMPLETED)
        for future in ready:
            job = running.pop(future)
            try:
                finish(job, future.result())
            except BrokenProcessPool:
                raise
            except Exception as error:  # one variant that fails must not end the others' run
                print(f"{job.key} failed: {type(error).__name__}: {error}", flush=True)
                continue
            if time.perf_counter() < until:
                submit(Job(job.variant, job.seed, 0 if job.part is None else job.part + 1))
        if time.perf_counter() >= until:
            for future in [f for f in running if f.cancel()]:
                del running[future]


def mean_right(found: dict[str, Any]) -> str:
    if "right" not in found:
        return f"loss {found['loss']:.4f}"
    values = [x for right in found["right"].values() for x in right]
    return f"right {sum(values) / len(values):.3f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--heads", type=Path, default=EMBEDDED / "heads", help="the row `shipped`")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--train-samples", type=int, default=400)
    parser.add_argument("--lengths", type=int, nargs=2, default=(1024, 8192), help="of prompts in training")
    parser.add_argument("--tasks", nargs="+", default=[*SPARSE, *DENSE])
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--length", type=int, default=8192, help="of prompts that are asked about")
    parser.add_argument("--part", type=int, default=20, help="prompts of a task in one part")
    parser.add_argument("--parts", type=int, default=5, help="at most")
    parser.add_argument("--seconds", type=float, default=225.0, help="start no job after this long")
    parser.add_argument("--workers", type=int, default=10 if torch.cuda.is_available() else 1)
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"), help="trained heads")
    parser.add_argument("--output", type=Path, default=Path("runs/objectives.json"))
    parser.add_argument(
        "--table", type=Path, default=None, help="run nothing: write this file's tables into docs/train.md"
    )
    return parser.parse_args()


# ---------------------------------------------------------------------- the tables


def write_table(result: dict[str, Any]) -> None:
    for name, text in tables(result).items():
        fill(ROOT / "docs" / "train.md", name, text)


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Markdown by name: objectives (shares of right answers, and differences to the paper's), stabilizers."""
    settings, jobs = result["settings"], result["jobs"]
    wanted = [(name, seed) for name in settings["variants"] for seed in range(settings["seeds"])]
    parts = [
        part for part in range(1000)
        if all(f"{name}/{seed}/{part}" in jobs for name, seed in [*wanted, *((name, 0) for name in REFERENCES)])
    ]  # fmt: skip
    if not parts or "paper" not in settings["variants"]:
        return {"objectives": "(no part of the questions has been answered by all variants)"}

    def right(variant: str, task: str, budget: str, stabilizers: int | None = None) -> NDArray[np.float64]:
        seeds = range(settings["seeds"]) if variant not in REFERENCES else [0]
        name = cell_name(task, budget, stabilizers)
        rows = [[x for part in parts for x in jobs[f"{variant}/{seed}/{part}"]["right"][name]] for seed in seeds]
        return np.asarray(rows, dtype=np.float64)  # [seeds, prompts]

    groups = {"sparse": SPARSE, "dense": DENSE}
    groups = {name: [t for t in tasks if t in settings["tasks"]] for name, tasks in groups.items()}
    groups = {name: tasks for name, tasks in groups.items() if tasks}
    columns = [(group, budget) for group in groups for budget in settings["budgets"]]
    lines = [
        "| heads | " + " | ".join(f"{group} {factor(budget)}" for group, budget in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for variant in [*REFERENCES, *settings["variants"]]:
        texts = []
        for group, budget in columns:
            at = "100%" if variant == "full" else budget
            mine = [right(variant, task, at) for task in groups[group]]
            text = f"{100 * np.mean([x.mean() for x in mine]):.1f}"
            if variant in settings["variants"] and variant != "paper":
                low, high = difference(mine, [right("paper", task, at) for task in groups[group]])
                text += f" ({100 * low:+.0f} to {100 * high:+.0f}{'' if low <= 0 <= high else ', *'})"
            texts.append(text)
        lines.append(f"| {variant} | " + " | ".join(texts) + " |")
    found = {"objectives": "\n".join(lines)}
    swept = [name for name in settings["variants"] if VARIANTS[name].stabilizers]
    if "5%" in settings["budgets"]:
        counts: list[int | None] = [*FEWER_STABILIZERS, None]
        titles = ["a quarter of the budget" if count is None else str(count) for count in counts]
        lines = [f"| heads, sparse tasks at {factor('5%')} | " + " | ".join(titles) + " |", "|---" * 4 + "|"]
        for variant in swept:
            means = [np.mean([right(variant, t, "5%", count).mean() for t in groups["sparse"]]) for count in counts]
            lines.append(f"| {variant} | " + " | ".join(f"{100 * mean:.1f}" for mean in means) + " |")
        found["stabilizers"] = "\n".join(lines)
    return found


def factor(budget: str) -> str:
    return f"{100 / float(budget.rstrip('%')):g}x"


def difference(mine: list[NDArray[np.float64]], theirs: list[NDArray[np.float64]]) -> tuple[float, float]:
    """95 % interval of mean(mine) - mean(theirs) over tasks: seeds and prompts are drawn again, prompts in pairs."""
    rng = np.random.default_rng(0)
    drawn = np.zeros(RESAMPLES)
    our_seeds, their_seeds = (rng.integers(0, x[0].shape[0], (RESAMPLES, x[0].shape[0])) for x in (mine, theirs))
    for a, b in zip(mine, theirs, strict=True):
        prompts = rng.integers(0, a.shape[1], (RESAMPLES, a.shape[1]))
        for sign, x, seeds in ((1, a, our_seeds), (-1, b, their_seeds)):
            means = np.stack([x[s][:, p].mean() for s, p in zip(seeds, prompts, strict=True)])
            drawn += sign * means / len(mine)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
