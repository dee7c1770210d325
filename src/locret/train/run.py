"""The training loop. Shapes: B batch (1), P prompt tokens, Hkv KV heads, L layers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from locret.backbone import Backbone, model_length
from locret.data import DataReport, Order, Sample, Samples, check_samples, judge
from locret.errors import ConfigError, DataError, HeadsError, NumericsError
from locret.files import write_text
from locret.heads import CONFIG_FILE, WEIGHTS_FILE, HeadInput, HeadsConfig, RetainingHeads
from locret.parallel import gathers_weights
from locret.train.answers import answered_by
from locret.train.checkpoint import (
    CHECKPOINT_FILE,
    State,
    identity,
    read_checkpoint,
    state_dict,
    write_checkpoint,
)
from locret.train.distributed import Group
from locret.train.evaluation import evaluate
from locret.train.evicted import Learner, cache_config, read_evicting
from locret.train.log import LOG_FILE, Log, NoLog
from locret.train.objectives import layer_loss, make_objective
from locret.train.options import TrainConfig
from locret.train.packs import Pieces, in_packs, length_of, run_pack
from locret.train.passes import TOKEN_CHUNK, LabelPass, score_in_pieces
from locret.train.progress import TrainProgress, TrainResult
from locret.train.recall import check_recall, recall
from locret.train.surroundings import eval_mode, stop_on_signals, tf32

DATA_FILE, BEST_FOLDER = "data.json", "best"
RISE = 5.0  # a sample whose loss is this many times the mean before it is reported
Data = str | Path | Samples | Iterable[str | Path | Sample | Mapping[str, Any]]


def train(
    backbone: Backbone,
    data: Data,
    output: str | Path,
    config: TrainConfig | None = None,
    *,
    on_progress: Callable[[TrainProgress], None] | None = None,
    on_check: Callable[[int, int], object] | None = None,
    resume: bool = True,
) -> TrainResult:
    """Train retaining heads for `backbone` and save them in `output`.

    Written there: config.json and heads.safetensors (the heads), log.jsonl, data.json (what was dropped and why),
    best/ (the heads of the best evaluation, bfloat16), and while the run goes on checkpoint.pt.

    Args:
        data: paths of .jsonl or .json files, "hf:ID", `Sample`s or dictionaries in memory (forms: locret.data.forms).
        on_check: called with (samples checked, samples) before the first step.
        resume: go on from `output`'s checkpoint, if there is one; on the same machine the weights are bit for bit those
            of a run without the interruption. False starts anew.

    Under `torchrun` each process calls this with its own copy of the backbone; the samples of a step are spread over
    them (so `accumulate` must be at least their number), gradients are added up, and all end with the same weights.

    SIGTERM and Ctrl-C end the current step, save a checkpoint and return a result with `stopped` set; a second one
    raises KeyboardInterrupt at once. Raises: DataError (no usable samples), ConfigError (options, another run's
    checkpoint), NumericsError (a loss that is not finite, naming the sample), HeadsError (files that cannot be written
    or read).
    """
    config = config or TrainConfig()
    if isinstance(data, Samples):
        samples = data
        if samples.question_first != config.query_aware:
            raise ConfigError(
                f"query_aware is {config.query_aware}, but these Samples have question_first {samples.question_first}; "
                "make them agree"
            )
    else:
        samples = Samples(data, backbone.tokenizer, question_first=config.query_aware)
    run = Run(backbone, samples, Path(output), config, on_check=on_check)
    with stop_on_signals() as caught, eval_mode(backbone.model), tf32(backbone):
        return run.go(on_progress or (lambda progress: None), caught, resume)


@dataclass
class _Window:
    """This process's samples since the loss was last read from the device."""

    names: list[str] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    start: float = field(default_factory=time.perf_counter)


