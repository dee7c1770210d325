"""`locret heads`: what a set of retaining heads is, other layouts of it, and whether it still fits a changed model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from locret.cli.options import OutputOptions, with_options
from locret.cli.output import bytes_text, emit, say, table
from locret.cli.session import quiet_transformers
from locret.errors import ConfigError, unknown

if TYPE_CHECKING:
    from locret.heads import RetainingHeads

app = typer.Typer(name="heads", help="Look at, convert and check retaining heads.", no_args_is_help=True)
LAYOUTS = ("locret", "published")
_CHOICES = ("input", "label", "objective", "query_aware", "hidden_size", "activation", "num_layers", "num_kv_heads")
_HEADS = Argument(help="Folder or Hugging Face id of the heads.")


@app.command("info")
@with_options
def info(
    output: OutputOptions,
    heads: Annotated[str, _HEADS],
) -> None:
    """Say what they read and predict, which model they are for and how they were trained."""
    from locret.heads import RetainingHeads

    found = RetainingHeads.from_pretrained(heads)
    values = _describe(found)
    if output.json:
        emit(values)
        return
    rows = [(name, str(value)) for name, value in values.items() if name not in ("backbone", "training")]
    rows += [(f"backbone {name}", str(value)) for name, value in found.config.backbone.items()]
    rows += [(f"training {name}", str(value)) for name, value in _training_lines(found.config.training)]
    table(("", ""), rows)


@app.command("convert")
@with_options
def convert(
    output: OutputOptions,
    source: Annotated[str, Argument(help="Our folder or Hub id, or published heads (.bin, .safetensors, Hub id).")],
    destination: Annotated[
        Path | None, Option("--output", help="Folder; with --to published a .safetensors file.")
    ] = None,
    model: Annotated[
        str | None, Option("--model", help="The model that published heads are for: their files do not say.")
    ] = None,
    dtype: Annotated[str | None, Option("--dtype", help="float32, bfloat16 or float16 (default: as it is).")] = None,
    to: Annotated[str, Option("--to", help="locret, or published: the keys of the Locret release.")] = "locret",
) -> None:
    """Import published heads, export ours in that layout, or change the dtype."""
    if destination is None:
        raise ConfigError("nowhere to write; add --output FOLDER")
    if to not in LAYOUTS:
        raise unknown("layout", to, LAYOUTS)
    heads = _read(source, model)
    kind = _dtype(dtype)
    if to == "published":
        heads.save_published(destination, dtype=kind)
    else:
        heads.save_pretrained(destination, dtype=kind)
    if output.json:
        emit({"output": str(destination), "layout": to, **_describe(heads)})
    else:
        say(f"{heads.config.num_layers} layers, {bytes_text(heads.num_bytes)} read, written to {destination} ({to})")


@app.command("merge-check")
@with_options
def merge_check(
    output: OutputOptions,
    heads: Annotated[str, _HEADS],
    model: Annotated[str | None, Option("--model", help="The changed model: fine-tuned, or with LoRA merged.")] = None,
    data: Annotated[list[str] | None, Option("--data", help="Samples as `locret train` reads them.")] = None,
    samples: Annotated[int, Option("--samples", min=1, help="How many of them to measure on.")] = 16,
    max_length: Annotated[int, Option("--max-length", min=1, help="Longest prompt, in tokens.")] = 10_240,
    device: Annotated[str, Option("--device", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, Option("--dtype", help="Of the model: auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Check that heads fit a model that changed after they were trained, and measure how well they still do."""
    if model is None:
        raise ConfigError("no model to check against; add --model FOLDER")
    from locret.backbone import Backbone
    from locret.heads import RetainingHeads

    quiet_transformers()
    backbone = Backbone.load(model, device=device, dtype=dtype)
    found = RetainingHeads.from_pretrained(heads)
    found.check(backbone)
    values: dict[str, Any] = {"fits": True, "overlap_in_training": found.config.training.get("overlap")}
    if data:
        values |= _measure(backbone, found, data, samples, max_length)
    if output.json:
        emit(values)
        return
    say("the shapes fit")
    if data:
        before = values["overlap_in_training"]
        trained = "" if before is None else f", {before:.3f} when they were trained"
        say(f"top-10% overlap on {values['samples']} samples: {values['overlap']:.3f} (chance 0.100{trained})")
    else:
        say("add --data to measure how well they find what answers need")


def _measure(backbone: Any, heads: RetainingHeads, data: list[str], count: int, max_length: int) -> dict[str, Any]:
    from locret.backbone import model_length
    from locret.data import Samples, check_samples, shuffled
    from locret.train import LabelPass, evaluate

    samples = Samples(data, backbone.tokenizer, question_first=heads.config.query_aware)
    report = check_samples(
        samples, max_length=max_length, vocab_size=backbone.model.get_input_embeddings().weight.shape[0],
        window=model_length(backbone.model),
    )  # fmt: skip
    chosen = [i for i in shuffled(len(samples), 0, 0) if report.kept(i)][:count]
    layers = [i for i, spec in enumerate(backbone.layers) if spec.window is None]
    run = LabelPass(backbone, layers, label=heads.config.label, wants_hidden=heads.wants_hidden, max_length=max_length)
    found = evaluate(heads.to_layers(backbone), run, [samples[i] for i in chosen], (0.05, 0.1, 0.2))
    return {
        "samples": len(chosen), "dropped": report.summary(), "overlap": found.overlap,
        "overlap_at": {str(share): value for share, value in found.overlap_at.items()},
        "retention_at": {str(share): value for share, value in found.retention_at.items()},
    }  # fmt: skip


def _read(source: str, model: str | None) -> RetainingHeads:
    from locret.heads import CONFIG_FILE, RetainingHeads

    if model is None:
        if Path(source).is_file() or (Path(source).is_dir() and not (Path(source) / CONFIG_FILE).is_file()):
            raise ConfigError(f"{source} does not say which model its heads are for; add --model")
        return RetainingHeads.from_pretrained(source)
    from locret.backbone import Backbone

    quiet_transformers()
    return RetainingHeads.from_published(source, Backbone.load(model, device="cpu"))


def _dtype(name: str | None) -> Any:
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in names:
        raise unknown("dtype", name, names)
    return None if name is None else names[name]


def _describe(heads: RetainingHeads) -> dict[str, Any]:
    config = heads.config
    return {
        **{name: getattr(config, name) for name in _CHOICES},
        "dtype": str(next(heads.parameters()).dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in heads.parameters()),
        "bytes": heads.num_bytes,
        "backbone": config.backbone,
        "training": config.training,
    }


def _training_lines(training: dict[str, Any]) -> list[tuple[str, Any]]:
    options = training.get("config")
    lines = [(name, value) for name, value in training.items() if name != "config"]
    return lines + (list(options.items()) if isinstance(options, dict) else [])
