"""`locret train`: retaining heads for a model, from question-and-answer samples."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from locret.cli.options import OutputOptions, with_options
from locret.cli.output import emit, progress, say
from locret.cli.session import quiet_transformers
from locret.errors import ConfigError

if TYPE_CHECKING:
    from locret.train import TrainProgress, TrainResult


@with_options
def train(
    output: OutputOptions,
    data: Annotated[list[Path] | None, Option("--data", help="JSONL of samples; may be repeated.")] = None,
    destination: Annotated[
        Path | None, Option("--output", help="Folder for the heads, the log and checkpoints.")
    ] = None,
    model: Annotated[
        str | None, Option("--model", help="Folder or Hugging Face id. (default: the embedded model)")
    ] = None,
    recipe: Annotated[Path | None, Option("--recipe", help="TOML with training options; flags win over it.")] = None,
    steps: Annotated[int | None, Option("--steps", help="Optimizer steps.")] = None,
    lr: Annotated[float | None, Option("--lr", help="Peak learning rate.")] = None,
    d_r: Annotated[int | None, Option("--d-r", help="Hidden width of a head.")] = None,
    max_length: Annotated[int | None, Option("--max-length", help="Longest prompt, in tokens.")] = None,
    seed: Annotated[int | None, Option("--seed", help="First weights, held-out split, order of samples.")] = None,
    resume: Annotated[bool, Option("--resume/--no-resume", help="Go on from the checkpoint in --output.")] = True,
    device: Annotated[str, Option("--device", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, Option("--dtype", help="Of the backbone: auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Train retaining heads; stop it whenever you like, the same command goes on where it was."""
    if not data:
        raise ConfigError("no training data; add --data samples.jsonl (messages, ShareGPT, or prompt and answer)")
    if destination is None:
        raise ConfigError("nowhere to save the heads; add --output heads/")
    from locret import train as trainer
    from locret.backbone import Backbone

    flags: dict[str, Any] = {"steps": steps, "lr": lr, "hidden_size": d_r, "max_length": max_length, "seed": seed}
    given = {name: value for name, value in flags.items() if value is not None}
    config = trainer.TrainConfig.from_toml(recipe, **given) if recipe else trainer.TrainConfig.from_dict(given)
    quiet_transformers()
    backbone = Backbone.load(model, device=device, dtype=dtype)
    with _progress() as report:
        result = trainer.train(backbone, data, destination, config, on_progress=report, resume=resume)
    if output.json:
        emit(_as_json(result))
    else:
        say(result.summary())
        if result.finished:
            of_model = f" --model {model}" if model else ""
            say(f"use them: locret generate{of_model} --heads {destination} --file report.txt --question ...")
    if not result.finished:
        raise typer.Exit(130)


def _as_json(result: TrainResult) -> dict[str, Any]:
    names = ("step", "steps", "skipped", "loss", "overlap", "overlap_per_head", "seconds", "stopped", "finished")
    return {"output": str(result.output), **{name: getattr(result, name) for name in names}}


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[TrainProgress], None]]:
    """The trainer's own bar in a terminal; a line now and then elsewhere."""
    from rich.console import Console

    from locret.train import progress_bar

    if sys.stderr.isatty():
        with progress_bar(Console(stderr=True)) as report:
            yield report
        return
    with progress("training", unit="steps") as line:
        yield lambda p: line(p.step, p.steps)
