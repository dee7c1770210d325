"""The word lists that keys, names and values are drawn from (`words.txt`), in two parts.

Every fifth word of every list is reserved for evaluation: a model or a set of heads that was trained on generated
samples has never seen it as a key or a value. `pool("train")` leaves these words out, `pool("heldout")` gives only
them, `pool("any")` gives all.
"""
# ruff: noqa: SIM905  (a list of syllables reads better as a string)

from __future__ import annotations

import random
from functools import cache
from importlib import resources

from locret.errors import unknown

VALUES = ("train", "heldout", "any")
_RESERVED_EVERY = 5


@cache
def sections() -> dict[str, tuple[str, ...]]:
    """All lists of `words.txt` by name."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in resources.files("locret.tasks").joinpath("words.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            name = line[1:-1]
            found[name] = []
        elif line and not line.startswith("#"):
            found[name].extend(line.split())
    return {key: tuple(words) for key, words in found.items()}


def is_reserved(index: int) -> bool:
    """Whether the word at this place of its list is kept for evaluation."""
    return index % _RESERVED_EVERY == _RESERVED_EVERY - 1


@cache
def words(section: str, values: str) -> tuple[str, ...]:
    """The words of one list that `values` ("train", "heldout", "any") allows."""
    if values not in VALUES:
        raise unknown("values", values, VALUES)
    everything = sections()[section]
    if values == "any":
        return everything
    return tuple(word for index, word in enumerate(everything) if is_reserved(index) == (values == "heldout"))


@cache
def towns(values: str) -> tuple[str, ...]:
    """Invented town names: a head and a tail of the lists, e.g. "Alderbrook"."""
    if values not in VALUES:
        raise unknown("values", values, VALUES)
    heads, tails = sections()["town_head"], sections()["town_tail"]
    made = [
        head + tail
        for i, head in enumerate(heads)
        for j, tail in enumerate(tails)
        if (values == "any" or is_reserved(i + j) == (values == "heldout")) and head[-1:] != tail[:1]
    ]
    return tuple(made)


@cache
def reserved() -> frozenset[str]:
    """Every word that some list keeps for evaluation."""
    return frozenset(word for section in sections() for word in words(section, "heldout"))


@cache
def coined(count: int = 30_000) -> tuple[str, ...]:
    """Words that look like words and stand in no list: the head of one training word and the tail of another.

    A model that has only ever copied the words of the lists learns the lists, not copying: it answers "silk" for a
    "grenade" that it never saw as a value. These, cut anywhere, leave it nothing to learn but copying.
    """
    rng = random.Random("coined")
    pool = sorted({w for name in sections() for w in words(name, "train") if w.isalpha() and len(w) > 3})
    known = {word for name in sections() for word in sections()[name]}
    found: set[str] = set()
    while len(found) < count:
        head, tail = rng.choice(pool), rng.choice(pool)
        word = (head[: rng.randrange(1, len(head))] + tail[rng.randrange(1, len(tail)) :]).lower()
        if 3 <= len(word) <= 12 and word not in known and word.capitalize() not in known:
            found.add(word)
    return tuple(sorted(found))


_ONSETS = "b br c d dr f g gr h j k kl l m n p pr qu r s st t tr v w z".split()
_VOWELS = "a e i o u ai ea io ou".split()
_CODAS = " l m n r s th x nd rn".split(" ")


def invented(rng: random.Random) -> str:
    """A word that no dictionary has, of two or three syllables: "Dratornix"."""
    syllables = [
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + (rng.choice(_CODAS) if rng.random() < 0.5 else "")
        for _ in range(rng.choice((2, 2, 3)))
    ]
    return "".join(syllables).capitalize()
