"""`locret train`: retaining heads for a model, from question-and-answer samples."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from locret.cli.options import OutputOptions, with_options
from locret.cli.output import emit, progress, say
from locret.cli.session import quiet_transformers
from locret.errors import ConfigError, DataError


@with_options
def train(
    output: OutputOptions,
    destination: Annotated[Path | None, Option("--output", help="Folder for the heads, the log and snapshots.")] = None,
    data: Annotated[list[Path] | None, Option("--data", help="JSONL of samples; may be repeated.")] = None,
    model: Annotated[
        str | None, Option("--model", help="Folder or Hugging Face id. (default: the embedded model)")
    ] = None,
    recipe: Annotated[Path | None, Option("--recipe", help="TOML with any of the options; flags win over it.")] = None,
    steps: Annotated[int | None, Option("--steps", help="Optimiser steps.")] = None,
    lr: Annotated[float | None, Option("--lr", help="Peak learning rate.")] = None,
    d_r: Annotated[int | None, Option("--d-r", help="Hidden width of a head.")] = None,
    max_length: Annotated[int | None, Option("--max-length", help="Longest prompt, in tokens.")] = None,
    seed: Annotated[int | None, Option("--seed", help="Order of samples and first weights.")] = None,
    resume: Annotated[
        bool, Option("--resume/--no-resume", help="Go on from the last snapshot in --output.")
    ] = True,  # fmt: skip
    device: Annotated[str, Option("--device", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, Option("--dtype", help="Of the backbone: auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Train retaining heads; stop it whenever you like, the same command goes on where it was."""
    given = {"data": data or None, "model": model, "output": destination}
    settings = {"steps": steps, "lr": lr, "d_r": d_r, "max_length": max_length, "seed": seed}
    written = read_recipe(recipe) if recipe else {}
    model = given["model"] or written.pop("model", None)
    files = given["data"] or [Path(name) for name in written.pop("data", [])]
    folder = given["output"] or written.pop("output", None)
    if not files:
        raise ConfigError("no training data; add --data samples.jsonl (messages, ShareGPT, or prompt and answer)")
    if folder is None:
        raise ConfigError("nowhere to save the heads; add --output heads/")
    _run(model, files, Path(folder), {**written, **settings}, resume=resume, device=device, dtype=dtype, output=output)


def read_recipe(path: Path) -> dict[str, Any]:
    """A TOML file; file names in it are relative to it."""
    try:
        options = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a TOML file: {error}") from None
    if "data" in options:
        names = [options["data"]] if isinstance(options["data"], str) else options["data"]
        options["data"] = [str(path.parent / name) for name in names]
    return options


def _run(
    model: str | None,
    files: list[Path],
    folder: Path,
    settings: dict[str, Any],
    *,
    resume: bool,
    device: str,
    dtype: str,
    output: OutputOptions,
) -> None:
    from locret.backbone import Backbone
    from locret.config import strict
    from locret.train import TrainConfig, train_heads

    config = strict(TrainConfig, {name: value for name, value in settings.items() if value is not None})
    quiet_transformers()
    backbone = Backbone.load(model, device=device, dtype=dtype)
    with progress("training", unit="steps") as report:
        result = train_heads(backbone, files, folder, config, resume=resume, on_step=report)
    if output.json:
        emit(result)
    else:
        say(f"{folder}: heads after {config.steps:,} steps; use them with --heads {folder}")
