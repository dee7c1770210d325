"""The text that needles are hidden in, as words and sentences: any tokenizer, any length, from any place on.

By default it is prose that `prose.py` writes (no files, no licence); a folder or file of texts takes its place.
Sentences are split by a regular expression, not by NLTK's punkt model, which is a download.
"""

from __future__ import annotations

import random
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from locret.errors import DataError
from locret.tasks import prose
from locret.tasks.filler import Filler, _files, _texts
from locret.tasks.gauge import Gauge

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_PROSE_SENTENCES = 12_000  # about 220,000 tokens; longer haystacks repeat it, as RULER's repeat the essays
_SENTENCE_END = re.compile(r"""(?<=[.!?])["'”’)\]]*\s+(?=["'“‘(\[]?[A-Z0-9])""")
_MOST_CHARACTERS = 6_000_000
_FILLER_TOKENS = 200_000


class Haystack:
    """Words in reading order. Positions wrap around, so any length can start anywhere.

    Attributes:
        words: without blanks; joined by single blanks they are the text.
        starts: int64, the words that begin a sentence; the first is 0.
    """

    def __init__(self, sentences: list[str]):
        split = [sentence.split() for sentence in sentences]
        self.words = [word for words in split for word in words]
        if len(self.words) < 100:
            raise DataError(f"a haystack of {len(self.words)} words is too small; give text of at least 100 words")
        sizes = np.array([len(words) for words in split if words])
        self.starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        self._costs: WeakKeyDictionary[Gauge, NDArray[np.int64]] = WeakKeyDictionary()

    @classmethod
    def of(cls, source: Haystack | Filler | str | Path | None, tokenizer: Any) -> Haystack:
        """From nothing (the project's prose), a haystack, a file or folder of .txt, .jsonl, .jsonl.xz, or a filler."""
        if source is None:
            return _prose()
        if isinstance(source, Haystack):
            return source
        if isinstance(source, str | Path):
            return _from_files(str(source))
        ids, _ = source.take(random.Random(0), _FILLER_TOKENS)
        return cls(sentences(tokenizer.decode(ids.tolist())))

    def cost(self, gauge: Gauge, start: int, num_words: int) -> int:
        """About how many tokens so many words are, each with the blank before it."""
        if gauge not in self._costs:
            counts = gauge.counts([" " + word for word in self.words])
            self._costs[gauge] = np.concatenate(([0], np.cumsum(counts)))
        sums = self._costs[gauge]
        rounds, rest = divmod(start + num_words, len(self.words))
        return int(rounds * sums[-1] + sums[rest] - sums[start])

    def sentences(self, start: int, num_words: int) -> list[str]:
        """So many words from `start` on, cut where sentences end; the last may be cut short."""
        size = len(self.words)
        words = self.words * ((start + num_words) // size + 1)
        all_starts = np.concatenate([self.starts + size * i for i in range((start + num_words) // size + 1)])
        inside = all_starts[(all_starts > start) & (all_starts < start + num_words)]
        edges = [start, *inside.tolist(), start + num_words]
        return [" ".join(words[a:b]) for a, b in pairwise(edges)]

    def random_start(self, rng: random.Random) -> int:
        """A word that begins a sentence."""
        return int(self.starts[int(rng.random() * len(self.starts))])


def sentences(text: str) -> list[str]:
    """Split at sentence ends, white space collapsed.

    >>> sentences("It rains. Mr Lee said: 'No.' Then 3.5 km on!")
    ['It rains.', "Mr Lee said: 'No.'", 'Then 3.5 km on!']
    """
    flat = " ".join(text.split())
    edges = [0]
    for found in _SENTENCE_END.finditer(flat):
        edges.append(found.end())
    edges.append(len(flat))
    return [flat[a:b].strip() for a, b in pairwise(edges) if flat[a:b].strip()]


@cache
def _prose() -> Haystack:
    return Haystack(prose.write(random.Random("haystack"), _PROSE_SENTENCES))


@cache
def _from_files(name: str) -> Haystack:
    path = Path(name)
    if not path.exists():
        raise DataError(f"no haystack text at {path}; give a file or a folder of .txt, .jsonl or .jsonl.xz files")
    found: list[str] = []
    left = _MOST_CHARACTERS
    for file in _files(path) if path.is_dir() else [path]:
        for text in _texts(file):
            if left > 0:
                found += sentences(text[:left])
                left -= len(text)
    if not found:
        raise DataError(f"{path} holds no .txt, .jsonl or .jsonl.xz file with text in it")
    return Haystack(found)
