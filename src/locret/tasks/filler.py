"""Where the text around the facts comes from: a stream of tokens with the places at which a sentence ends.

`CorpusFiller` reads a folder of text once and keeps its token ids in a cache folder, memory-mapped, so that many worker
processes share one copy. `ProseFiller` needs no files: its text is written by `prose.py`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from locret.errors import DataError, unknown
from locret.files import atomic_write
from locret.tasks import prose
from locret.tasks.encode import token_texts
from locret.tasks.words import reserved

SPLITS = ("train", "heldout")
FOREIGN_SHARE = 0.1  # letters outside the Latin script that a document may have
HELDOUT_PERCENT = 3
_ENDS = (".", "!", "?", '."', '!"', '?"', ".)", ".”", "!”", "?”", ".'", ".’")
_NOT_ENDS = ("Mr", "Mrs", "Ms", "Dr", "St", "Prof", "vs", "etc", "No", "Vol", "pp", "cf", "e", "g", "i")
_BATCH = 64
_COMMON = 2000  # ids follow frequency: below it are the words that hold sentences together


class Filler(Protocol):
    """Anything that gives consecutive text."""

    def take(self, rng: random.Random, num_tokens: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Token ids [num_tokens], and the sorted offsets in it at which a sentence has ended (a fact fits there)."""
        ...


class TokenStream:
    """A long array of token ids from which random stretches are cut.

    breaks: bool per token, True where a sentence ended just before it; starts: offsets where a line begins.
    """

    def __init__(self, ids: NDArray[Any], breaks: NDArray[np.bool_], starts: NDArray[np.int64]):
        if not len(ids):
            raise DataError("the filler has no text at all; give it a folder with .jsonl, .jsonl.xz or .txt files")
        self.ids, self.breaks, self.starts = ids, breaks, starts

    def take(self, rng: random.Random, num_tokens: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """A stretch of the stream: it starts at the beginning of a line, and half of them end with a sentence."""
        total = len(self.ids)
        if num_tokens >= total:
            repeats = num_tokens // total + 1
            ids = np.tile(np.asarray(self.ids), repeats)[:num_tokens]
            breaks = np.tile(np.asarray(self.breaks), repeats)[:num_tokens]
        else:
            start = int(self.starts[int(rng.random() * len(self.starts))]) if len(self.starts) else 0
            start = min(start, total - num_tokens)
            if rng.random() < 0.5:
                start = self._end_with_sentence(start, num_tokens)
            ids = self.ids[start : start + num_tokens]
            breaks = self.breaks[start : start + num_tokens]
        return ids.astype(np.int32), np.flatnonzero(breaks)

    def _end_with_sentence(self, start: int, num_tokens: int, reach: int = 96) -> int:
        """Move the stretch on by a few tokens, so that it ends where a sentence ends."""
        end = start + num_tokens
        near = np.flatnonzero(self.breaks[end : end + reach])
        return start + int(near[0]) if len(near) else start


class CorpusFiller(TokenStream):
    """Text files of a folder, tokenised once."""

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        tokenizer: Any,
        split: str = "train",
        limit_mb: float | None = None,
        cache: str | Path | None = None,
    ) -> CorpusFiller:
        """Read *.jsonl.xz, *.jsonl (a "text" per line) and *.txt; about 3 % of the documents, by hash, are "heldout".

        Args:    limit_mb: read only so many MB of text;  cache: folder for the token ids (none: nothing is kept).
        Raises:  DataError: no text found, or a line that is not a JSON object with "text".
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        folder = Path(folder)
        target = None
        if cache is not None:
            target = Path(cache) / f"{_cache_name(folder, tokenizer, split, limit_mb)}.npy"
            if target.exists():
                return cls._of(np.load(target, mmap_mode="r"), tokenizer)
        ids = _tokenise(_documents(folder, split, limit_mb), tokenizer)
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(target, lambda path: _save(path, ids))
            ids = np.load(target, mmap_mode="r")
        return cls._of(ids, tokenizer)

    @classmethod
    def _of(cls, ids: NDArray[Any], tokenizer: Any) -> CorpusFiller:
        return cls(ids, *_landmarks(ids, tokenizer))


class ProseFiller(TokenStream):
    """Prose that `prose.py` writes from a seed: no files, no licence, always the same."""

    @classmethod
    def from_seed(cls, seed: int, tokenizer: Any, num_sentences: int = 12_000) -> ProseFiller:
        """Write `num_sentences` sentences (about 20 tokens each)."""
        rng = random.Random(f"prose:{seed}")
        texts = [prose.document(rng, min(200, num_sentences - at)) for at in range(0, num_sentences, 200)]
        ids = _tokenise(iter(texts), tokenizer)
        return cls(ids, *_landmarks(ids, tokenizer))


class Renamed:
    """A stream in which some words stand for others, the same throughout: text that nobody can have learnt by heart.

    A small corpus is read a hundred times. Then a planted fact is found as the one thing that is new, which in text
    that was never read everything is.
    """

    def __init__(self, filler: Filler, tokenizer: Any, rng: random.Random):
        draw = np.random.default_rng(rng.getrandbits(64))
        size, kinds = _exchangeable(tokenizer)
        self.filler, self.ids = filler, np.arange(size, dtype=np.int32)
        share = draw.uniform(0.1, 0.6)
        for words in kinds:
            moved = words[draw.random(len(words)) < share]
            self.ids[moved] = draw.permutation(moved)

    def take(self, rng: random.Random, num_tokens: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Of the stream below, word by word."""
        ids, breaks = self.filler.take(rng, num_tokens)
        return self.ids[ids], breaks


