"""Options of a training run: checked once, strict about names, readable from a TOML recipe."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locret.config import SEEDS, strict
from locret.errors import ConfigError, unknown
from locret.heads import INPUTS
from locret.labels import LABELS
from locret.train.objectives import OBJECTIVES

SCHEDULES = ("linear", "published", "cosine", "constant")
ANSWERS = ("data", "model")
LOGGERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Defaults are the release's (arXiv:2410.01805) unless said otherwise.

    Attributes:
        steps: optimizer steps.
        accumulate: samples per step, over all processes together: a run is the same run on any number of them.
        lr, betas, weight_decay: of AdamW.
        clip_value: gradients are clipped element-wise to [-clip_value, clip_value].
        schedule: after the warm-up "linear" decay to 0, "cosine" decay to 0, or "constant"; "published" is "linear"
            with the release's warm-up, 2000 of 3000 steps.
        warmup_steps: linear warm-up; None is 10 % of the steps ("published": two thirds).
        objective: what a score is compared with and how, a name of objectives.OBJECTIVES.
        label: a name of labels.LABELS; empty: the objective's own.
        smoothness: weight of the squared difference of neighbouring tokens' scores, summed over layers.
        top_share: of the objective "top-k": the share of a prompt's units that count as members.
        input: what heads read: "qkv" (the release) or the layer's "hidden" state.
        hidden_size: d_R of the heads (release: 1024).
        query_aware: prompts begin with the question (Locret-Q); records must be {"document", "question", "answer"}.
        answers: "data", or "model": the backbone's own greedy answers, at most `answer_tokens` long.
        evict_budget: None: prompts are read whole. Units, or a share of the prompt below 1: they are read chunk by
            chunk through a cache of that budget with the heads as they are, so that heads learn from the hidden states
            that inference gives them ...
        evict_chunk, evict_stabilizers: ... with this chunk size and number of stabilizers (None: inference's defaults).
        max_length: prompt tokens; a sample with a longer prompt is dropped and counted ...
        truncate: ... or, as in the release, run whole, and only its first max_length prompt tokens are learned from.
        max_dropped: largest share of samples that may be unreadable; more is an error. Long ones do not count.
        bucketing: steps are made of samples of similar length (matters for several processes or samples a step).
        pack_tokens: neighbours among a step's samples go through the backbone side by side, up to so many tokens a
            pass: the same losses and gradients, in fewer passes. None: one sample a pass.
        eval_samples: held-out samples; None is 5 % of the data, at most 16.
        eval_budgets: shares of the prompt at which overlap (and the retention of gold spans) is measured.
        recall_budget: at every evaluation also read the held-out prompts through a cache of this budget (units, or a
            share of the prompt below 1) with the heads as they are, and see how much of the answers the model still
            finds. None: no.
        eval_every, log_every, checkpoint_every: steps. The loss is read from the device every log_every steps.
        log_to: "tensorboard" and "wandb", beside log.jsonl.
        token_chunk: longer inputs go through MLPs and heads this many tokens at a time; None: 16,384.
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
    schedule: str = "linear"
    warmup_steps: int | None = None
    objective: str = "paper"
    label: str = ""
    smoothness: float = 0.0025
    top_share: float = 0.1
    input: str = "qkv"
    hidden_size: int = 256
    query_aware: bool = False
    answers: str = "data"
    answer_tokens: int = 256
    evict_budget: float | None = None
    evict_chunk: int | None = None
    evict_stabilizers: int | None = None
    max_length: int = 10_240
    truncate: bool = False
    max_dropped: float = 0.1
    bucketing: bool = False
    pack_tokens: int | None = None
    eval_samples: int | None = None
    eval_budgets: tuple[float, ...] = (0.05, 0.1, 0.2)
    recall_budget: float | None = None
    eval_every: int = 100
    log_every: int = 10
    checkpoint_every: int = 200
    log_to: tuple[str, ...] = ()
    token_chunk: int | None = None
    init: str = ""
    seed: int = 0
    description: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "hidden_size", "answer_tokens", "max_length", "eval_every", "log_every",
                     "checkpoint_every"):  # fmt: skip
            _check(name, getattr(self, name), int, lambda v: v >= 1, "a whole number of at least 1")
        _check("lr", self.lr, float, lambda v: 0 < v <= 1, "above 0, at most 1")
        for name in ("weight_decay", "smoothness"):
            _check(name, getattr(self, name), float, lambda v: 0 <= v < float("inf"), "at least 0")
        _check("clip_value", self.clip_value, float, lambda v: v > 0, "above 0")
        _check("top_share", self.top_share, float, lambda v: 0 < v < 1, "above 0 and below 1")
        _check("max_dropped", self.max_dropped, float, lambda v: 0 <= v <= 1, "0 to 1")
        _check("seed", self.seed, int, lambda v: 0 <= v <= SEEDS[1], "a whole number from 0 to 2^64 - 1")
        for name in ("truncate", "query_aware", "bucketing"):
            _check(name, getattr(self, name), bool, lambda v: True, "true or false")
        for name in ("description", "init", "label"):
            _check(name, getattr(self, name), str, lambda v: True, "text")
        _check("betas", self.betas, (tuple, list), _are_betas, "two numbers in [0, 1)")
        _check("eval_budgets", self.eval_budgets, (tuple, list), _are_shares, "shares of the prompt, above 0, up to 1")
        _check("log_to", self.log_to, (tuple, list), lambda v: True, f"a list of {', '.join(LOGGERS)}")
        for name in ("betas", "eval_budgets", "log_to"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_names()
        self._check_optional()

    def _check_names(self) -> None:
        names = {"schedule": SCHEDULES, "objective": OBJECTIVES, "input": INPUTS, "answers": ANSWERS}
        chosen = [(name, getattr(self, name), valid) for name, valid in names.items()]
        chosen += [("label", self.label, LABELS)] if self.label else []
        chosen += [("log_to", name, LOGGERS) for name in self.log_to]
        for name, value, valid in chosen:
            if value not in valid:
                raise unknown(name, str(value), valid)

    def _check_optional(self) -> None:
        if self.warmup_steps is not None:
            _check("warmup_steps", self.warmup_steps, int, lambda v: 0 <= v <= self.steps, f"0 to {self.steps} (steps)")
        for name, low in (("eval_samples", 0), ("evict_chunk", 1), ("evict_stabilizers", 0), ("token_chunk", 1),
                          ("pack_tokens", 1)):  # fmt: skip
            if getattr(self, name) is not None:
                at_least = [lambda v: v >= 0, lambda v: v >= 1][low]
                _check(name, getattr(self, name), int, at_least, f"a whole number of at least {low}")
        for name in ("evict_budget", "recall_budget"):
            if getattr(self, name) is not None:
                good = "units (a whole number), or a share of the prompt above 0 and below 1"
                _check(name, getattr(self, name), float, lambda v: 0 < v < 1 or (v >= 1 and v == int(v)), good)
        if self.evict_budget is not None and self.pack_tokens is not None:
            raise ConfigError(
                "evict_budget reads samples one by one through the cache; leave out pack_tokens or evict_budget"
            )

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> TrainConfig:
        """Strict: an unknown key is an error that names the nearest."""
        return strict(cls, options)

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> TrainConfig:
        """A recipe: its [train] table, or the whole file where there is none. `overrides` win; None does not."""
        values = read_recipe(path)
        table = values.get("train", values)
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: train is {table!r}; it must be a table, [train]")
        return cls.from_dict({**table, **{k: v for k, v in overrides.items() if v is not None}})

    @property
    def label_kind(self) -> str:
        """The label that the run trains for."""
        return self.label or OBJECTIVES[self.objective].label

    @property
    def warmup(self) -> int:
        """Warm-up steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return self.steps * 2 // 3 if self.schedule == "published" else self.steps // 10

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...; never 0, so no step is wasted."""
        warmup = self.warmup
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup))) / 2
        return self.lr * (self.steps - step) / (self.steps - warmup)

    def plain(self) -> dict[str, Any]:
        """As JSON would have it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A TOML file; a ConfigError where it is none."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error


def _are_betas(values: Any) -> bool:
    return len(values) == 2 and all(isinstance(x, int | float) and 0 <= x < 1 for x in values)


def _are_shares(values: Any) -> bool:
    return all(isinstance(x, int | float) and 0 < x <= 1 for x in values)


def _check(name: str, value: Any, kind: Any, good: Callable[[Any], bool], allowed: str) -> None:
    kinds = (int, float) if kind is float else kind
    right_kind = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    if not right_kind or not good(value):
        raise ConfigError(f"{name} is {value!r}; it must be {allowed}")
