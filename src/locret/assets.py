"""Compressed contexts as assets: a folder of saved ones, each found again by what it follows from.

The name of a file is a hash of everything that decides what a context holds: the document's token ids, which of them
are protected, the model and its weights, the heads, the method and its options, the cache options and the dtype. Equal
name, equal context, so reading a document a second time is loading a file.

A file is written beside its name and renamed (`files`): readers see a whole one or none, and writers of the same
context replace it by its equal, without locks. A file that is damaged, or that is not of its name's document, counts as
none and is written anew. Files are mapped into memory by safetensors, so that loading needs no second copy of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from locret.context import Context, encode_document, model_digest, weights_digest
from locret.errors import ConfigError, ContextError
from locret.methods import Method
from locret.prefill import Progress

if TYPE_CHECKING:
    from locret.engine import LLM, Prompt

_SUFFIX = ".ctx"
_VERSION = 2  # of what the hash is over


@dataclass(frozen=True)
class Asset:
    """A context, its file, and whether it was there already."""

    context: Context
    path: Path
    found: bool


@dataclass(frozen=True)
class Entry:
    """A line of `ContextStore.entries`; read from the file's header, so `damaged` misses flipped bits in the units."""

    path: Path
    file_bytes: int
    damaged: bool
    tokens: int = 0
    budget: int | None = None
    method: str = ""
    storage: str = ""


class ContextStore:
    """A folder of contexts; it is made when the first one is saved."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is a file; a store of contexts is a folder")

    def compress(
        self, llm: LLM, document: Prompt, *, protect: Sequence[str] = (), on_progress: Progress | None = None
    ) -> Asset:
        """The context of a document: loaded if it is here, otherwise read and saved."""
        ids, mask = encode_document(llm, document, protect)
        path = self.folder / f"{context_key(llm, ids, mask, kind=_kind(document))}{_SUFFIX}"
        known = _load(path, llm, ids)
        if known is not None:
            return Asset(known, path, found=True)
        context = Context.compress(llm, document, protect=protect, on_progress=on_progress)
        context.save(path)
        return Asset(context, path, found=False)

    def entries(self) -> list[Entry]:
        """All contexts of the folder, newest first.

        Raises: ConfigError: there is no such folder.
        """
        if not self.folder.is_dir():
            raise ConfigError(f"there is no folder {self.folder}; `locret compress --store {self.folder}` makes one")
        files = [(path, path.stat()) for path in self.folder.glob(f"*{_SUFFIX}") if path.is_file()]
        files.sort(key=lambda pair: (-pair[1].st_mtime, pair[0].name))
        return [_entry(path, stat.st_size) for path, stat in files]


def context_key(llm: LLM, ids: list[int], protected: Tensor | None, *, kind: str) -> str:
    """40 hex digits.

    Args:
        kind: "text", "messages" or "ids": what may follow a document depends on it.
    """
    marked = [] if protected is None else protected.nonzero().flatten().tolist()
    parts = {
        "version": _VERSION,
        "document": hashlib.sha256(torch.tensor(ids, dtype=torch.int64).numpy().tobytes()).hexdigest(),
        "kind": kind,
        "protected": marked,
        "fingerprint": llm.backbone.fingerprint(),
        "weights": model_digest(llm),
        "dtype": str(llm.backbone.dtype),
        "method": _describe(llm.method),
        "cache": dataclasses.asdict(llm.config),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def _describe(value: Any) -> Any:
    """A method's name and options as plain values; weights by their digest."""
    if isinstance(value, nn.Module):
        return weights_digest(value.parameters())
    if isinstance(value, Method):
        options = {f.name: _describe(getattr(value, f.name)) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
        options.pop("path", None)  # the same weights elsewhere are the same weights ...
        return {"name": value.name, **options, "heads": _describe(getattr(value, "heads", None))}  # ... by these
    return value if isinstance(value, str | int | float | None) else repr(value)


def _kind(document: Prompt) -> str:
    if isinstance(document, str):
        return "text"
    return "ids" if document and isinstance(document[0], int) else "messages"


def _load(path: Path, llm: LLM, ids: list[int]) -> Context | None:
    """None: it is not there, or not what its name says."""
    if not path.is_file():
        return None
    try:
        context = Context.load(path, llm)
    except (ContextError, KeyError, TypeError, ValueError):
        return None
    return context if context.ids.tolist() == ids else None


def _entry(path: Path, size: int) -> Entry:
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["locret"])
        plan = state["plan"]
        return Entry(path, size, False, state["seen"], plan["budget"], state["method"], plan["storage"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return Entry(path, size, damaged=True)
