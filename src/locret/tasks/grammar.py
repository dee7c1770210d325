"""A tiny template language: one frame stands for hundreds of surface forms.

    "[Please |]remember that {clause}."      [a|b|c] chooses one alternative, also nested; an empty one is allowed
    "{^attr} of {key} = {value}"             {name} is a slot; {^name} capitalises what fills it

A slot is filled from a `Pool` of further templates (synonyms, clauses) or by a string given at the end (key, value).
A `Pool` is split in frames for training and held-out frames, which training never shows: the measure of whether a
model reads, or only knows its templates.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from locret.errors import unknown

WORDINGS = ("train", "heldout", "official", "any")
_HELD_EVERY = 5


class Slot(NamedTuple):
    """A hole in a template; `capital` asks for an upper-case first letter."""

    name: str
    capital: bool


class Choice(NamedTuple):
    """Alternatives, each of which is a template."""

    options: tuple[Template, ...]


Part = str | Slot | Choice
Template = tuple[Part, ...]
Flat = tuple[str | Slot, ...]


class Rendered(NamedTuple):
    """A text and the character spans in it that nobody could predict (keys and values)."""

    text: str
    marks: tuple[tuple[int, int], ...]


@cache
def parse(source: str) -> Template:
    """Read one template.

    >>> parse("[a|b] {key}")
    (Choice(options=(('a',), ('b',))), ' ', Slot(name='key', capital=False))
    """
    template, end = _parse_until(source, 0, "")
    assert end == len(source), f"unbalanced template: {source!r}"
    return template


def _parse_until(source: str, start: int, stop: str) -> tuple[Template, int]:
    parts: list[Part] = []
    text = ""
    i = start
    while i < len(source) and source[i] not in stop:
        if source[i] not in "[{":
            text += source[i]
            i += 1
            continue
        if text:
            parts.append(text)
            text = ""
        if source[i] == "{":
            close = source.index("}", i)
            name = source[i + 1 : close]
            parts.append(Slot(name.lstrip("^"), name.startswith("^")))
            i = close + 1
        else:
            options = []
            while source[i] != "]":
                option, i = _parse_until(source, i + 1, "|]")
                options.append(option)
            parts.append(Choice(tuple(options)))
            i += 1
    if text:
        parts.append(text)
    return tuple(parts), i


@dataclass(frozen=True)
class Pool:
    """Frames that say the same thing, in two parts: shown in training, and held out."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]

    @classmethod
    def split(cls, frames: Sequence[str]) -> Pool:
        """Hold out every fifth frame."""
        assert len(set(frames)) == len(frames), "a frame is listed twice"
        held = tuple(frame for i, frame in enumerate(frames) if i % _HELD_EVERY == _HELD_EVERY - 1)
        return cls(tuple(frame for frame in frames if frame not in held), held)

    def pick(self, rng: random.Random, wording: str, strict: bool = True) -> Template:
        """One frame. Wording "heldout" takes a held-out frame always (strict) or half of the time."""
        if wording == "heldout" and self.heldout and (strict or rng.random() < 0.5):
            frames = self.heldout
        elif wording == "any":
            frames = self.train + self.heldout
        else:
            frames = self.train
        return parse(frames[int(rng.random() * len(frames))])

    def __len__(self) -> int:
        return len(self.train) + len(self.heldout)


def check_wording(wording: str) -> None:
    """Raise for an unknown name of a wording."""
    if wording not in WORDINGS:
        raise unknown("wording", wording, WORDINGS)


def fixed(source: str) -> Flat:
    """A template without alternatives, ready for `fill`."""
    return tuple(part for part in parse(source) if not isinstance(part, Choice))


def flatten(
    rng: random.Random, template: Template, pools: Mapping[str, Pool], wording: str, strict: Collection[str] = ()
) -> Flat:
    """Choose all alternatives and fill the slots that have a pool; other slots stay, for `fill`.

    Args:    strict: names of the pools that must give a held-out frame when the wording is "heldout".
    """
    out: list[str | Slot] = []
    _flatten_into(out, rng, template, pools, wording, strict)
    return tuple(out)


def _flatten_into(
    out: list[str | Slot],
    rng: random.Random,
    template: Template,
    pools: Mapping[str, Pool],
    wording: str,
    strict: Collection[str],
) -> None:
    for part in template:
        if isinstance(part, str):
            out.append(part)
        elif isinstance(part, Choice):
            option = part.options[int(rng.random() * len(part.options))]
            _flatten_into(out, rng, option, pools, wording, strict)
        elif part.name in pools:
            first = len(out)
            inner = pools[part.name].pick(rng, wording, part.name in strict)
            _flatten_into(out, rng, inner, pools, wording, strict)
            if part.capital:
                _capitalise(out, first)
        else:
            out.append(part)


def _capitalise(out: list[str | Slot], index: int) -> None:
    while index < len(out):
        part = out[index]
        if isinstance(part, Slot):
            return
        if part:
            out[index] = part[0].upper() + part[1:]
            return
        index += 1


def fill(flat: Flat, values: Mapping[str, str], unmarked: Collection[str] = ()) -> Rendered:
    """Put the strings into the slots; each of them is marked, except those named in `unmarked`."""
    texts: list[str] = []
    marks: list[tuple[int, int]] = []
    at = 0
    for part in flat:
        if isinstance(part, Slot):
            text = values[part.name]
            if part.capital and part.name in unmarked:
                text = text[:1].upper() + text[1:]
            if part.name not in unmarked:
                marks.append((at, at + len(text)))
        else:
            text = part
        texts.append(text)
        at += len(text)
    return Rendered("".join(texts), tuple(marks))
