"""The trainer of the retaining heads: one forward pass a sample, nothing on disk, no attention matrix, no logits.

Locret (arXiv:2410.01805). The backbone is frozen and scores do not feed attention, so a layer's head can learn while
that layer runs. In each layer of one pass over (prompt + answer):

    q, k, v before RoPE  ->  full causal attention (what the backbone needs to go on)
                         ->  labels: largest logit any answer query gives a prompt key (labels.py)
                         ->  scores of the prompt's units, loss, backward into this layer's head; then all is freed

The released code stored labels on disk (one file a sample) and made full-vocabulary logits; here memory is one layer's.

    loss = mean over layers of SmoothL1(score, label)  +  0.0025 * sum over layers of mean (score[t+1] - score[t])^2

The paper writes one weight for both terms; the released code averages the first over layers and sums the second, so
against a per-layer mean its weight is 0.0025 L (0.08 for 32 layers). We keep what the code does.

Where we differ from the release: warm-up is 10 % of the steps (its 2000 of 3000 is not needed: APB, by the same
authors, trained the same heads with 300), d_R is 256 (paper, table 16: as good), heads are fp32, samples are rendered
with the model's own chat template, and there is a held-out split.

Shapes: B batch (1), T tokens, P prompt tokens, Hq / Hkv query / KV heads, D head dim, L layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import threading
import time
import tomllib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locret.backbone import AttentionCall, Backbone, Rope
from locret.config import strict
from locret.data import Sample, Samples, shuffled
from locret.errors import ConfigError, DataError, HeadsError, NumericsError
from locret.files import atomic_write, write_text
from locret.heads import CONFIG_FILE, WEIGHTS_FILE, HeadsConfig, RetainingHeads
from locret.kernels.attention import prefix_causal_attention
from locret.labels import importance_labels

CHECKPOINT_FILE, LOG_FILE = "checkpoint.pt", "log.jsonl"
OVERLAP_SHARE = 0.1  # the metric of the release: how many of the label's top 10 % the scores find
Data = str | Path | Samples | Iterable[str | Path | Sample | Mapping[str, Any]]


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Defaults are the release's (arXiv:2410.01805) unless said otherwise.

    Attributes:
        steps: optimizer steps.
        accumulate: samples per step.
        lr, betas, weight_decay: of AdamW.
        clip_value: gradients are clipped element-wise to [-clip_value, clip_value].
        warmup_steps: linear warm-up, then linear decay to 0; None is 10 % of the steps (release: 2000 of 3000).
        smoothness: weight of the squared difference of neighbouring tokens' scores, summed over layers.
        hidden_size: d_R of the heads (release: 1024).
        max_length: prompt tokens; a sample with a longer prompt is skipped and counted ...
        truncate: ... or, as in the release, run whole, and only its first max_length prompt tokens are learned from.
        eval_samples: held-out samples; None is 5 % of the data, at most 16.
        eval_every, log_every, checkpoint_every: steps. The loss is read from the device every log_every steps.
        init: folder or Hub id of heads to go on from; empty: random ones.
        seed: of the heads' first weights, the held-out split and the order of samples.
        description: of the training data; stored with the heads.
    """

    steps: int = 3000
    accumulate: int = 1
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip_value: float = 0.5
    warmup_steps: int | None = None
    smoothness: float = 0.0025
    hidden_size: int = 256
    max_length: int = 10_240
    truncate: bool = False
    eval_samples: int | None = None
    eval_every: int = 100
    log_every: int = 10
    checkpoint_every: int = 200
    init: str = ""
    seed: int = 0
    description: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "hidden_size", "max_length", "eval_every", "log_every", "checkpoint_every"):
            _check(name, getattr(self, name), int, lambda v: v >= 1, "a whole number of at least 1")
        _check("lr", self.lr, float, lambda v: 0 < v <= 1, "above 0, at most 1")
        for name in ("weight_decay", "smoothness"):
            _check(name, getattr(self, name), float, lambda v: 0 <= v < float("inf"), "at least 0")
        _check("clip_value", self.clip_value, float, lambda v: v > 0, "above 0")
        _check("seed", self.seed, int, lambda v: v >= 0, "a whole number of at least 0")
        _check("truncate", self.truncate, bool, lambda v: True, "true or false")
        for name in ("description", "init"):
            _check(name, getattr(self, name), str, lambda v: True, "text")
        _check("betas", self.betas, (tuple, list), _are_betas, "two numbers in [0, 1)")
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.warmup_steps is not None:
            _check("warmup_steps", self.warmup_steps, int, lambda v: 0 <= v <= self.steps, f"0 to {self.steps} (steps)")
        if self.eval_samples is not None:
            _check("eval_samples", self.eval_samples, int, lambda v: v >= 0, "a whole number of at least 0")

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> TrainConfig:
        """Strict: an unknown key is an error that names the nearest."""
        return strict(cls, options)

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> TrainConfig:
        """A recipe: its [train] table, or the whole file where there is none. `overrides` win; None does not."""
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
        table = values.get("train", values)
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: train is {table!r}; it must be a table, [train]")
        return cls.from_dict({**table, **{k: v for k, v in overrides.items() if v is not None}})

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...; never 0, so no step is wasted."""
        warmup = self.steps // 10 if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * (self.steps - step) / (self.steps - warmup)


@dataclass(frozen=True)
class TrainProgress:
    """What `on_progress` is told after every step. loss and overlap are the last ones known, None before."""

    step: int
    steps: int
    loss: float | None
    overlap: float | None
    skipped: int
    tokens_per_second: float


@dataclass(frozen=True)
class TrainResult:
    """A finished or stopped run."""

    output: Path
    heads: RetainingHeads
    step: int
    steps: int
    skipped: int  # samples longer than max_length
    loss: float | None  # mean of the last log_every steps
    overlap: float | None  # mean over layers, heads and held-out samples
    overlap_per_head: list[list[float]] | None  # [L][Hkv]; layers with a sliding window have no budget and read 0
    seconds: float
    stopped: str | None  # "SIGINT" or "SIGTERM"; None: finished

    @property
    def finished(self) -> bool:
        return self.stopped is None

    def summary(self) -> str:
        """One line for people."""
        if self.stopped:
            return (
                f"stopped by {self.stopped} at step {self.step} of {self.steps}; "
                f"checkpoint saved in {self.output}: the same command goes on from there"
            )
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        overlap = "" if self.overlap is None else f", top-10% overlap {self.overlap:.3f}"
        skipped = f", {self.skipped} samples over max_length skipped" if self.skipped else ""
        return f"trained {self.step} steps in {self.seconds:.0f} s{loss}{overlap}{skipped}; heads in {self.output}"


def train(
    backbone: Backbone,
    data: Data,
    output: str | Path,
    config: TrainConfig | None = None,
    *,
    on_progress: Callable[[TrainProgress], None] | None = None,
    resume: bool = True,
) -> TrainResult:
    """Train retaining heads for `backbone` and save them in `output` (config.json, heads.safetensors, log.jsonl).

    Args:
        data: paths of .jsonl files, `Sample`s or dictionaries in memory (data.py lists the forms).
        resume: go on from `output`'s checkpoint, if there is one; on the same machine the weights are bit for bit those
            of a run without the interruption. False starts anew.

    SIGTERM and Ctrl-C end the current step, save a checkpoint and return a result with `stopped` set; a second one
    raises KeyboardInterrupt at once. Raises: DataError (bad samples), ConfigError (options, another run's checkpoint),
    NumericsError (a loss that is not finite, naming the sample), HeadsError (files that cannot be written or read).
    """
    samples = data if isinstance(data, Samples) else Samples(data, backbone.tokenizer)
    run = _Run(backbone, samples, Path(output), config or TrainConfig())
    with _stop_on_signals() as caught, _eval_mode(backbone.model), _tf32(backbone):
        return run.go(on_progress or (lambda progress: None), caught, resume)


def top_overlap(scores: Tensor, labels: Tensor, share: float = OVERLAP_SHARE) -> Tensor:
    """The share of the labels' top positions that are among the scores' top positions: [..., T] twice -> [...]."""
    count = max(1, round(share * labels.shape[-1]))
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count).indices, True)
    return chosen.gather(-1, labels.topk(count).indices).float().mean(-1)


def layer_loss(scores: Tensor, labels: Tensor, num_layers: int, smoothness: float) -> Tensor:
    """One layer's part of the loss at the top of this file: scores, labels [B, Hkv, P] -> scalar."""
    loss = F.smooth_l1_loss(scores, labels) / num_layers
    if smoothness and scores.shape[-1] > 1:
        loss = loss + smoothness * scores.diff(dim=-1).square().mean()
    return loss


class LabelContext:
    """A `LayerContext`: full causal attention, and in each learned layer the labels, handed to `visit` with q, k, v.

    Args:
        prompt_len: tokens before the answer.
        learned_len: how many of them are learned from, the first ones.
        visit: called as visit(layer, q, k, v, labels): q [1, Hq, P, D], k, v [1, Hkv, P, D] before RoPE,
            labels fp32 [1, Hkv, P], P = learned_len.
    """

    def __init__(
        self,
        rope: Rope,
        layers: Iterable[int],
        prompt_len: int,
        learned_len: int,
        visit: Callable[[int, Tensor, Tensor, Tensor, Tensor], None],
    ) -> None:
        self.rope, self.layers, self.visit = rope, frozenset(layers), visit
        self.prompt_len, self.learned_len = prompt_len, learned_len
        self._positions: Tensor | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """q [1, Hq, T, D], k, v [1, Hkv, T, D] before RoPE -> [1, Hq, T, D]."""
        if self._positions is None:
            self._positions = torch.arange(q.shape[2], device=q.device)
        q_rotated, k_rotated = (self.rope.rotate(layer, x, self._positions) for x in (q, k))
        if layer in self.layers:
            labels = importance_labels(q_rotated, k_rotated, self.prompt_len, call.scale, softcap=call.softcap)
            n = self.learned_len
            self.visit(layer, q[:, :, :n], k[:, :, :n], v[:, :, :n], labels[:, :, :n])
        return prefix_causal_attention(
            q_rotated, k_rotated, v, scale=call.scale, softcap=call.softcap, window=call.window
        )


# ---------------------------------------------------------------------- one run


@dataclass
class _State:
    """What a checkpoint holds besides weights and optimizer. The order of samples follows from seed and position, and
    nothing else draws random numbers, so this is the whole state."""

    step: int = 0
    position: int = 0  # samples taken from the endless shuffled stream, skipped ones included
    skipped: int = 0
    loss: float | None = None
    overlap: float | None = None
    overlap_per_head: list[list[float]] | None = None
    seconds: float = 0.0
    finished: bool = False


@dataclass
class _Window:
    """Steps since the loss was last read from the device."""

    names: list[str] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    start: float = field(default_factory=time.perf_counter)


class _Run:
    def __init__(self, backbone: Backbone, samples: Samples, output: Path, config: TrainConfig) -> None:
        self.backbone, self.samples, self.output, self.config = backbone, samples, output, config
        embeddings: Any = backbone.model.get_input_embeddings()
        self.vocab_size: int = embeddings.weight.shape[0]
        self.learned = [i for i, spec in enumerate(backbone.layers) if spec.window is None]
        if not self.learned:
            raise ConfigError(
                "every layer of this backbone has a sliding window, so no layer has a budget to train for"
            )
        self.held_out, self.order = self._split()
        self.heads = self._new_heads()
        self.weights = [p for i in self.learned for p in self.heads.layers[i].parameters()]
        self.optimizer = torch.optim.AdamW(
            self.weights,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=backbone.device.type == "cuda",
        )
        self.state, self.window, self.tokens_per_second = _State(), _Window(), 0.0
        self._rope: tuple[tuple[int, int], Rope] | None = None

    def go(self, report: Callable[[TrainProgress], None], caught: list[str], resume: bool) -> TrainResult:
        self._start(resume)
        if self.state.finished:
            self.heads = RetainingHeads.from_pretrained(self.output)
            return self._result(None)
        held_out = list(self._fitting(self.samples[i] for i in self.held_out))
        started = time.perf_counter() - self.state.seconds
        self.window.start = time.perf_counter()
        with contextlib.closing(self._stream()) as stream:
            while self.state.step < self.config.steps and not caught:
                self._step(stream)
                self.state.seconds = time.perf_counter() - started
                last = self.state.step == self.config.steps
                if self._due(self.config.log_every) or last:
                    self._read_losses()
                if held_out and (self._due(self.config.eval_every) or last):
                    self._evaluate(held_out)
                if self._due(self.config.checkpoint_every) and not last:
                    self._save_checkpoint()
                report(self._progress())
        return self._stop(caught[0]) if self.state.step < self.config.steps else self._finish()

    # ------------------------------------------------------------------ set-up

    def _split(self) -> tuple[list[int], list[int]]:
        """Indices of held-out and of training samples."""
        count, wanted = len(self.samples), self.config.eval_samples
        held = min(16, count // 20) if wanted is None else wanted
        if held >= count:
            raise ConfigError(f"eval_samples {held} of {count} samples leave none to train on; lower it or add samples")
        order = shuffled(count, self.config.seed, -1)
        return order[:held], order[held:]

    def _new_heads(self) -> RetainingHeads:
        """Those of `init`, or random weights that depend on the seed only; layers without a budget get zeros."""
        if self.config.init:
            heads = RetainingHeads.from_pretrained(self.config.init)
            heads.check(self.backbone)
            return heads.float().requires_grad_(True).to(self.backbone.device)
        config = HeadsConfig.of(self.backbone, hidden_size=self.config.hidden_size)
        heads = RetainingHeads(config, generator=torch.Generator().manual_seed(self.config.seed))
        for i in set(range(config.num_layers)) - set(self.learned):
            for weight in heads.layers[i].parameters():
                nn.init.zeros_(weight)
        return heads.to(self.backbone.device)

    def _start(self, resume: bool) -> None:
        path = self.output / CHECKPOINT_FILE
        for name in (CHECKPOINT_FILE, CONFIG_FILE, WEIGHTS_FILE, LOG_FILE):
            for stale in self.output.glob(f".{name}.*.tmp"):  # a kill -9 while it was written
                stale.unlink()
        if not resume:
            path.unlink(missing_ok=True)
        if path.exists():
            self._load_checkpoint(path)
        self._trim_log()

    # ------------------------------------------------------------------ samples

    def _stream(self) -> Generator[tuple[Sample, int, int]]:
        """(sample, position, skipped) without end; the next one is read and tokenized while the device works."""
        source = self._read(self.state.position, self.state.skipped)
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(next, source)
            while True:
                item = coming.result()
                coming = pool.submit(next, source)
                yield item

    def _read(self, position: int, skipped: int) -> Iterator[tuple[Sample, int, int]]:
        count, in_a_row = len(self.order), 0
        while True:
            epoch, start = divmod(position, count)
            for index in shuffled(count, self.config.seed, epoch)[start:]:
                position += 1
                sample = self.samples[self.order[index]]
                if next(self._fitting([sample]), None) is None:
                    skipped, in_a_row = skipped + (epoch == 0), in_a_row + 1
                    if in_a_row == count:
                        raise DataError(
                            f"all {count} samples have prompts of more than max_length {self.config.max_length} tokens "
                            f"(the last: {len(sample.prompt_ids)}); raise max_length, or set truncate"
                        )
                    continue
                in_a_row = 0
                yield sample, position, skipped

    def _fitting(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Those that max_length admits."""
        for sample in samples:
            largest = max(max(sample.prompt_ids), max(sample.answer_ids))
            if largest >= self.vocab_size:
                raise DataError(f"{sample.name}: token id {largest}, but the backbone knows 0 to {self.vocab_size - 1}")
            if self.config.truncate or len(sample.prompt_ids) <= self.config.max_length:
                yield sample

    # ------------------------------------------------------------------ a step

    def _step(self, stream: Iterator[tuple[Sample, int, int]]) -> None:
        for _ in range(self.config.accumulate):
            sample, self.state.position, self.state.skipped = next(stream)
            self.window.names.append(sample.name)
            self.window.losses.append(self._learn(sample))
            self.window.tokens += len(sample.prompt_ids) + len(sample.answer_ids)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.state.step)
        nn.utils.clip_grad_value_(self.weights, self.config.clip_value)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1

    def _learn(self, sample: Sample) -> Tensor:
        """Forward and, layer by layer, backward; the loss stays on the device."""
        losses: list[Tensor] = []

        def visit(layer: int, q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> None:
            with torch.enable_grad():
                scores = self.heads.score(layer, q, k, v)
                loss = layer_loss(scores, labels, len(self.learned), self.config.smoothness)
                (loss / self.config.accumulate).backward()
            losses.append(loss.detach())

        self._forward(sample, visit)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _forward(self, sample: Sample, visit: Callable[[int, Tensor, Tensor, Tensor, Tensor], None]) -> None:
        prompt_len = len(sample.prompt_ids)
        ids = torch.tensor([sample.prompt_ids + sample.answer_ids])
        if self.backbone.device.type == "cuda":
            ids = ids.pin_memory()  # a copy from pageable memory would wait for the device
        rope = self._rope_for(ids.shape[1], prompt_len)
        context = LabelContext(rope, self.learned, prompt_len, min(prompt_len, self.config.max_length), visit)
        try:
            self.backbone.run(ids.to(self.backbone.device, non_blocking=True), context, logits=0)
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"{sample.name}: {ids.shape[1]} tokens do not fit in the device's memory; lower max_length"
            ) from error

    def _rope_for(self, length: int, prompt_len: int) -> Rope:
        if self._rope is None or self._rope[0] != (length, prompt_len):
            self._rope = (length, prompt_len), self.backbone.rope(length, prompt_len)
        return self._rope[1]

    # ------------------------------------------------------------------ measuring

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0

    def _read_losses(self) -> None:
        """Log the mean loss of the steps since the last time."""
        window, losses = self.window, self._finite_losses()
        self.state.loss = losses.double().mean().item()
        self.tokens_per_second = window.tokens / max(time.perf_counter() - window.start, 1e-9)
        self._log(
            loss=self.state.loss,
            lr=self.config.lr_at(self.state.step - 1),
            samples=self.state.position - self.state.skipped,
            skipped=self.state.skipped,
            tokens_per_second=round(self.tokens_per_second),
            seconds=round(self.state.seconds, 3),
        )
        self.window = _Window()

    def _finite_losses(self) -> Tensor:
        """The window's losses; here, and only here, training waits for the device. NumericsError names the sample."""
        losses = torch.stack(self.window.losses).cpu() if self.window.losses else torch.zeros(0)
        for name, loss in zip(self.window.names, losses.tolist()):
            if not math.isfinite(loss):
                raise NumericsError(
                    f"{name}: the loss is {loss} by step {self.state.step}; the last checkpoint is from before. "
                    "Lower lr, run the backbone in float32 or bfloat16, or remove the sample"
                )
        return losses

    def _evaluate(self, held_out: list[Sample]) -> None:
        """Top-10% overlap per head on the held-out samples."""
        total = torch.zeros(self.backbone.num_layers, self.backbone.num_kv_heads, device=self.backbone.device)

        def visit(layer: int, q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> None:
            total[layer] += top_overlap(self.heads.score(layer, q, k, v), labels).mean(0)

        for sample in held_out:
            self._forward(sample, visit)
        per_head = total.cpu() / len(held_out)
        self.state.overlap = per_head[self.learned].mean().item()
        self.state.overlap_per_head = per_head.tolist()
        rounded = [[round(x, 4) for x in row] for row in self.state.overlap_per_head]
        self._log(overlap=self.state.overlap, overlap_per_head=rounded)

    def _progress(self) -> TrainProgress:
        s = self.state
        return TrainProgress(s.step, self.config.steps, s.loss, s.overlap, s.skipped, self.tokens_per_second)

    # ------------------------------------------------------------------ the end

    def _stop(self, signal_name: str) -> TrainResult:
        self._save_checkpoint()
        return self._result(signal_name)

    def _finish(self) -> TrainResult:
        """Heads first, then the mark that they are done: a kill in between only repeats the last steps."""
        self.heads.config = dataclasses.replace(self.heads.config, training=self._description())
        self.heads.requires_grad_(False).save_pretrained(self.output)
        self.state.finished = True
        self._write_checkpoint(self._identity())
        return self._result(None)

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
        )

    def _description(self) -> dict[str, Any]:
        s = self.state
        return {
            "config": {**_plain(self.config), "init": Path(self.config.init).name},  # no path of this machine
            "data": [Path(name).name for name in self.samples.names],
            "data_sha256": self.samples.digest,
            "samples": len(self.samples),
            "loss": s.loss,
            "overlap": s.overlap,
        }

    # ------------------------------------------------------------------ checkpoint and log

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        identity = {f"option {k}": v for k, v in _plain(self.config).items() if k not in _FREE_OPTIONS}
        identity |= {f"backbone {k}": v for k, v in self.backbone.fingerprint().items()}
        return {"identity": {**identity, "data": self.samples.digest}}

    def _save_checkpoint(self) -> None:
        losses = self._finite_losses()  # never save weights that a bad sample has made NaN
        weights = {"heads": self.heads.state_dict(), "optimizer": self.optimizer.state_dict(), "losses": losses}
        self._write_checkpoint({**self._identity(), **weights})

    def _write_checkpoint(self, content: dict[str, Any]) -> None:
        path = self.output / CHECKPOINT_FILE
        content["state"] = dataclasses.asdict(self.state)
        try:
            atomic_write(path, lambda temporary: torch.save(content, temporary))
        except (OSError, RuntimeError) as error:  # torch's zip writer wraps a full disk in a RuntimeError
            free = shutil.disk_usage(self.output).free / 2**20
            raise HeadsError(
                f"{path} cannot be written: {error}; {free:,.0f} MiB are free there. The checkpoint that was there is "
                "untouched: make room, and the same command goes on from it"
            ) from error

    def _load_checkpoint(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            identity, state = content["identity"], _State(**content["state"])
        except Exception as error:  # a broken file raises whatever zip, pickle or a missing key raise
            raise HeadsError(
                f"{path} is broken ({type(error).__name__}); delete it, or start anew (resume off)"
            ) from error
        ours = self._identity()["identity"]
        wrong = [f"{k}: {identity.get(k)!r} there, {ours.get(k)!r} now" for k in ours if identity.get(k) != ours[k]]
        if wrong:
            raise ConfigError(
                f"{path} is of another run: {'; '.join(wrong)}. Use another output folder, or start anew (resume off)"
            )
        self.state = state
        if not state.finished:
            self.heads.load_state_dict(content["heads"], strict=True)
            self.optimizer.load_state_dict(content["optimizer"])
            losses = content["losses"].to(self.backbone.device)
            self.window = _Window(["a sample before the checkpoint"] * len(losses), list(losses))

    def _log(self, **values: Any) -> None:
        try:
            with open(self.output / LOG_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.state.step, **values}) + "\n")
        except OSError as error:
            raise HeadsError(f"{self.output / LOG_FILE} cannot be written: {error}") from error

    def _trim_log(self) -> None:
        """Drop what was logged after the checkpoint: those steps are run again."""
        path = self.output / LOG_FILE
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        try:
            write_text(path, "".join(line + "\n" for line in lines if _step_of(line) <= self.state.step))
        except OSError as error:
            raise HeadsError(f"{path} cannot be written: {error}; choose a folder with room for the heads") from error


_FREE_OPTIONS = ("eval_every", "log_every", "checkpoint_every", "description")  # may change when a run goes on


def _step_of(line: str) -> float:
    try:
        step: float = json.loads(line)["step"]
        return step if step > 0 else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut in the middle by a kill


def _plain(config: TrainConfig) -> dict[str, Any]:
    return {**dataclasses.asdict(config), "betas": list(config.betas)}


# ---------------------------------------------------------------------- surroundings


@contextlib.contextmanager
def progress_bar(console: Any = None) -> Iterator[Callable[[TrainProgress], None]]:
    """A rich progress bar with loss and overlap: `with progress_bar() as report: train(..., on_progress=report)`."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(TextColumn("train"), *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("train", total=None, note="")

        def report(p: TrainProgress) -> None:
            loss = "" if p.loss is None else f"loss {p.loss:.4f}"
            overlap = "" if p.overlap is None else f"  overlap {p.overlap:.3f}"
            speed = f"  {p.tokens_per_second:,.0f} tok/s" if p.tokens_per_second else ""
            bar.update(task, completed=p.step, total=p.steps, note=loss + overlap + speed)

        yield report


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[list[str]]:
    """The names of SIGINT and SIGTERM as they arrive; a second one raises KeyboardInterrupt."""
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield caught
        return

    def note(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout in the backbone."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _tf32(backbone: Backbone) -> Iterator[None]:
    """Heads and labels are fp32; on CUDA with a 16-bit backbone TF32 holds its values exactly and is faster."""
    if backbone.device.type != "cuda" or backbone.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _are_betas(values: Any) -> bool:
    return len(values) == 2 and all(isinstance(x, int | float) and 0 <= x < 1 for x in values)


def _check(name: str, value: Any, kind: Any, good: Callable[[Any], bool], allowed: str) -> None:
    kinds = (int, float) if kind is float else kind
    right_kind = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    if not right_kind or not good(value):
        raise ConfigError(f"{name} is {value!r}; it must be {allowed}")
