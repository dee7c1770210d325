"""recipe.toml as frozen dataclasses: one file states the whole run; an unknown key is an error."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lean import ModelConfig

from locret.errors import ConfigError, unknown


@dataclass(frozen=True)
class Stage:
    """Sequences of one length, for a time (`seconds`) or a number of steps (tests, reruns)."""

    length: int
    seconds: float = 0.0
    steps: int = 0
    tokens_per_step: int = 65536
    mixture: str = "main"  # what the batches are made of: locret.tasks.mixture.STAGES
    answer_scale: float = 1.0  # on the weights of answers: they are 6 % of the tokens at 1,024, 1 % at 32,768
    text_scale: float = 1.0  # on those of natural text, which a model that reads it a hundred times learns by heart

    def __post_init__(self) -> None:
        if (self.seconds > 0) == (self.steps > 0):
            raise ConfigError(f"stage of length {self.length}: give seconds or steps, one of them and more than 0")
        if self.tokens_per_step % self.length:
            raise ConfigError(f"tokens_per_step {self.tokens_per_step} is not a multiple of length {self.length}")

    @property
    def rows(self) -> int:
        return self.tokens_per_step // self.length

    @property
    def planned(self) -> float:
        """The stage's share of the schedule: seconds, or steps."""
        return self.seconds or float(self.steps)


@dataclass(frozen=True)
class Optimiser:
    """Learning rates: linear warm-up, constant up to `constant` of the run, then linear to 0 at its end."""

    muon_lr: float = 2e-3
    adamw_lr: float = 2e-3
    momentum: float = 0.95
    muon_weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    warmup_steps: int = 30
    constant: float = 0.4

    def scale(self, fraction: float, step: int) -> float:
        """What both learning rates are multiplied with, `fraction` of the whole run being done."""
        decay = min(1.0, (1.0 - min(fraction, 1.0)) / (1.0 - self.constant))
        return min(decay, (step + 1) / max(self.warmup_steps, 1))


@dataclass(frozen=True)
class Validation:
    """Teacher-forced exact match while training, and the full table at the end."""

    every_seconds: float = 60.0
    num_samples: int = 16  # of each task, at the stage's length
    text_tokens: int = 262144
    tasks: tuple[str, ...] = ("number", "word", "fact", "passkey", "chain", "multikey2", "multikey3", "kv")
    final_samples: int = 100
    final_lengths: tuple[int, ...] = (4096, 16384, 32768)
    shapes: tuple[str, ...] = ("one_turn", "two_turns", "conversation")  # at the first of final_lengths


@dataclass(frozen=True)
class Run:
    """How the run is carried out; none of it changes the mathematics."""

    seed: int = 1
    micro_tokens: int = 65536  # tokens of one forward and backward pass; the one compiled shape
    workers: int = 14
    slots: int = 48  # batches made ahead
    attention: str = "cudnn"
    compile: str = "default"  # off | default | max-autotune-no-cudagraphs
    log_seconds: float = 10.0
    checkpoint_seconds: float = 120.0


@dataclass(frozen=True)
class Recipe:
    stages: tuple[Stage, ...]
    model: ModelConfig = field(default_factory=ModelConfig)
    optimiser: Optimiser = field(default_factory=Optimiser)
    validation: Validation = field(default_factory=Validation)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage.tokens_per_step % self.run.micro_tokens or self.run.micro_tokens % stage.length:
                raise ConfigError(
                    f"stage of length {stage.length}: length must divide micro_tokens {self.run.micro_tokens}, "
                    f"which must divide tokens_per_step {stage.tokens_per_step}"
                )

    def check_team(self, size: int) -> None:
        """Raise a ConfigError where `size` processes cannot share every batch evenly."""
        for stage in self.stages:
            if stage.tokens_per_step % (self.run.micro_tokens * size):
                raise ConfigError(
                    f"stage of length {stage.length}: {size} processes cannot share {stage.tokens_per_step} tokens a "
                    f"step in passes of {self.run.micro_tokens}; make tokens_per_step a multiple of both together"
                )

    def fraction(self, stage: int, done: float) -> float:
        """The share of the whole run that is over: all stages before `stage`, and `done` (seconds or steps) of it."""
        total = sum(s.planned for s in self.stages)
        past = sum(s.planned for s in self.stages[:stage])
        return (past + min(done, self.stages[stage].planned)) / total


def _make(kind: type, values: dict[str, Any]) -> Any:
    names = [f.name for f in dataclasses.fields(kind)]
    for name in values:
        if name not in names:
            raise unknown(f"key of [{kind.__name__.lower()}]", name, names)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe; overrides are "optimiser.muon_lr=4e-3" or "stages.0.seconds=15"."""
    tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    for override in overrides or []:
        dotted, _, text = override.partition("=")
        *folders, last = dotted.split(".")
        node: Any = tree
        for name in folders:
            node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
        node[last] = tomllib.loads(f"value = {text}")["value"]
    return recipe_from(tree)


def recipe_from(tree: dict[str, Any]) -> Recipe:
    """A recipe from the dictionary that TOML gives."""
    kinds = {"model": ModelConfig, "optimiser": Optimiser, "validation": Validation, "run": Run}
    parts = {name: _make(kinds[name], values) for name, values in tree.items() if name in kinds}
    for name in tree:
        if name not in kinds and name != "stages":
            raise unknown("table of the recipe", name, [*kinds, "stages"])
    return Recipe(stages=tuple(_make(Stage, values) for values in tree["stages"]), **parts)
