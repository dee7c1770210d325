"""Where records come from: files of JSON lines, JSON arrays, Hugging Face data sets, memory.

Files are never held in memory: one byte offset a record is kept, and a record is read when it is asked for.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from locret.data.forms import FORMS, parse_record
from locret.data.sample import RecordError, Sample
from locret.errors import ConfigError, DataError

HUB = "hf:"
_BLOCK = 1 << 22
Source = str | Path | Sample | Mapping[str, Any]


class Records(Protocol):
    """Records of one source, by index."""

    name: str
    digest: bytes  # changes with the data

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[object, str]:
        """The record and its name, which starts every message about it."""
        ...


class Samples:
    """Samples of one or more sources, by index.

    Args:
        sources: one or more of: a path of JSON lines or of one JSON array; "hf:ID", "hf:ID:SPLIT" or the folder of a
            saved data set (needs the package `datasets`); `Sample`s and dictionaries in the forms of forms.py.
        tokenizer: may be None where every sample is given as ids.
        question_first: see `parse_record`.
    Raises: DataError: a source that cannot be opened. `samples[i]` raises RecordError for one bad record.
    """

    def __init__(
        self, sources: str | Path | Iterable[Source], tokenizer: PreTrainedTokenizerBase | None, *,
        question_first: bool = False,
    ) -> None:  # fmt: skip
        self.tokenizer, self.question_first = tokenizer, question_first
        self._sources: list[Records] = []
        self._memory: list[Sample | Mapping[str, Any]] = []
        digest = hashlib.sha256()
        for source in [sources] if isinstance(sources, str | Path) else sources:
            if isinstance(source, str | Path):
                self._sources.append(open_source(source))
                digest.update(self._sources[-1].digest)
            else:
                self._memory.append(source)
                digest.update(_memory_digest(source))
        self.names = [source.name for source in self._sources] + (["memory"] if self._memory else [])
        self.digest = digest.hexdigest()  # a resumed run must see the same data
        if not len(self):
            raise DataError(
                f"no samples in {', '.join(self.names) or 'an empty list'}; give one JSON object a line: {FORMS}"
            )

    def __len__(self) -> int:
        return sum(len(source) for source in self._sources) + len(self._memory)

    def __getitem__(self, index: int) -> Sample:
        """Read and tokenize one sample. Raises: RecordError naming the file and the line."""
        for source in self._sources:
            if index < len(source):
                record, name = source.read(index)
                return parse_record(record, self.tokenizer, name, question_first=self.question_first)
            index -= len(source)
        item = self._memory[index]
        if isinstance(item, Sample):
            return item
        return parse_record(item, self.tokenizer, f"sample {index}", question_first=self.question_first)


def open_source(source: str | Path) -> Records:
    """Records of a file, a folder or a Hub id, by what it is."""
    text = str(source)
    if text.startswith(HUB):
        return _HubRows(text.removeprefix(HUB))
    path = Path(source)
    if path.is_dir():
        return _HubRows(text)
    return _Array(path) if _starts_an_array(path) else _Lines(path)


def _memory_digest(source: object) -> bytes:
    extra = repr((source.turns, source.gold)) if isinstance(source, Sample) and (source.turns or source.gold) else ""
    return (repr(source) + extra).encode()


# ---------------------------------------------------------------------- JSON lines


class _Lines:
    """The lines of a file that are not blank: a byte offset and a line number each."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self._offsets, self._numbers = array("q"), array("q")
        digest, offset = hashlib.sha256(), 0
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._offsets.append(offset)
                        self._numbers.append(number)
                    offset += len(line)
                    digest.update(line)
                self.digest = digest.digest()
        except OSError as error:
            raise _unreadable(path, error) from error

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> tuple[object, str]:
        name = f"{self.path}:{self._numbers[index]}"
        with open(self.path, "rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        return _json(line, name), name


# ---------------------------------------------------------------------- one JSON array

# a string (its closing quote missing at the end of a block), or a bracket outside strings
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*("?)|[{}\[\]]', re.DOTALL)


class _Array:
    """The items of a file that is one JSON array (LongAlpaca, ShareGPT): two byte offsets each."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self._starts, self._stops = array("q"), array("q")
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                depth = self._index(_brackets(file, digest))
        except OSError as error:
            raise _unreadable(path, error) from error
        if depth != 0:
            raise DataError(
                f"{path}: the JSON array does not end ({len(self._stops)} whole items); download the file again"
            )
        self.digest = digest.digest()

    def _index(self, brackets: Iterable[tuple[int, bytes]]) -> int:
        depth = 0
        for offset, token in brackets:
            if token in b"{[":
                depth += 1
                if depth == 2:
                    self._starts.append(offset)
            else:
                depth -= 1
                if depth == 1:
                    self._stops.append(offset + 1)
        return depth

    def __len__(self) -> int:
        return len(self._stops)

    def read(self, index: int) -> tuple[object, str]:
        name = f"{self.path}[{index}]"
        with open(self.path, "rb") as file:
            file.seek(self._starts[index])
            return _json(file.read(self._stops[index] - self._starts[index]), name), name


def _brackets(file: Any, digest: Any) -> Iterator[tuple[int, bytes]]:
    """(offset, bracket) for every bracket outside strings, a block at a time."""
    rest, base = b"", 0
    while block := file.read(_BLOCK):
        digest.update(block)
        text, end = rest + block, len(rest) + len(block)
        for match in _TOKEN.finditer(text):
            token = match[0]
            if token[:1] != b'"':
                yield base + match.start(), token
            elif not match[1]:  # the string goes on in the next block
                end = match.start()
                break
        rest, base = text[end:], base + end


def _starts_an_array(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except OSError as error:
        raise _unreadable(path, error) from error


# ---------------------------------------------------------------------- Hugging Face data sets


class _HubRows:
    """Rows of a data set: "user/name", "user/name:split" (default train), or a folder that `save_to_disk` wrote."""

    def __init__(self, text: str) -> None:
        self.name = text
        datasets = _datasets(text)
        path, split = (text, "train") if Path(text).is_dir() else (*text.split(":", 1), "train")[:2]
        try:
            if (Path(path) / "state.json").is_file():
                self._rows = datasets.load_from_disk(path)
            else:
                self._rows = datasets.load_dataset(path, split=split)
        except Exception as error:  # the package raises its own, its HTTP library's and OS errors
            first = (str(error).splitlines() or [""])[0].rstrip(".")
            raise DataError(
                f"data set {path!r}, split {split!r}, cannot be loaded: {type(error).__name__}: "
                f"{first}. Check the spelling, the split (hf:ID:SPLIT) and the network"
            ) from error
        mark = getattr(self._rows, "_fingerprint", "")
        self.digest = hashlib.sha256(f"{path}:{split}:{len(self._rows)}:{mark}".encode()).digest()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> tuple[object, str]:
        return self._rows[index], f"{self.name}[{index}]"


def _datasets(text: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        if Path(text).is_dir():
            raise ConfigError(
                f"{text!r} is a folder; give a file of JSON lines or of one JSON array, or the folder of a saved data "
                "set, whose package is not installed: pip install datasets"
            ) from error
        raise ConfigError(
            f"{text!r} is a Hugging Face data set, and the package that reads them is not installed: "
            "pip install datasets, or give a file of JSON lines"
        ) from error


# ---------------------------------------------------------------------- bytes


def _json(raw: bytes, name: str) -> object:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecordError(
            "not UTF-8",
            f"{name}: byte {error.object[error.start]:#04x} at column {error.start + 1} is not UTF-8; "
            "convert the file, for example: iconv -f latin1 -t utf-8",
        ) from error
    except ValueError as error:
        raise RecordError("not JSON", f"{name}: not a JSON object on one line: {error}") from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}; give files of JSON lines")
