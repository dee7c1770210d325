"""`locret compress`: read a document once and save what the budget keeps; `locret contexts`: what a folder has."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from locret.cli.options import FileOption, ModelOptions, OutputOptions, with_options
from locret.cli.output import bytes_text, emit, progress, say, table
from locret.cli.session import Opened, open_context, open_llm, refuse_folder
from locret.documents import read_document
from locret.errors import ConfigError

if TYPE_CHECKING:
    from locret.engine import LLM


@with_options
def compress(
    model: ModelOptions,
    output: OutputOptions,
    file: FileOption = None,
    destination: Annotated[Path | None, Option("--output", help="Where the context is written.")] = None,
    store: Annotated[
        Path | None, Option("--store", help="Folder of contexts: taken from there, or read and saved there.")
    ] = None,
) -> None:
    """Compress a document into a saved context."""
    if (destination is None) == (store is None):
        raise ConfigError("say where the context goes: a file with --output report.ctx, or a folder with --store DIR")
    if file is None:
        raise ConfigError("there is no document; give one with --file")
    if destination is not None:
        refuse_folder(destination)  # before the document is read
    llm = open_llm(model)
    if store is not None:
        destination, found, opened = _from_store(llm, store, file)
    else:
        assert destination is not None
        found, opened = False, open_context(llm, model, file=file, context=None)
        opened.context.save(destination)
    info: dict[str, Any] = opened.to_dict()
    size = destination.stat().st_size
    if output.json:
        emit({"output": str(destination), "file_bytes": size, "found": found, **info})
    else:
        say(
            f"{destination}: {info['prompt_tokens']:,} tokens in {bytes_text(info['kv_bytes'])} of KV cache "
            f"(full: {bytes_text(info['kv_bytes_full'])}), {bytes_text(size)} on disk, "
            f"{'found again' if found else 'read'} in {info['prefill_seconds']:.1f} s"
        )


@with_options
def contexts(
    output: OutputOptions,
    folder: Annotated[Path, Argument(metavar="DIR", help="Written by `locret compress --store DIR`.")],
) -> None:
    """List the saved contexts of a folder."""
    from locret.assets import ContextStore

    entries = ContextStore(folder).entries()
    if output.json:
        emit([{**vars(entry), "path": str(entry.path)} for entry in entries])
        return
    table(
        ("file", "tokens", "budget", "method", "storage", "on disk", ""),
        [
            (e.path.name, f"{e.tokens:,}", f"{e.budget or 'full'}", e.method, e.storage, bytes_text(e.file_bytes),
             "damaged" if e.damaged else "")
            for e in entries
        ],
    )  # fmt: skip
    say(f"{len(entries)} contexts, {bytes_text(sum(e.file_bytes for e in entries))}")


def _from_store(llm: LLM, store: Path, file: Path) -> tuple[Path, bool, Opened]:
    from locret.assets import ContextStore

    document, started = read_document(file), time.perf_counter()
    with progress("reading") as report:
        asset = ContextStore(store).compress(llm, document, on_progress=report)
    return asset.path, asset.found, Opened(asset.context, time.perf_counter() - started)
