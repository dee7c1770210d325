"""What the verbs that answer have in common: a loaded model, an opened context, a line of statistics."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locret.cli.options import ModelOptions, flag_of
from locret.cli.output import bytes_text, note, progress
from locret.documents import read_document
from locret.errors import ConfigError, ContextError

if TYPE_CHECKING:
    from locret.context import Context
    from locret.decode import Output
    from locret.engine import LLM


def open_llm(options: ModelOptions, **overrides: Any) -> LLM:
    """`locret.load` with the flags that were given; `overrides` are options that the verb decides."""
    import locret  # torch and transformers take seconds: not for --help, nor for a wrong flag

    quiet_transformers()
    chosen = {**options.load_options(), **overrides}
    if options.method_option:
        from locret.methods import parse_options

        chosen["method_options"] = parse_options(chosen.get("method", "locret"), options.method_option)
    return locret.load(options.model, **chosen)


@dataclass(frozen=True)
class Opened:
    """A context and what it took to get it."""

    context: Context
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Tokens, bytes and seconds, under the names that an output uses."""
        from locret.decode import full_cache_bytes

        context = self.context
        return {
            "prompt_tokens": context.seen,
            "method": context.llm.method.name,
            "budget": context.plan.budget,
            "chunk_size": context.plan.chunk_size,
            "held": context.held,
            "kv_bytes": context.kv_bytes,
            "peak_kv_bytes": context.peak_kv_bytes,
            "kv_bytes_full": full_cache_bytes(context.llm.backbone, context.seen),
            "prefill_seconds": self.seconds,
        }


def open_context(llm: LLM, options: ModelOptions, *, file: Path | None, context: Path | None) -> Opened:
    """A document, compressed now (`file`) or loaded as it was saved (`context`).

    Raises: ConfigError: both or none of them, or a flag of `options` that the saved context does not follow.
    """
    if (file is None) == (context is None):
        raise ConfigError("give a document with --file, or a saved context with --context, and not both")
    if file is not None:
        return compress_text(llm, read_document(file))
    assert context is not None
    if context.is_dir():
        raise ContextError(
            f"{context} is a folder; --context wants one saved context, a file that `locret compress` wrote "
            f"(`locret contexts {context}` lists those of a store)"
        )
    from locret.context import Context

    started = time.perf_counter()
    loaded = Context.load(context, llm)
    _check_flags(context, loaded, options)
    return Opened(loaded, time.perf_counter() - started)


def _check_flags(path: Path, context: Context, options: ModelOptions) -> None:
    """A saved context goes on with its own plan; a flag that says otherwise must not be ignored."""
    config, plan = context.llm.config, context.plan
    names = ["chunk_size", "positions", "storage"]
    if plan.budget is not None:  # a method that keeps everything has no use for these
        names += ["budget", "num_stabilizers", "local_window", "num_sinks"]
    given = options.load_options()
    for name in [name for name in names if name in given]:
        wanted = _budget(context) if name == "budget" else getattr(config, name)
        if wanted != getattr(plan, name):
            raise ConfigError(
                f"{path} was saved with {flag_of(name)} {getattr(plan, name)}, and {flag_of(name)} {given[name]} is "
                "asked for; leave the flag out, or compress the document again with it"
            )


def _budget(context: Context) -> int | None:
    """Units that the configured budget gives for as many tokens as the context has read."""
    from locret.config import parse_budget
    from locret.prefill import Reader

    llm = context.llm
    number, kind = parse_budget(llm.config.budget)
    if kind == "units":
        return int(number)
    return Reader.start(llm.backbone, llm.method, llm.config, batch=1, prompt_len=context.seen).plan.budget


def compress_text(llm: LLM, document: str) -> Opened:
    """`LLM.compress` under a progress bar, timed."""
    started = time.perf_counter()
    with progress("reading") as report:
        context = llm.compress(document, on_progress=report)
    return Opened(context, time.perf_counter() - started)


def refuse_folder(path: Path) -> None:
    """Raises: ContextError: a context cannot be saved at `path`, as a folder is there."""
    if os.path.isdir(path):  # False, where `Path.is_dir` raises: a name that is too long
        raise ContextError(f"{path} is a folder; a context is saved to a file, for example {path / 'report.ctx'}")


def beside(context: Context, output: Output) -> Output:
    """An output whose peak counts `context` too, which lives on while a copy of it answers."""
    stats = output.stats
    both = dataclasses.replace(stats, peak_kv_bytes=stats.peak_kv_bytes + context.kv_bytes)
    return dataclasses.replace(output, stats=both)


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
