"""`locret compress`: read a document once, keep what the budget allows, save it for `locret ask --context`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from locret.cli.options import FileOption, ModelOptions, OutputOptions, with_options
from locret.cli.output import bytes_text, emit, say
from locret.cli.session import open_context, open_llm
from locret.errors import ConfigError


@with_options
def compress(
    model: ModelOptions,
    output: OutputOptions,
    file: FileOption = None,
    destination: Annotated[Path | None, Option("--output", help="Where the context is written.")] = None,
) -> None:
    """Compress a document into a saved context."""
    if destination is None:
        raise ConfigError("nowhere to save the context; add --output report.ctx")
    opened = open_context(open_llm(model), file=file, context=None)
    opened.context.save(destination)
    info = opened.to_dict()
    if output.json:
        emit({"output": str(destination), "file_bytes": destination.stat().st_size, **info})
    else:
        say(
            f"{destination}: {info['prompt_tokens']:,} tokens in {bytes_text(info['kv_bytes'])} of KV cache "
            f"(full: {bytes_text(info['kv_bytes_full'])}), read in {info['prefill_seconds']:.1f} s"
        )
