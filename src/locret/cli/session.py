"""What the verbs that answer have in common: a loaded model, a compressed document, an output as JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locret.cli.options import ModelOptions
from locret.cli.output import bytes_text, note, progress
from locret.documents import read_document
from locret.errors import ConfigError

if TYPE_CHECKING:
    from locret.engine import LLM, Context, Output


def open_llm(options: ModelOptions, **overrides: Any) -> LLM:
    """`locret.load` with the flags that were given; `overrides` are options that the verb decides."""
    import locret  # torch and transformers take seconds: not for --help, nor for a wrong flag

    quiet_transformers()
    return locret.load(options.model, **{**options.load_options(), **overrides})


def open_context(llm: LLM, *, file: Path | None, context: Path | None) -> Context:
    """A document, compressed now (`file`) or loaded as it was saved (`context`)."""
    if (file is None) == (context is None):
        raise ConfigError("give a document with --file, or a saved context with --context, and not both")
    if context is not None:
        from locret.engine import Context

        return Context.load(context, llm)
    assert file is not None
    document = read_document(file)
    with progress("compressing") as report:
        return llm.compress(document, on_progress=report)


def as_json(output: Output) -> dict[str, Any]:
    """One flat object: text, finish_reason and every field of the stats."""
    return {"text": output.text, "finish_reason": output.finish_reason, **dataclasses.asdict(output.stats)}


def note_stats(output: Output) -> None:
    """One line on stderr: tokens, bytes beside the full cache's, seconds."""
    s = output.stats
    note(
        f"[{s.method}, budget {s.budget}] {s.prompt_tokens:,} + {s.new_tokens:,} tokens; KV cache "
        f"{bytes_text(s.kv_bytes)} (peak {bytes_text(s.peak_kv_bytes)}, full {bytes_text(s.kv_bytes_full)}); "
        f"prefill {s.prefill_seconds:.1f} s, decode {s.decode_seconds:.1f} s"
    )


def quiet_transformers() -> None:
    """No bars and no advice from transformers between our own lines; its errors still raise."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def context_json(context: Context) -> dict[str, Any]:
    """What a compressed document took: tokens, bytes, seconds."""
    stats = dataclasses.asdict(context.stats)
    names = ("prompt_tokens", "method", "budget", "kv_bytes", "peak_kv_bytes", "kv_bytes_full", "prefill_seconds")
    return {name: stats[name] for name in names}
