"""Text -> token ids, fast enough for training, and the chat template as token ids.

A byte-level BPE with single digits cuts a text at every space, newline and digit whatever its merges are, so the ids of
a text are the ids of its chunks, and chunks repeat: a dictionary answers nearly all of them (about 10 times faster than
encoding). Whether a tokenizer is of this kind is tested once on sample strings; any other one is simply called.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from locret.tasks.grammar import Rendered

MARKED_WEIGHT = 0.1  # of a random key or value in the document: nobody can predict it
_UUID = re.compile(r"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})")
_CHUNK = re.compile(r" ?-*[^\s0-9-]+| ?-+| ?[0-9]|\s")
_PROBES = (
    ' One of the (special) numbers for amber-river is: 1234567. "Yes," he said.\nKX-41 = 12\n\n* a_b - x — y | 7 |',
    '{"0a1b2c3d-aaaa-4bcd-8e9f-0123456789ab": "abcdefab-1111-4abc-9def-fffff0ffffff",\n "f": 1',
    "VAR ABCDE = VAR FGHIJ; Mr. Lee's (code): 12, 13 -> 'x'!",
)
_MAX_CACHED = 400_000
_PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{{ '\n' if m['role'] == 'assistant' else '\nAnswer:' }}{% endfor %}"
)


class Encoder:
    """Encodes with one tokenizer. Get it from `encoder_of(tokenizer)`, so that its cache is shared."""

    def __init__(self, tokenizer: Any):
        self._call = tokenizer
        self._cache: dict[str, list[int]] = {}
        self._separable = all(self._by_chunks(probe) == self._direct(probe) for probe in _PROBES)
        self.vocab_size = len(tokenizer)
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.chat = ChatFormat(tokenizer, self)
        texts = token_texts(tokenizer)
        self.word_starts = np.array([len(t) > 1 and t[0] == " " and t[1].isalpha() for t in texts])  # bool [vocab]

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self._by_chunks(text) if self._separable else self._direct(text)

    def weighted(self, rendered: Rendered) -> tuple[list[int], list[float]]:
        """Token ids of a text and their weights: 1.0, and MARKED_WEIGHT where a token touches a mark."""
        if self._separable:
            return self._weighted_by_chunks(rendered)
        found = self._call(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        weights = [
            MARKED_WEIGHT if any(a < stop and b > start for start, stop in rendered.marks) else 1.0
            for a, b in found["offset_mapping"]
        ]
        return list(found["input_ids"]), weights

    def _direct(self, text: str) -> list[int]:
        return list(self._call(text, add_special_tokens=False)["input_ids"])

    def _lookup(self, chunk: str) -> list[int]:
        if len(self._cache) >= _MAX_CACHED:
            self._cache.clear()
        ids = self._cache[chunk] = self._direct(chunk)
        return ids

    def _by_chunks(self, text: str) -> list[int]:
        out: list[int] = []
        cache = self._cache
        for chunk in _chunks(text):
            out += cache.get(chunk) or self._lookup(chunk)
        return out

    def _weighted_by_chunks(self, rendered: Rendered) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        cache = self._cache
        marks = rendered.marks
        at = mark = 0
        for chunk in _chunks(rendered.text):
            found = cache.get(chunk) or self._lookup(chunk)
            end = at + len(chunk)
            while mark < len(marks) and marks[mark][1] <= at:
                mark += 1
            touched = mark < len(marks) and marks[mark][0] < end
            ids += found
            weights += [MARKED_WEIGHT if touched else 1.0] * len(found)
            at = end
        return ids, weights


def _chunks(text: str) -> list[str]:
    """Pieces of a text that can be encoded alone. A uuid is spelled: hex letters beside digits are single tokens."""
    if text.count("-") < 4:
        return _CHUNK.findall(text)
    out: list[str] = []
    for i, part in enumerate(_UUID.split(text)):
        out += part if i % 2 else _CHUNK.findall(part)
    return out


class ChatFormat:
    """The tokens around the contents of a conversation, read off the tokenizer's chat template.

    opening | user content | to_answer | lead + answer | to_user | user content | to_answer ...
    `lead` is white space that the template puts before an answer: it is encoded together with the answer.
    `end` is what closes an answer (the first `len(end)` tokens of `to_user`).
    """

    def __init__(self, tokenizer: Any, encoder: Encoder):
        template = getattr(tokenizer, "chat_template", None) or _PLAIN_TEMPLATE
        user, answer, again = "\ue001", "\ue002", "\ue003"
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        render = {"tokenize": False, "chat_template": template}
        closed = tokenizer.apply_chat_template(turns, **render)
        text = tokenizer.apply_chat_template(
            [*turns, {"role": "user", "content": again}], add_generation_prompt=True, **render
        )
        before, rest = text.split(user)
        to_answer, rest = rest.split(answer)
        to_user, generate = rest.split(again)
        self.lead: str = to_answer[len(to_answer.rstrip(" ")) :]
        self.opening = encoder._direct(before)
        self.to_answer = encoder._direct(to_answer.rstrip(" "))
        self.to_user = encoder._direct(to_user)
        self.generate = encoder._direct(generate)
        self.end = encoder._direct(closed.split(answer)[1])


_ENCODERS: WeakKeyDictionary[Any, Encoder] = WeakKeyDictionary()


def encoder_of(tokenizer: Any) -> Encoder:
    """The encoder of this tokenizer object; made once."""
    found = _ENCODERS.get(tokenizer)
    if found is None:
        found = _ENCODERS[tokenizer] = Encoder(tokenizer)
    return found


def token_texts(tokenizer: Any) -> list[str]:
    """The text of every token, with a leading space as " " and a newline as "\\n"."""
    raw: Sequence[str | None] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [(t or "").replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n") for t in raw]
