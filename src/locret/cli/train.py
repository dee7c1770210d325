"""`locret train`: retaining heads for a model, from question-and-answer samples."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from locret.cli.loading import load_backbone
from locret.cli.options import OutputOptions, with_options
from locret.cli.output import emit, note, progress, say
from locret.cli.session import quiet_transformers
from locret.config import toml_value
from locret.errors import ConfigError, unknown

if TYPE_CHECKING:
    from locret.train import TrainProgress, TrainResult

_RECIPE_KEYS = ("model", "data", "output", "device", "dtype", "quantize", "device_map", "parallel")


@with_options
def train(
    output: OutputOptions,
    data: Annotated[
        list[str] | None,
        Option("--data", help="JSON lines, a JSON array, hf:ID or hf:ID:SPLIT; may be repeated."),
    ] = None,
    destination: Annotated[
        Path | None, Option("--output", help="Folder for the heads, the log and checkpoints.")
    ] = None,
    model: Annotated[
        str | None, Option("--model", help="Folder or Hugging Face id. (default: the embedded model)")
    ] = None,
    recipe: Annotated[
        Path | None, Option("--recipe", help="TOML: model, data, output and a table [train]; flags win over it.")
    ] = None,
    steps: Annotated[int | None, Option("--steps", help="Optimizer steps.")] = None,
    accumulate: Annotated[
        int | None, Option("--accumulate", help="Samples a step, over all processes; at least their number.")
    ] = None,
    lr: Annotated[float | None, Option("--lr", help="Peak learning rate.")] = None,
    d_r: Annotated[int | None, Option("--d-r", help="Hidden width of a head.")] = None,
    max_length: Annotated[int | None, Option("--max-length", help="Longest prompt, in tokens.")] = None,
    objective: Annotated[
        str | None, Option("--objective", help="paper, log-mass, log-value, ranking or top-k (default: paper).")
    ] = None,
    reads: Annotated[str | None, Option("--input", help="What heads read: qkv or hidden (default: qkv).")] = None,
    answers: Annotated[
        str | None, Option("--answers", help="data, or model: the model's own greedy answers (default: data).")
    ] = None,
    evict_budget: Annotated[
        float | None,
        Option("--evict-budget", help="Learn with eviction on: units, or a share of the prompt (0.05)."),
    ] = None,
    seed: Annotated[int | None, Option("--seed", help="First weights, held-out split, order of samples.")] = None,
    log_to: Annotated[list[str] | None, Option("--log", help="Also tensorboard or wandb; may be repeated.")] = None,
    further: Annotated[
        list[str] | None, Option("--set", help="Any other option of [train], NAME=VALUE; may be repeated.")
    ] = None,
    resume: Annotated[bool, Option("--resume/--no-resume", help="Go on from the checkpoint in --output.")] = True,
    device: Annotated[str | None, Option("--device", help="auto, cpu, cuda, cuda:1, ... (default: auto)")] = None,
    dtype: Annotated[
        str | None, Option("--dtype", help="Of the backbone: auto, float32, bfloat16 or float16 (default: auto).")
    ] = None,
    quantize: Annotated[
        str | None,
        Option(
            "--quantize", help="Load the backbone as bnb-4bit or -8bit, torchao-int8 or -int4, quanto-int8 or -int4."
        ),
    ] = None,
    device_map: Annotated[
        str | None, Option("--device-map", help="Spread the backbone over GPUs: auto, balanced, sequential.")
    ] = None,
    parallel: Annotated[
        str | None,
        Option("--parallel", help="Processes of torchrun: data (a model each), tensor or fsdp (default: data)."),
    ] = None,
) -> None:
    """Train retaining heads; stop it whenever you like, the same command goes on where it was."""
    given = {
        "steps": steps, "accumulate": accumulate, "lr": lr, "hidden_size": d_r, "max_length": max_length,
        "objective": objective, "input": reads, "answers": answers, "evict_budget": evict_budget, "seed": seed,
        "log_to": log_to or None, **_further(further or []),
    }  # fmt: skip
    flags = {
        "model": model, "data": data or None, "output": destination, "device": device, "dtype": dtype,
        "quantize": quantize, "device_map": device_map, "parallel": parallel,
    }  # fmt: skip
    named = _recipe(recipe) if recipe else {}
    run = {**named, **{name: value for name, value in flags.items() if value is not None}}
    if not run.get("data"):
        raise ConfigError("no training data; add --data samples.jsonl (messages, ShareGPT, or prompt and answer)")
    if run.get("output") is None:
        raise ConfigError("nowhere to save the heads; add --output heads/")
    _train(run, recipe, given, resume=resume, as_json=output.json)


def _train(run: dict[str, Any], recipe: Path | None, given: dict[str, Any], *, resume: bool, as_json: bool) -> None:
    from locret import train as trainer
    from locret.parallel import leave
    from locret.train.distributed import Group

    given = {name: value for name, value in given.items() if value is not None}
    config = trainer.TrainConfig.from_toml(recipe, **given) if recipe else trainer.TrainConfig.from_dict(given)
    quiet_transformers()
    backbone = load_backbone(run)
    sources = [run["data"]] if isinstance(run["data"], str) else run["data"]
    main = Group.current().is_main
    with _progress(main) as (report, checked):
        result = trainer.train(
            backbone, sources, run["output"], config, on_progress=report, on_check=checked, resume=resume
        )
    leave()
    if as_json and main:
        emit(_as_json(result))
    elif main:
        say(result.summary())
        if result.finished:
            of_model = f" --model {run['model']}" if run.get("model") else ""
            say(f"use them: locret generate{of_model} --heads {run['output']} --file report.txt --question ...")
    if not result.finished:
        raise typer.Exit(130)


def _recipe(path: Path) -> dict[str, Any]:
    """The keys beside [train]; none where the file is the table itself."""
    from locret.train.options import read_recipe

    values = read_recipe(path)
    if "train" not in values:
        return {}
    keys = {name: value for name, value in values.items() if name != "train"}
    for name in keys:
        if name not in _RECIPE_KEYS:
            raise unknown("key of the recipe", name, [*_RECIPE_KEYS, "train"])
    return keys


def _further(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE, the value as TOML has it; what is no TOML value is text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair!r}: write NAME=VALUE, for example --set warmup_steps=300")
        found[name.strip()] = toml_value(text)
    return found


def _as_json(result: TrainResult) -> dict[str, Any]:
    names = (
        "step", "steps", "skipped", "dropped", "loss", "overlap", "overlap_per_head", "seconds", "stopped", "finished",
    )  # fmt: skip
    return {"output": str(result.output), **{name: getattr(result, name) for name in names}}


@contextlib.contextmanager
def _progress(main: bool) -> Iterator[tuple[Callable[[TrainProgress], None], Callable[[int, int], object]]]:
    """on_progress and on_check: the trainer's bar in a terminal, a line now and then elsewhere, else nothing."""
    from rich.console import Console

    from locret.train import progress_bar

    if not main:
        yield lambda p: None, lambda done, total: None
    elif sys.stderr.isatty():
        with progress_bar(Console(stderr=True)) as bar:
            yield bar, bar.checked
    else:
        with progress("training", unit="steps") as line, progress("checking", unit="samples") as checked:

            def tell(p: TrainProgress) -> None:
                line(p.step, p.steps)
                if p.warning:
                    note(p.warning)

            yield tell, checked