@functools.lru_cache(maxsize=4)
def _exchangeable(tokenizer: Any) -> tuple[int, list[NDArray[np.int64]]]:
    """The size of the vocabulary, and its words of one token: in small letters, and names.

    Neither the commonest words nor those kept for evaluation.
    """
    kept = {word.lower() for word in reserved()}
    texts = token_texts(tokenizer)
    words = [
        (i, text[1:]) for i, text in enumerate(texts)
        if i >= _COMMON and text[:1] == " " and len(text) > 4 and text.isascii() and text[1:].isalpha()
    ]  # fmt: skip
    words = [(i, word) for i, word in words if word.lower() not in kept]
    return len(texts), [
        np.array([i for i, word in words if alike(word)], np.int64) for alike in (str.islower, str.istitle)
    ]


def _save(path: Path, ids: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, ids)


def _cache_name(folder: Path, tokenizer: Any, split: str, limit_mb: float | None) -> str:
    files = [(path.name, path.stat().st_size) for path in _files(folder)]
    vocab = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    key = json.dumps([str(folder.resolve()), files, vocab, limit_mb, HELDOUT_PERCENT, FOREIGN_SHARE])
    return f"{split}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith((".jsonl.xz", ".jsonl", ".txt")))


def is_heldout(text: str) -> bool:
    """Whether a document belongs to the held-out split: by the hash of its text, so never in both."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:4], "little") % 100 < HELDOUT_PERCENT


def is_latin(text: str) -> bool:
    """Whether nearly all of a document is in the Latin script, as the embedded model's vocabulary is.

    Translations hide in English collections; in bytes a page of Korean is as long as ten of English.
    """
    foreign = sum(character > "\u024f" and character.isalpha() for character in text)
    return foreign <= FOREIGN_SHARE * len(text)


def _documents(folder: Path, split: str, limit_mb: float | None) -> Iterator[str]:
    left = float("inf") if limit_mb is None else limit_mb * 1e6
    for path in _files(folder):
        for text in _texts(path):
            if left <= 0:
                return
            left -= len(text)
            if text.strip() and is_latin(text) and is_heldout(text) == (split == "heldout"):
                yield text.strip()


def _texts(path: Path) -> Iterator[str]:
    if path.suffix == ".txt":
        yield path.read_text(encoding="utf-8", errors="replace")
        return
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
            if isinstance(record.get("text"), str):
                yield record["text"]


def _tokenise(texts: Iterator[str], tokenizer: Any) -> NDArray[Any]:
    """One array of ids; documents are joined by a blank line."""
    backend = tokenizer.backend_tokenizer
    gap = backend.encode("\n\n", add_special_tokens=False).ids
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    parts: list[NDArray[Any]] = []
    batch: list[str] = []

    def flush() -> None:
        for found in backend.encode_batch_fast(batch, add_special_tokens=False):
            parts.append(np.asarray(found.ids + gap, dtype=dtype))
        batch.clear()

    for text in texts:
        batch.append(text.replace("<|", "< |"))  # a special token's name in a text must stay text
        if len(batch) == _BATCH:
            flush()
    flush()
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _landmarks(ids: NDArray[Any], tokenizer: Any) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Where sentences end and where lines begin, from properties of the tokens alone."""
    texts = token_texts(tokenizer)
    ends = np.array([text.strip(" ") in _ENDS or (text.endswith(_ENDS[:3]) and len(text) > 1) for text in texts])
    abbreviation = np.array([text.strip() in _NOT_ENDS for text in texts])
    newline = np.array([text == "\n" for text in texts])
    upper = np.array([len(text) > 1 and text[0] == " " and text[1].isupper() for text in texts])
    opens = np.array([text[:1].isupper() for text in texts])
    breaks = np.zeros(len(ids), dtype=bool)
    if len(ids) > 2:
        ids = np.asarray(ids)
        breaks[2:] = ends[ids[1:-1]] & (upper | newline)[ids[2:]] & ~abbreviation[ids[:-2]]
        starts = np.flatnonzero(newline[ids[:-1]] & opens[ids[1:]]) + 1
    else:
        starts = np.zeros(0, dtype=np.int64)
    return breaks, starts