class Run:
    """One run, from set-up to the saved heads."""

    def __init__(
        self, backbone: Backbone, samples: Samples, output: Path, config: TrainConfig, *,
        on_check: Callable[[int, int], object] | None = None,
    ) -> None:  # fmt: skip
        self.backbone, self.samples, self.output, self.config = backbone, samples, output, config
        self.group = Group.current(backbone.shard.size)
        self._check_processes()
        self.learned = [i for i, spec in enumerate(backbone.layers) if spec.window is None]
        if not self.learned:
            raise ConfigError(
                "every layer of this backbone has a sliding window, so no layer has a budget to train for"
            )
        self._check_cache()
        self.objective = make_objective(config.objective, top_share=config.top_share)
        self.report = self._checked(on_check)
        self.order = Order(
            self.report.lengths, config.seed, self._held_out_count(), group=config.accumulate,
            bucketing=config.bucketing,
        )  # fmt: skip
        if not self.order.size:
            raise DataError(f"no sample is left to train on: {self.report.summary()}, and the rest is held out")
        self.heads = self._new_heads()
        self.weights = [p for i in self.learned for p in self.heads.layers[i].parameters()]
        self.optimizer = torch.optim.AdamW(
            self.weights,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=all(p.is_cuda for p in self.weights),
        )
        self.label_pass = LabelPass(
            backbone, self.learned, label=config.label_kind, wants_hidden=self.heads.wants_hidden,
            max_length=config.max_length, token_chunk=self.token_chunk,
        )  # fmt: skip
        self.state, self.window, self.tokens_per_second = State(), _Window(), 0.0
        self.state.skipped = self.report.num_dropped
        self.log: Log = NoLog()
        self.warning = ""

    @property
    def token_chunk(self) -> int:
        """Tokens that MLPs and heads take at a time."""
        return self.config.token_chunk or TOKEN_CHUNK

    def go(self, report: Callable[[TrainProgress], None], caught: list[str], resume: bool) -> TrainResult:
        """Run to the end or to a signal."""
        self._start(resume)
        if self.state.finished:
            self.heads = RetainingHeads.from_pretrained(self.output)
            return self._result(None)
        held_out = [self._answered(self.samples[i]) for i in self.order.held_out]
        if self.config.recall_budget is not None:
            check_recall(held_out, self.config.recall_budget)
        started = time.perf_counter() - self.state.seconds
        self.window.start = time.perf_counter()
        stopping = self.group.any(bool(caught))
        with contextlib.closing(self.log), contextlib.closing(self._stream()) as stream:
            while self.state.step < self.config.steps and not stopping:
                self.step(stream)
                self.state.seconds = time.perf_counter() - started
                last = self.state.step == self.config.steps
                self.warning = ""
                if self._due(self.config.log_every) or last:
                    self._read_losses()
                if held_out and (self._due(self.config.eval_every) or last):
                    self._evaluate(held_out)
                if self._due(self.config.checkpoint_every) and not last:
                    self._save_checkpoint()
                report(self._progress())
                stopping = self.group.any(bool(caught))
            if self.state.step < self.config.steps:
                return self._stop(next(name for names in self.group.gather(caught) for name in names))
            return self._finish()

    # ------------------------------------------------------------------ set-up

    def _check_processes(self) -> None:
        """Every process needs samples in each step; with shares of the weights, as many passes as the others."""
        accumulate, readers = self.config.accumulate, self.group.readers
        together = gathers_weights(self.backbone.model)
        if accumulate < readers or (together and accumulate % readers):
            need = "as many samples a step as the others" if together else "a sample a step"
            raise ConfigError(
                f"accumulate is {accumulate}, but {readers} processes each need {need}; set accumulate to {readers} or "
                "a multiple (and steps to as many fewer)"
            )
        if together and self.config.pack_tokens is not None:
            raise ConfigError(
                "with pack_tokens a process runs as many passes as its samples need, but processes that hold shares of "
                "the weights (FSDP) must run equally many; leave pack_tokens out"
            )

    def _check_cache(self) -> None:
        """Options that read through the cache need a whole model in one place."""
        config = self.config
        if config.evict_budget is None and config.recall_budget is None and config.answers == "data":
            return
        devices = {self.backbone.layer_device(i) for i in range(self.backbone.num_layers)}
        spread = f"on {', '.join(sorted(map(str, devices)))}" if len(devices) > 1 else ""
        spread = "in shares on all processes" if gathers_weights(self.backbone.model) else spread
        if spread:
            raise ConfigError(
                "evict_budget, recall_budget and answers 'model' read through the cache, which lies on one device, but "
                f"the layers lie {spread}; load the model without device_map and FSDP, or leave them out"
            )

    def _checked(self, on_check: Callable[[int, int], object] | None) -> DataReport:
        """The report on the data, of a check of the same data with the same options before or of one now."""
        config, embeddings = self.config, self.backbone.model.get_input_embeddings()
        options: dict[str, Any] = {
            "max_length": None if config.truncate else config.max_length,
            "vocab_size": embeddings.weight.shape[0],  # type: ignore[index]
            "window": model_length(self.backbone.model),
        }
        key = {**options, "data": self.samples.digest, "template": _template_of(self.samples)}
        report: DataReport | None = None
        if self.group.is_main:
            path = self.output / DATA_FILE
            report = _read_report(path, key)
            if report is not None:
                judge(report, config.max_dropped)
            else:
                report = check_samples(self.samples, **options, max_dropped=config.max_dropped, on_progress=on_check)
                try:
                    write_text(path, json.dumps({"key": key, **report.to_dict()}) + "\n")
                except OSError as error:
                    raise HeadsError(
                        f"{path} cannot be written: {error}; choose a folder with room for the heads"
                    ) from error
        return self.group.from_main(report)

    def _held_out_count(self) -> int:
        count, wanted = len(self.samples), self.config.eval_samples
        held = min(16, count // 20) if wanted is None else wanted
        if held >= count:
            raise ConfigError(f"eval_samples {held} of {count} samples leave none to train on; lower it or add samples")
        return held

    def _new_heads(self) -> RetainingHeads:
        """Those of `init`, or random weights that depend on the seed only; layers without a budget get zeros."""
        config = self.config
        choices: dict[str, Any] = {
            "input": config.input, "label": config.label_kind, "objective": config.objective,
            "query_aware": config.query_aware,
        }  # fmt: skip
        if config.init:
            heads = RetainingHeads.from_pretrained(config.init)
            heads.check(self.backbone)
            if heads.config.input != config.input:
                raise ConfigError(
                    f"input is {config.input!r}, but the heads in init read {heads.config.input!r}; set input to that"
                )
            heads.config = dataclasses.replace(heads.config, **choices)
            heads.float().requires_grad_(True)
        else:
            made = HeadsConfig.of(self.backbone, hidden_size=config.hidden_size, **choices)
            heads = RetainingHeads(made, generator=torch.Generator().manual_seed(config.seed))
            for i in set(range(made.num_layers)) - set(self.learned):
                for weight in heads.layers[i].parameters():
                    nn.init.zeros_(weight)
        if self.backbone.device.type == "cuda" and self.backbone.dtype in (torch.bfloat16, torch.float16):
            heads.compute_dtype = self.backbone.dtype  # fp32 weights, 16-bit products
        heads.shard = self.backbone.shard
        return heads.to_layers(self.backbone)

    def _start(self, resume: bool) -> None:
        path = self.output / CHECKPOINT_FILE
        if self.group.is_main:
            for name in (CHECKPOINT_FILE, CONFIG_FILE, WEIGHTS_FILE, LOG_FILE, DATA_FILE):
                for stale in self.output.glob(f".{name}.*.tmp"):  # a kill -9 while it was written
                    stale.unlink()
            if not resume:
                path.unlink(missing_ok=True)
        self.group.wait()
        if path.exists():
            self._load_checkpoint(path)
        if self.group.is_main:
            self.log = Log(self.output, self.config.log_to)
            self.log.trim(self.state.step)

    # ------------------------------------------------------------------ samples

    def _stream(self) -> Generator[Sample]:
        """This process's samples without end; the next one is read and tokenized while the device works."""
        source = self._read(self.state.step)
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(next, source)
            while True:
                sample = coming.result()
                coming = pool.submit(next, source)
                yield sample

    def _read(self, step: int) -> Iterator[Sample]:
        while True:
            for place in range(self.group.reader, self.config.accumulate, self.group.readers):
                yield self.samples[self.order[step * self.config.accumulate + place]]
            step += 1

    def _answered(self, sample: Sample) -> Sample:
        """The sample, with the backbone's answer where the run wants that."""
        if self.config.answers == "data":
            return sample
        return answered_by(self.backbone, sample, self.config.answer_tokens)

    # ------------------------------------------------------------------ a step

    def step(self, stream: Iterator[Sample]) -> None:
        """Learn from the samples of one step and move the weights."""
        mine = (
            self._answered(next(stream)) for _ in range(self.group.reader, self.config.accumulate, self.group.readers)
        )
        for pack in in_packs(mine, self.config.pack_tokens):
            self.window.names += [sample.name for sample in pack]
            self.window.losses += self.learn_pack(pack) if len(pack) > 1 else [self.learn(pack[0])]
            self.window.tokens += sum(map(length_of, pack))
        self.group.add(p.grad for p in self.weights if p.grad is not None)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.state.step)
        nn.utils.clip_grad_value_(self.weights, self.config.clip_value)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        self.state.position += self.config.accumulate

    def learn(self, sample: Sample) -> Tensor:
        """Forward and, layer by layer, backward; the loss stays on the device."""
        losses = self._learn_evicting(sample) if self.config.evict_budget is not None else self._learn_whole(sample)
        return torch.stack([loss.to(self.backbone.device) for loss in losses]).sum()

    def _learn_whole(self, sample: Sample) -> list[Tensor]:
        losses: list[Tensor] = []

        def visit(layer: int, inputs: HeadInput, labels: Tensor) -> None:
            with torch.enable_grad():
                scores = score_in_pieces(self.heads, layer, inputs, self.token_chunk)
                losses.extend(self._backward([self._loss(scores, self.objective.targets(labels))]))

        self.label_pass(sample, visit)
        return losses

    def learn_pack(self, samples: list[Sample]) -> list[Tensor]:
        """`learn` for several samples at once: their losses, on the device."""
        losses: list[list[Tensor]] = []

        def visit(layer: int, inputs: HeadInput, pieces: Pieces) -> None:
            with torch.enable_grad():
                scores = score_in_pieces(self.heads, layer, inputs, self.token_chunk)
                parts = [
                    self._loss(scores[..., start : start + labels.shape[-1]], self.objective.targets(labels))
                    for start, labels in pieces
                ]
                losses.append([loss.to(self.backbone.device) for loss in self._backward(parts)])

        run_pack(self.label_pass, samples, visit)
        return [torch.stack(each).sum() for each in zip(*losses, strict=True)]

    def _learn_evicting(self, sample: Sample) -> list[Tensor]:
        """Labels from full attention; then the prompt as inference reads it, each chunk weighing what it is long."""
        targets: dict[int, Tensor] = {}
        losses: list[Tensor] = []
        self.label_pass(sample, lambda layer, inputs, labels: targets.update({layer: self.objective.targets(labels)}))

        def learn(layer: int, inputs: HeadInput, start: int) -> Tensor:
            with torch.enable_grad():
                scores = self.heads.score(layer, *inputs)
                wanted = targets[layer][..., start : start + scores.shape[-1]]  # fewer, or none, past max_length
                if wanted.shape[-1]:
                    share = wanted.shape[-1] / targets[layer].shape[-1]
                    losses.extend(self._backward([self._loss(scores[..., : wanted.shape[-1]], wanted, share)]))
            return scores

        read_evicting(self.backbone, Learner(self.heads, learn), cache_config(self.config), sample)
        return losses

    def _loss(self, scores: Tensor, targets: Tensor, share: float = 1.0) -> Tensor:
        """One layer's part of a sample's loss; `share`: of the sample's tokens that these are."""
        loss = layer_loss(scores, targets, len(self.learned), self.config.smoothness, self.objective)
        share /= self.heads.shard.size  # a mean over the heads of all processes
        return loss if share == 1.0 else loss * share

    def _backward(self, losses: list[Tensor]) -> list[Tensor]:
        """Add to the layer's gradient what these samples say."""
        (sum(losses[1:], losses[0]) / self.config.accumulate).backward()
        return [loss.detach() for loss in losses]

    # ------------------------------------------------------------------ measuring

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0

    def _read_losses(self) -> None:
        """Log the mean loss of the steps since the last time, and samples far above it."""
        names, losses = self._finite_losses()
        before, self.state.loss = self.state.loss, losses.mean().item()
        tokens = sum(self.group.gather(self.window.tokens)) // self.group.share
        self.tokens_per_second = tokens / max(time.perf_counter() - self.window.start, 1e-9)
        self.log.write(
            self.state.step,
            loss=self.state.loss,
            lr=self.config.lr_at(self.state.step - 1),
            samples=self.state.position,
            skipped=self.state.skipped,
            tokens_per_second=round(self.tokens_per_second),
            seconds=round(self.state.seconds, 3),
        )
        if before is not None:
            risen = {name: loss for name, loss in zip(names, losses.tolist()) if loss > RISE * before}
            if risen:
                self.log.write(self.state.step, risen=risen, mean_before=before)
                worst = max(risen, key=lambda name: risen[name])
                self.warning = (
                    f"step {self.state.step}: loss {risen[worst]:.4g} of {worst}, {risen[worst] / before:.0f} times "
                    f"the mean of the steps before ({len(risen)} such samples; log.jsonl names them)"
                )
        self.window = _Window()

    def _finite_losses(self) -> tuple[list[str], Tensor]:
        """The window's samples and fp64 losses, of all processes; here, and only here, training waits for the device.

        Raises: NumericsError: a loss is not finite; names the sample.
        """
        mine = torch.stack(self.window.losses).double().cpu() if self.window.losses else torch.zeros(0).double()
        parts = self.group.gather((self.window.names, mine))
        readers = [parts[i : i + self.group.share] for i in range(0, len(parts), self.group.share)]
        names = [name for shares in readers for name in shares[0][0]]
        losses = torch.cat([torch.stack([loss for _, loss in shares]).sum(0) for shares in readers])
        for name, loss in zip(names, losses.tolist()):
            if not math.isfinite(loss):
                raise NumericsError(
                    f"{name}: the loss is {loss} by step {self.state.step}; the last checkpoint is from before. "
                    "Lower lr, run the backbone in float32 or bfloat16, or remove the sample"
                )
        return names, losses

    def _evaluate(self, held_out: list[Sample]) -> None:
        """Overlap (and retention) on the held-out samples; the best heads so far are kept in best/."""
        found = evaluate(self.heads, self.label_pass, held_out, self.config.eval_budgets, self.group)
        self.state.overlap, self.state.overlap_per_head = found.overlap, found.per_head.tolist()
        rounded = [[round(x, 4) for x in row] for row in self.state.overlap_per_head]
        flat = {f"overlap_at_{share:g}": value for share, value in found.overlap_at.items()}
        flat |= {f"retention_at_{share:g}": value for share, value in found.retention_at.items()}
        budget = self.config.recall_budget
        if budget is not None:
            flat[f"recall_at_{budget:g}"] = recall(self.backbone, self.heads, held_out, budget, self.group)
        self.log.write(self.state.step, overlap=found.overlap, **flat, overlap_per_head=rounded)
        if self.state.best is None or found.overlap > self.state.best:
            self.state.best = found.overlap
            if self.group.is_main:
                self._save_heads(self.output / BEST_FOLDER, torch.bfloat16)

    def _progress(self) -> TrainProgress:
        s = self.state
        return TrainProgress(
            s.step, self.config.steps, s.loss, s.overlap, s.skipped, self.tokens_per_second, self.warning
        )

    # ------------------------------------------------------------------ the end

    def _stop(self, signal_name: str) -> TrainResult:
        self._save_checkpoint()
        return self._result(signal_name)

    def _finish(self) -> TrainResult:
        """Heads first, then the mark that they are done: a kill in between only repeats the last steps."""
        self.heads.requires_grad_(False).compute_dtype = None
        self.state.finished = True
        if self.group.is_main:
            self._save_heads(self.output, torch.float32)
            write_checkpoint(self.output / CHECKPOINT_FILE, {**self._identity(), "state": state_dict(self.state)})
        self.group.wait()
        return self._result(None)

    def _save_heads(self, folder: Path, dtype: torch.dtype) -> None:
        config = dataclasses.replace(self.heads.config, training=self._description())
        self.heads.config = config
        self.heads.save_pretrained(folder, dtype=dtype)

    def _result(self, stopped: str | None) -> TrainResult:
        s = self.state
        return TrainResult(
            output=self.output,
            heads=self.heads.eval(),
            step=s.step,
            steps=self.config.steps,
            skipped=s.skipped,
            loss=s.loss,
            overlap=s.overlap,
            overlap_per_head=s.overlap_per_head,
            seconds=s.seconds,
            stopped=stopped,
            dropped=self.report.summary(),
        )

    def _description(self) -> dict[str, Any]:
        s = self.state
        return {
            "config": {**self.config.plain(), "init": Path(self.config.init).name},  # no path of this machine
            "data": [Path(name).name for name in self.samples.names],
            "data_sha256": self.samples.digest,
            "samples": len(self.samples),
            "dropped": {reason: drops.count for reason, drops in self.report.dropped.items()},
            "step": s.step,
            "loss": s.loss,
            "overlap": s.overlap,
        }

    # ------------------------------------------------------------------ checkpoint

    def _identity(self) -> dict[str, Any]:
        return {"identity": identity(self.config, self.backbone.fingerprint(), self.samples.digest)}

    def _save_checkpoint(self) -> None:
        names, losses = self._finite_losses()  # never save weights that a bad sample has made NaN
        if self.group.is_main:
            weights = {"heads": self.heads.state_dict(), "optimizer": self.optimizer.state_dict()}
            content = {**self._identity(), **weights, "losses": losses, "names": names, "state": state_dict(self.state)}
            write_checkpoint(self.output / CHECKPOINT_FILE, content)
        self.group.wait()

    def _load_checkpoint(self, path: Path) -> None:
        skipped = self.state.skipped
        self.state, content = read_checkpoint(path, self._identity()["identity"])
        self.state.skipped = skipped
        if self.state.finished:
            return
        self.heads.load_state_dict(content["heads"], strict=True)
        self.optimizer.load_state_dict(content["optimizer"])
        if self.group.reader == 0:  # losses of steps that were not logged yet, of all processes
            losses = list(content["losses"].to(self.backbone.device) / self.group.share)
            self.window = _Window(content.get("names", ["a sample before the checkpoint"] * len(losses)), losses)


def _template_of(samples: Samples) -> str:
    """What besides the data decides the ids: tokenizer and chat template."""
    tokenizer = samples.tokenizer
    template = getattr(tokenizer, "chat_template", None)
    return f"{type(tokenizer).__name__}:{getattr(tokenizer, 'vocab_size', 0)}:{template}:{samples.question_first}"


def _read_report(path: Path, key: dict[str, Any]) -> DataReport | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return DataReport.from_dict(values) if values.pop("key") == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or cut by a kill: check again
