"""Train the embedded model from scratch on one GPU: a Llama of 16 M parameters, in about 14 minutes.

    python recipes/embedded/pretrain.py train --text FOLDER --work RUN     # recipe.toml beside this file
    python recipes/embedded/pretrain.py train --text FOLDER --work RUN --resume
    torchrun --nproc-per-node 2 recipes/embedded/pretrain.py train ...     # the same batches, shared by two GPUs
    python recipes/embedded/pretrain.py evaluate --text FOLDER --work RUN
    python recipes/embedded/pretrain.py export --work RUN --pack PACKED   # the checkpoint of a run that did not end
    python recipes/embedded/pretrain.py pack RUN/model PACKED        # parts of 15 MiB, with a checksum
    python recipes/embedded/pretrain.py unpack PACKED src/locret/models/embedded

A step: the next batch from the workers (feed.py), forward and backward (lean.py), Muon and AdamW (muon.py). The
schedule is by the clock: a stage lasts its planned seconds, and the learning rate follows the share of all planned
seconds that is over. The clock stands still while validating and saving, so a resumed run continues where it was.
With `--fit SECONDS` it runs faster or slower than real time, so that the schedule ends when the time given does.
In the work folder: checkpoint.pt (replaced atomically), metrics.jsonl, model/ (the exported model).
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from export import export, exported, pack, unpack
from feed import Feed, Shape
from lean import LeanLlama
from log import BORN, Log
from muon import Optimisers
from recipe import Recipe, load_recipe
from source import Source
from team import Team
from torch import Tensor
from validate import Evaluation, Validator

from locret.errors import DataError, NumericsError
from locret.files import atomic_write

HERE = Path(__file__).resolve().parent
TEXT_WEIGHT = 1.0  # of natural text and the words of statements; tokens that weigh more are answers
STAGE_RESERVE, END_RESERVE = 8.0, 8.0  # seconds that --fit keeps for validating and saving in a stage, and for packing


class Staging:
    """Page-locked buffers between shared memory and the GPU; at most `depth` batches are in flight."""

    def __init__(self, device: torch.device, depth: int = 4):
        self.device, self.depth, self.turn = device, depth, 0
        self.buffers: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self.events: dict[int, torch.cuda.Event] = {}

    def to_device(self, ids: np.ndarray, weights: np.ndarray) -> tuple[Tensor, Tensor]:
        if self.device.type != "cuda":
            return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(weights.copy())
        turn = self.turn = (self.turn + 1) % self.depth
        if turn in self.events:
            self.events[turn].synchronize()
        key = (turn, *ids.shape)
        if key not in self.buffers:
            self.buffers[key] = (
                torch.empty(ids.shape, dtype=torch.int32, pin_memory=True),
                torch.empty(ids.shape, dtype=torch.float32, pin_memory=True),
            )
        host_ids, host_weights = self.buffers[key]
        host_ids.numpy()[...] = ids
        host_weights.numpy()[...] = weights
        on_device = host_ids.to(self.device, non_blocking=True), host_weights.to(self.device, non_blocking=True)
        self.events[turn] = torch.cuda.Event()
        self.events[turn].record()
        return on_device[0].long(), on_device[1]


class Trainer:
    """The state of a run and one step of it."""

    def __init__(self, recipe: Recipe, device: torch.device, team: Team | None = None):
        self.recipe, self.device, self.team = recipe, device, team or Team()
        on_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        self.model = LeanLlama(recipe.model, dtype=self.dtype, attention=recipe.run.attention if on_gpu else "math")
        self.model.initialise(recipe.run.seed)
        self.model.to(device)
        o = recipe.optimiser
        self.optimisers = Optimisers(
            self.model,
            muon_lr=o.muon_lr,
            adamw_lr=o.adamw_lr,
            momentum=o.momentum,
            muon_weight_decay=o.muon_weight_decay,
            betas=o.betas,
            clip=o.clip,
            muon_dtype=self.dtype,
        )
        if recipe.run.compile != "off":
            self.model.compile(None if recipe.run.compile == "default" else recipe.run.compile)
            self.optimisers.muon.compile()
        self.position = {"stage": 0, "stage_step": 0, "stage_seconds": 0.0, "step": 0, "tokens": 0}
        self.pace = 1.0  # seconds of the schedule in one second of training
        self.rope: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def rope_tables(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        if (rows, length) not in self.rope:
            self.rope = {(rows, length): self.model.rope_tables(rows, length)}  # one stage's at a time
        return self.rope[rows, length]

    def accumulate(self, ids: Tensor, weights: Tensor, answer_scale: float = 1.0, text_scale: float = 1.0) -> Tensor:
        """Gradients of the batch's weighted mean loss; returns its sums, on the device (see `Meter`)."""
        targets = ids.roll(-1, dims=1)
        weights = weights.roll(-1, dims=1)
        weights[:, -1] = 0.0  # the last token of a sequence predicts nothing
        is_answer, is_text = weights > TEXT_WEIGHT, weights == TEXT_WEIGHT
        weights = torch.where(is_answer, weights * answer_scale, torch.where(is_text, weights * text_scale, weights))
        total = weights.sum()
        self.team.sum_([total])
        total = total.clamp_min(1e-6)
        rows = max(1, self.recipe.run.micro_tokens // ids.shape[1])
        sums = torch.zeros(5, device=self.device)
        for first in range(0, ids.shape[0], rows):
            part = slice(first, first + rows)
            rope = self.rope_tables(*ids[part].shape)
            losses = self.model.token_losses(ids[part], targets[part], rope)
            weight = weights[part].flatten()
            ((losses * weight).sum() / total).backward()
            with torch.no_grad():
                answers, text = (kind[part].flatten().float() for kind in (is_answer, is_text))
                losses = losses.detach()
                sums += torch.stack(
                    [
                        (losses * weight).sum(),
                        (losses * text).sum(),
                        text.sum(),
                        (losses * answers).sum(),
                        answers.sum(),
                    ]
                )
        self.team.sum_([*(p.grad for p in self.model.parameters() if p.grad is not None), sums])
        return torch.cat([sums[:1] / total, sums[1:]])

    def step(self, ids: Tensor, weights: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
        """One update; returns the batch's sums and the gradient norm, both still on the device."""
        stage = self.recipe.stages[self.position["stage"]]
        sums = self.accumulate(ids, weights, stage.answer_scale, stage.text_scale)
        norm = self.optimisers.step(self.recipe.optimiser.scale(fraction, self.position["step"]))
        self.position["step"] += 1
        self.position["stage_step"] += 1
        self.position["tokens"] += ids.numel() * self.team.size
        return sums, norm

    def warm(self, stages: range) -> None:
        """Compile and plan every shape of the given stages; leaves weights and optimisers as they are."""
        for index in stages:
            stage = self.recipe.stages[index]
            rows = max(1, self.recipe.run.micro_tokens // stage.length)
            ids = torch.randint(6, self.recipe.model.vocab_size, (rows, stage.length), device=self.device)
            self.accumulate(ids, torch.ones(ids.shape, device=self.device))
            for parameter in self.model.parameters():
                parameter.grad = None
        for shape, buffer in self.optimisers.muon.buffers.items():
            self.optimisers.muon.orthogonalise(torch.randn(len(buffer), *shape, device=self.device, dtype=self.dtype))
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def fit(self, seconds: float) -> None:
        """Set the pace so that what is left of the schedule takes `seconds`, validation and saving included."""
        stages, position = self.recipe.stages, self.position
        left = sum(stage.seconds for stage in stages[position["stage"] :]) - position["stage_seconds"]
        reserve = STAGE_RESERVE * (len(stages) - position["stage"]) + END_RESERVE
        self.pace = max(left, 0.0) / max(seconds - reserve, 1.0)

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimisers": self.optimisers.state_dict(),
            "position": self.position,
            "recipe": asdict(self.recipe),
        }
        atomic_write(path, lambda temporary: torch.save(state, temporary))

    def start_from(self, folder: Path) -> None:
        """Begin with the weights of an exported model instead of random ones."""
        self.model.load_state_dict(exported(folder))

    def load(self, path: Path) -> None:
        state = load_state(path, self.device)
        self.model.load_state_dict(state["model"])
        self.optimisers.load_state_dict(state["optimisers"])
        self.position = state["position"]


def load_state(path: Path, device: torch.device) -> dict:
    """What `Trainer.save` wrote."""
    if not path.is_file():
        raise DataError(f"no checkpoint at {path}; start without --resume")
    return torch.load(path, map_location=device, weights_only=True)


def finish(model: LeanLlama, work: Path, packed: Path | None) -> None:
    """Write the model as transformers loads it, and its parts to carry."""
    export(model, work / "model")
    if packed:
        pack(work / "model", packed)


class Meter:
    """Sums between two progress lines, on the device until they are printed: one sync per line."""

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.sums, self.norm = torch.zeros(5, device=self.device), torch.zeros((), device=self.device)
        self.steps, self.tokens, self.began = 0, 0, time.perf_counter()

    def add(self, sums: Tensor, norm: Tensor, tokens: int) -> None:
        self.sums += sums
        self.norm += norm
        self.steps += 1
        self.tokens += tokens

    def read(self) -> dict[str, float]:
        """Mean losses (all weighted, natural text, answers), gradient norm, tokens a second; waits for the device."""
        loss, text, num_text, answer, num_answers = self.sums.tolist()
        steps = max(self.steps, 1)
        return {
            "loss": loss / steps,
            "text_loss": text / max(num_text, 1),
            "answer_loss": answer / max(num_answers, 1),
            "grad_norm": self.norm.item() / steps,
            "tokens_per_second": self.tokens / (time.perf_counter() - self.began),
        }


def check_finite(values: dict[str, float], trainer: Trainer, checkpoint: Path) -> None:
    """Stop before a broken state is saved over a good one."""
    if not all(math.isfinite(values[name]) for name in ("loss", "grad_norm")):
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint.is_file() else "no checkpoint was written yet"
        raise NumericsError(
            f"loss {values['loss']}, gradient norm {values['grad_norm']} at step {trainer.position['step']}; {kept}; "
            "resume from it with a lower learning rate (--set optimiser.muon_lr=1e-3)"
        )


class Stop:
    """Set by Ctrl-C and SIGTERM: the run saves and ends after the current step."""

    def __init__(self) -> None:
        self.reason = ""

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: setattr(self, "reason", signal.Signals(number).name))


def train(
    recipe: Recipe,
    source: Source,
    work: Path,
    *,
    device: torch.device,
    resume: bool = False,
    init: Path | None = None,
    stop_after: float = math.inf,
    fit: float | None = None,
    stop: Stop | None = None,
    evaluate: bool = False,
) -> Trainer:
    """Run the recipe from the start or from work/checkpoint.pt; returns the trainer where the run ended.

    Args:    stop_after: seconds since the program started after which to save and return;
             fit: seconds since the program started in which the whole schedule is to end (stages in seconds);
             stop: set by signals;  evaluate: end with the full table, if the run came to its end.
    Raises:  NumericsError: the loss is NaN or infinite (the checkpoint is from before).
    """
    stop, team = stop or Stop(), Team.from_environment()
    log, checkpoint = Log(work / "metrics.jsonl", team.leads), work / "checkpoint.pt"
    recipe.check_team(team.size)
    shapes = [Shape(stage.rows // team.size, stage.length) for stage in recipe.stages]
    feed = make_feed(recipe, source, shapes, team.rank)
    try:  # workers are forked: CUDA and threads only from here on
        team.connect(device)
        began = time.perf_counter()
        trainer = Trainer(recipe, device, team)
        if resume:
            trainer.load(checkpoint)
        if init is not None:
            trainer.start_from(init)
        position = trainer.position
        first = position["stage"]
        if first < len(recipe.stages):
            feed.start(first, position["stage_step"])
        validator = Validator(recipe, source, feed, log) if team.leads else None
        if validator:
            validator.order(first)
        evaluation = Evaluation(recipe, source, feed, log) if evaluate and team.leads else None
        trainer.warm(range(first, len(recipe.stages)))
        log.say(f"compiled and warmed in {time.perf_counter() - began:.1f}s; {team.size} x {device_name(device)}")
        if fit is not None:
            trainer.fit(fit - (time.perf_counter() - BORN))
            log.say(f"{trainer.pace:.2f} seconds of the schedule a second, to end after {fit:.0f} s")
        log.record("start", recipe=asdict(recipe), warm_seconds=time.perf_counter() - began, position=dict(position))
        for index in range(first, len(recipe.stages)):
            run_stage(trainer, feed, validator, evaluation, log, index, checkpoint, stop, stop_after)
            if stop.reason:
                break
            position.update(stage=index + 1, stage_step=0, stage_seconds=0.0)
            if team.leads:
                trainer.save(checkpoint)
        if team.leads:
            trainer.save(checkpoint)
        if stop.reason:
            log.say(f"stopped ({stop.reason}) at step {position['step']}; go on with --resume")
        elif evaluation:
            evaluation.run(trainer.model, device)
    except BaseException:
        feed.close()
        team.abandon()
        raise
    feed.close()
    team.close()
    return trainer


def make_feed(recipe: Recipe, source: Source, shapes: list[Shape], rank: int = 0) -> Feed:
    run = recipe.run
    return Feed(
        source.make_example, source.sample, shapes, seed=run.seed, num_workers=run.workers, num_slots=run.slots,
        rank=rank,
    )  # fmt: skip


def run_stage(
    trainer: Trainer,
    feed: Feed,
    validator: Validator | None,
    evaluation: Evaluation | None,
    log: Log,
    index: int,
    checkpoint: Path,
    stop: Stop,
    stop_after: float,
) -> None:
    """Train until the stage's time (or steps) is over or a stop is asked for, by the first process's clock."""
    recipe, position, team = trainer.recipe, trainer.position, trainer.team
    stage, run, last = recipe.stages[index], recipe.run, index + 1 == len(recipe.stages)
    staging, meter = Staging(trainer.device), Meter(trainer.device)
    feed.start(index, position["stage_step"])
    if not last and validator:
        validator.order(index + 1)
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    batch: list[tuple[Tensor, Tensor]] = []
    done = position["stage_step"] if stage.steps else position["stage_seconds"]
    saved = validated = logged = now = time.perf_counter()
    feed.wait_seconds = 0.0
    while True:
        done, stopped = team.agree(done, bool(stop.reason))
        if stopped and not stop.reason:
            stop.reason = "the first process"
        if done >= stage.planned or stopped:
            break
        batch.clear()
        feed.next(index, position["stage_step"], lambda i, w: batch.append(staging.to_device(i, w)))
        sums, norm = trainer.step(*batch[0], recipe.fraction(index, done))
        meter.add(sums, norm, batch[0][0].numel() * team.size)
        before, now = now, time.perf_counter()
        position["stage_seconds"] += (now - before) * trainer.pace
        done = position["stage_step"] if stage.steps else position["stage_seconds"]
        if not last and done + 4.0 > stage.planned:
            feed.start(index + 1)
        if last and evaluation:
            evaluation.order(8)
        if not team.leads:
            continue
        if now - BORN > stop_after:
            stop.reason = f"--stop-after {stop_after:g}"
        over = done >= stage.planned or bool(stop.reason)
        if now - logged >= run.log_seconds or over:
            values = meter.read()
            values["wait"] = feed.wait_seconds / (time.perf_counter() - meter.began)
            check_finite(values, trainer, checkpoint)
            report(log, trainer, index, done, values)
            meter.reset()
            feed.wait_seconds, logged = 0.0, time.perf_counter()
        pause = time.perf_counter()
        position["stage_seconds"] += (pause - now) * trainer.pace  # the sync of the progress line is training time
        if now - validated >= recipe.validation.every_seconds or over:
            assert validator is not None, "the leader has one"
            validator.run(index, trainer.model, position["tokens"])
            validated = time.perf_counter()
        if now - saved >= run.checkpoint_seconds and not over:
            values = meter.read()
            check_finite(values, trainer, checkpoint)
            trainer.save(checkpoint)
            saved = time.perf_counter()
        now = time.perf_counter()
        meter.began += now - pause  # neither is validating and saving


def report(log: Log, trainer: Trainer, index: int, done: float, values: dict[str, float]) -> None:
    """One progress line and its record."""
    recipe, position = trainer.recipe, trainer.position
    stage = recipe.stages[index]
    fraction = recipe.fraction(index, done)
    scale = recipe.optimiser.scale(fraction, position["step"])
    memory = torch.cuda.max_memory_allocated() / 2**30 if trainer.device.type == "cuda" else 0.0
    unit = "steps" if stage.steps else "s"
    log.say(
        f"{stage.length:>5} {done:.0f}/{stage.planned:.0f}{unit} {fraction:5.1%} step {position['step']} "
        f"loss {values['loss']:.3f} text {values['text_loss']:.3f} answers {values['answer_loss']:.3f} "
        f"norm {values['grad_norm']:.2f} lr x{scale:.2f} {values['tokens_per_second'] / 1e6:.3f}M tok/s "
        f"wait {values['wait']:.1%} mem {memory:.1f}G"
    )
    log.record("train", length=stage.length, fraction=fraction, **position, scale=scale, memory_gib=memory, **values)


# The command line


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def compile_cache(path: Path | None, write: bool) -> None:
    """Carry torch.compile's artefacts from one machine to the next of the same GPU: saves about a minute."""
    if path is None:
        return
    if write:
        artefacts = torch.compiler.save_cache_artifacts()
        if artefacts is not None:
            atomic_write(path, lambda temporary: temporary.write_bytes(artefacts[0]))
    elif path.is_file():
        torch.compiler.load_cache_artifacts(path.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("train", "evaluate"):
        sub = verbs.add_parser(verb)
        sub.add_argument("--recipe", type=Path, default=HERE / "recipe.toml")
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. stages.0.seconds=15")
        sub.add_argument("--text", type=Path, required=True, help="folder with the corpus")
        sub.add_argument("--tokenizer", type=Path, default=HERE.parents[1] / "src/locret/models/embedded")
        sub.add_argument("--work", type=Path, required=True)
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        sub.add_argument("--read-compile-cache", type=Path)
    sub = verbs.choices["train"]
    sub.add_argument("--resume", action="store_true")
    sub.add_argument("--init", type=Path, help="folder of an exported model to go on from, with new optimisers")
    sub.add_argument("--stop-after", type=float, default=math.inf, help="seconds since start; saves, to --resume")
    sub.add_argument("--fit", type=float, help="seconds since start in which the schedule is to end, packing included")
    sub.add_argument("--evaluate", action="store_true", help="the full table once the run is over")
    sub.add_argument("--pack", type=Path, help="pack the exported model into this folder")
    sub.add_argument("--write-compile-cache", type=Path)
    sub = verbs.add_parser("export")
    sub.add_argument("--recipe", type=Path, default=HERE / "recipe.toml")
    sub.add_argument("--work", type=Path, required=True)
    sub.add_argument("--pack", type=Path)
    for verb in ("pack", "unpack"):
        sub = verbs.add_parser(verb)
        sub.add_argument("source", type=Path)
        sub.add_argument("target", type=Path)
    args = parser.parse_args()
    if args.verb in ("pack", "unpack"):
        (pack if args.verb == "pack" else unpack)(args.source, args.target)
        return
    if args.verb == "export":
        model = LeanLlama(load_recipe(args.recipe).model)
        model.load_state_dict(load_state(args.work / "checkpoint.pt", torch.device("cpu"))["model"])
        finish(model, args.work, args.pack)
        return

    recipe = load_recipe(args.recipe, args.set)
    team = Team.from_environment()
    log = Log(args.work / "metrics.jsonl", team.leads)
    source = Source.load(args.text, args.tokenizer, args.work / "tokens", [stage.mixture for stage in recipe.stages])
    log.say(f"corpus: {source.num_tokens / 1e6:.1f} M tokens")
    device = team.device(args.device)
    if args.verb == "evaluate":
        feed = make_feed(recipe, source, [])
        try:
            trainer = Trainer(recipe, device)
            trainer.load(args.work / "checkpoint.pt")
            Evaluation(recipe, source, feed, log).run(trainer.model, device)
        finally:
            feed.close()
        return
    compile_cache(args.read_compile_cache, write=False)
    stop = Stop()
    stop.listen()
    trainer = train(
        recipe,
        source,
        args.work,
        device=device,
        resume=args.resume,
        init=args.init,
        stop_after=args.stop_after,
        fit=args.fit,
        stop=stop,
        evaluate=args.evaluate,
    )
    if team.leads:
        compile_cache(args.write_compile_cache, write=True)
        finish(trainer.model, args.work, args.pack)
    sys.exit(75 if stop.reason else 0)  # 75: not finished, go on with --resume


if __name__ == "__main__":
    main()
