"""The samples of a run as token ids, made once: by processes ahead of the run if wanted, and kept in files.

A file holds the first n samples of one (task, length, seed) and is named after everything that they depend on: what was
asked for, the tokenizer, and the program text that writes samples. Contexts are kept as ids only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import locret.tasks
from locret.errors import DataError
from locret.evaluate import prompts
from locret.evaluate.grid import Block, Grid
from locret.evaluate.prompts import Ask, Encoder, Prompt
from locret.evaluate.source import Request, Source
from locret.files import atomic_write
from locret.tasks.records import Record, Turn

Progress = Callable[[int, int], object]
# modules of `locret.tasks` that write training samples only, or judge answers
NOT_EVALUATED = frozenset(
    {"base", "build", "families", "metrics", "mixture", "relations", "repoqa", "rouge", "wordings"}
)


class Samples:
    """Samples by block.

    Args:
        folder: where to keep them; None: nowhere. Public sets are always read from their own files.
    """

    def __init__(self, grid: Grid, source: Source, tokenizer: Any, folder: Path | None = None) -> None:
        self.grid, self.source, self.folder = grid, source, folder
        self._tokenizer = tokenizer
        self._encoder = Encoder(tokenizer, max_context=grid.max_context)

    def records(self, block: Block, count: int) -> list[Record]:
        """The first `count` samples as texts. Raises: DataError: there are none."""
        grid = self.grid
        request = Request(
            task=block.task, length=block.length, seed=block.seed, count=count, mode=grid.mode,
            tokenizer=self._tokenizer, answer_prefix=bool(grid.answer_prefix), even_lengths=grid.even_lengths,
            sentence_tokens=grid.sentence_tokens,
            text=grid.text, public=grid.public.get(block.task),
        )  # fmt: skip
        records = list(itertools.islice(self.source.records(request), count))
        if not records:
            where = (request.public or {}).get("path")
            raise DataError(
                f"task {block.task!r} has no samples" + (f"; there are no rows in {where}" if where else "")
            )
        return records

    def first(self, block: Block) -> Record:
        """One sample, for checks."""
        path = self._path(block)
        if path is not None and path.exists():
            with np.load(path) as file:  # reads the arrays that it is asked for
                return _record(json.loads(file["rest"].tobytes())[0]["record"])
        return self.records(block, 1)[0]

    def kept(self, block: Block) -> list[Prompt] | None:
        """The samples of a block if they are in a file."""
        path = self._path(block)
        if path is None or not path.exists():
            return None
        found = _unpack(path.read_bytes())
        return found[: block.samples] if len(found) >= block.samples else None

    def prompts(self, block: Block) -> list[Prompt]:
        """All samples of a block, from the file or made now (and kept)."""
        found = self.kept(block)
        if found is None:
            found = [self._encoder.prompt(record) for record in self.records(block, block.samples)]
            path = self._path(block)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                data = _pack(found)
                atomic_write(path, lambda target: target.write_bytes(data))
        return found

    def _path(self, block: Block) -> Path | None:
        if self.folder is None or block.task in self.grid.public:
            return None
        grid = self.grid
        facts = [
            grid.mode,
            grid.answer_prefix,
            grid.sentence_tokens,
            grid.even_lengths,
            grid.max_context,
            _text_facts(grid.text),
        ]
        key = json.dumps([facts, _tokenizer_facts(self._tokenizer), _program()])
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return self.folder / f"{block.task}-{block.length}-{block.seed}-{digest}.npz"


def prepare(samples: Samples, workers: int, on_progress: Progress | None = None) -> None:
    """Make the files of all blocks of a grid, several at a time."""
    blocks = sorted(samples.grid.blocks(), key=lambda block: -block.length * block.samples)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it deadlocks in forked processes
    with multiprocessing.get_context("fork").Pool(workers, _share, (samples,)) as pool:
        for done, _ in enumerate(pool.imap_unordered(_make, blocks), 1):
            if on_progress is not None:
                on_progress(done, len(blocks))


_SHARED: list[Samples] = []


def _share(samples: Samples) -> None:
    _SHARED[:] = [samples]


def _make(block: Block) -> None:
    _SHARED[0].prompts(block)


def _pack(prompts: list[Prompt]) -> bytes:
    """One .npz: contexts and gold places one behind the other, the rest as JSON.

    LZMA, not numpy's deflate, which looks back 32 KB: samples share long texts, and files are less than half as large.
    """
    rest = []
    for prompt in prompts:
        record = dict(dataclasses.asdict(dataclasses.replace(prompt.record, context="", spans=(), turns=())))
        turns: list[dict[str, Any]] = [{**dataclasses.asdict(turn), "spans": ()} for turn in prompt.record.turns]
        asks = [dataclasses.asdict(ask) for ask in prompt.asks]
        rest.append({"record": record | {"turns": turns}, "asks": asks, "digest": prompt.digest})
    contexts = [prompt.context for prompt in prompts]
    small = all(int(context.max()) < 1 << 16 for context in contexts)
    arrays = {
        "ids": np.concatenate(contexts).astype(np.uint16 if small else np.int32),
        "ends": np.cumsum([len(context) for context in contexts]),
        "gold": np.array([at for prompt in prompts for at in prompt.gold], dtype=np.int32),
        "gold_ends": np.cumsum([len(prompt.gold) for prompt in prompts]),
        "rest": np.frombuffer(json.dumps(rest).encode(), dtype=np.uint8),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)
    return buffer.getvalue()


def _unpack(data: bytes) -> list[Prompt]:
    with np.load(io.BytesIO(data)) as file:
        contexts = np.split(file["ids"].astype(np.int32), file["ends"][:-1])
        golds = np.split(file["gold"], file["gold_ends"][:-1])
        rest = json.loads(file["rest"].tobytes())
    return [_prompt(one, context, gold) for one, context, gold in zip(rest, contexts, golds, strict=True)]


def _prompt(one: dict[str, Any], context: NDArray[np.int32], gold: NDArray[np.int32]) -> Prompt:
    asks = [Ask(**{**ask, "answers": tuple(ask["answers"])}) for ask in one["asks"]]
    return Prompt(_record(one["record"]), context, asks, gold.tolist(), one["digest"])


def _record(fields: dict[str, Any]) -> Record:
    turns = tuple(Turn(**{**turn, "answers": tuple(turn["answers"]), "spans": ()}) for turn in fields["turns"])
    return Record(**{**fields, "answers": tuple(fields["answers"]), "spans": (), "turns": turns})


def _text_facts(text: str | None) -> list[Any]:
    if text is None:
        return []
    path = Path(text)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(file.name, file.stat().st_size) for file in files if file.exists()]


@functools.cache
def _tokenizer_facts(tokenizer: Any) -> str:
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab()))
    return hashlib.sha256(f"{vocabulary}\0{tokenizer.chat_template}".encode()).hexdigest()


@functools.cache
def _program() -> str:
    """A digest of the files that write samples and encode them."""
    found = hashlib.sha256(Path(prompts.__file__).read_bytes())
    for file in sorted(Path(locret.tasks.__file__).parent.glob("*.*")):
        if file.stem not in NOT_EVALUATED:
            found.update(file.read_bytes())
    return found.hexdigest()
