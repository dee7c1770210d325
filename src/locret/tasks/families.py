"""The kinds of facts: what is stated, what is asked, and that the answer is never ambiguous.

A `World` is what one document knows so far: the keys, persons and variables in use. Every function `*_fact` invents
one fact that does not clash with it. Hard distractors are made on purpose: keys that share a word with another key, a
person with several relations, a key with both a number and a word.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from locret.errors import ConfigError
from locret.tasks import wordings as w
from locret.tasks.grammar import Flat, Pool, Rendered, Slot, check_wording, fill, fixed, flatten, parse
from locret.tasks.relations import LABELLED, RELATIONS
from locret.tasks.words import invented, towns, words

UNMARKED = ("a", "label", "source")
_LIST_OF = {
    "profession": "professions",
    "instrument": "instruments",
    "subject": "subjects",
    "animal": "animals",
    "colour": "colours",
    "dish": "dishes",
    "language": "languages",
    "word": "nouns",
    "tree": "trees",
    "tool": "tools",
    "sport": "sports",
    "garment": "garments",
    "vehicle": "vehicles",
    "drink": "drinks",
}


@dataclass(frozen=True)
class Ask:
    """A question that can be put in many words: `make(rng, wording)` gives its text."""

    make: Callable[[random.Random, str], str]
    answer: str


@dataclass(frozen=True)
class Fact:
    """Statements in document order, and the questions they answer."""

    family: str
    statements: tuple[Rendered, ...]
    asks: tuple[Ask, ...]


@dataclass
class World:
    """Names in use in one document. `wording` and `values` say which frames and words it may take."""

    rng: random.Random
    wording: str = "train"
    values: str = "train"
    keys: list[str] = field(default_factory=list)
    persons: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    garble: float = 0.0  # training only: how often a fact and its question are put in arbitrary words
    strange: float = 0.0  # training only: how often a word comes from `vocabulary` instead of its list
    vocabulary: Sequence[str] = ()
    value_first: float = 0.0  # training only: how often a statement must name its value before its key or person
    attributes: set[tuple[str, str]] = field(default_factory=set)  # (key or person, attribute) already stated

    def __post_init__(self) -> None:
        check_wording(self.wording)

    def pick(self, section: str) -> str:
        """A word of a list, or a strange one in its place (with a capital if those of the list have one)."""
        options = words(section, self.values)
        if self.strange > 0 and self.rng.random() < self.strange:
            return self._strange(options[0][0].isupper())
        return options[int(self.rng.random() * len(options))]

    def _strange(self, capital: bool) -> str:
        word = self.vocabulary[int(self.rng.random() * len(self.vocabulary))]
        return word.capitalize() if capital else word

    def garbles(self) -> bool:
        """Whether the next fact is put in arbitrary words. It must be the only one about its key or person: then the
        name alone finds it, whatever the words around it, which is what unseen wordings ask of a reader."""
        return self.wording == "train" and self.garble > 0 and self.rng.random() < self.garble

    def turned(self) -> bool:
        """Whether the next statement must name its value first. Reading such a one is a skill of its own: what is
        looked for comes after what is to be found, so the key's units have to carry the value."""
        return self.value_first > 0 and self.rng.random() < self.value_first

    def fresh(self, make: Callable[[], str]) -> str:
        """A string of this kind that the document does not have yet."""
        for _ in range(200):
            found = make()
            if found not in self.used:
                self.used.add(found)
                return found
        raise ConfigError("no unused name left for another fact; lower num_facts")

    def new_key(self) -> str:
        """A key for a value: mostly adjective-noun, sometimes close to a key that exists."""
        key = self.fresh(self._any_key)
        self.keys.append(key)
        return key

    def pair_key(self) -> str:
        """An adjective-noun key, as RULER has them."""
        rng = self.rng
        if self.keys and rng.random() < 0.3:
            near = self.keys[int(rng.random() * len(self.keys))].split("-")
            if len(near) == 2 and near[0].islower() and near[1].islower():
                if rng.random() < 0.5:
                    return f"{near[0]}-{self.pick('nouns')}"
                return f"{self.pick('adjectives')}-{near[1]}"
        return f"{self.pick('adjectives')}-{self.pick('nouns')}"

    def _any_key(self) -> str:
        rng = self.rng
        if self.wording == "official" or rng.random() < 0.85:
            return self.pair_key()
        kind = int(rng.random() * 8)
        if kind == 0:
            return f"{''.join(rng.choices(string.ascii_uppercase, k=2))}-{rng.randrange(10, 100)}"
        if kind == 1:
            return f"Project {self.pick('projects')}"
        if kind == 2:
            return f"the {self.pick('departments')} department"
        if kind == 3:
            return f"room {rng.randrange(100, 1000)}"
        if kind == 4:
            return invented(rng)
        if kind == 5:
            return f"the {self.pick('adjectives')} {self.pick('nouns')}"
        if kind == 6:
            return f"{self.pick('nouns')} {rng.randrange(2, 100)}"
        return self.value("town") if rng.random() < 0.5 else self.pick("nouns")

    def new_person(self) -> str:
        """First and last name; sometimes they share one of the two with somebody else."""

        def make() -> str:
            first, last = self.pick("first"), self.pick("last")
            if self.persons and self.rng.random() < 0.25:
                other = self.persons[int(self.rng.random() * len(self.persons))].split(" ")
                if self.rng.random() < 0.5:
                    first = other[0]
                else:
                    last = other[1]
            return f"{first} {last}"

        person = self.fresh(make)
        self.persons.append(person)
        return person

    def digits(self, count: int) -> str:
        """A number of so many digits that the document does not have yet."""
        return self.fresh(lambda: str(self.rng.randrange(10 ** (count - 1), 10**count)))

    def value(self, kind: str) -> str:
        """A value of a relation: "town", "profession", "company", "year", "digits4", "word" ..."""
        rng = self.rng
        if kind == "year":
            return str(rng.randrange(1820, 2005))
        if kind == "digits4":
            return self.digits(4)
        if self.garble > 0 and rng.random() < 0.2:  # to be copied as it stands, known or not
            made = invented(rng) if rng.random() < 0.5 else (self.pick("nouns") + self.pick("nouns")).capitalize()
            if kind == "company":
                return f"{made} {self.pick('trades')}"
            return made if kind == "town" or rng.random() < 0.2 else made.lower()
        if kind == "town":
            if self.strange > 0 and rng.random() < self.strange:
                return self._strange(True)
            names = towns(self.values)
            return names[int(rng.random() * len(names))]
        if kind == "company":
            return f"{self.pick('last')} {self.pick('trades')}"
        return self.pick(_LIST_OF[kind])

    def variable(self) -> str:
        """The name of a variable: five capitals as in RULER, sometimes another kind."""

        def make() -> str:
            rng = self.rng
            if self.wording == "official" or rng.random() < 0.8:
                return "".join(rng.choices(string.ascii_uppercase, k=5))
            if rng.random() < 0.5:
                return "".join(rng.choices(string.ascii_uppercase, k=rng.choice((3, 4, 6))))
            return f"{self.pick('adjectives')}_{self.pick('nouns')}"

        return self.fresh(make)


def garbled(rng: random.Random, frame: Flat, more: Sequence[str] = ()) -> Flat:
    """The frame with some of its plain words replaced by words of other frames, or its slots among such words only.

    Args:    more: words that may stand there, too; none that could be taken for the value.
    """

    def word() -> str:
        pool = more if more and rng.random() < 0.4 else frame_words()
        return pool[int(rng.random() * len(pool))]

    if rng.random() < 0.35:
        slots = [part for part in frame if not isinstance(part, str)]
        rng.shuffle(slots)
        parts: list[str | Slot] = [word().capitalize() + " "] if rng.random() < 0.6 else []
        for slot in slots:
            parts += [word() + " " for _ in range(rng.randrange(0, 5))] + [slot, rng.choice((" ", " ", ", ", ": "))]
        parts += [word() + " " for _ in range(rng.randrange(0, 4))]
        return (*parts[:-1], str(parts[-1]).rstrip(" ,:") + rng.choice((".", ".", "?", "")))
    share = rng.uniform(0.2, 0.8)

    def other(match: re.Match[str]) -> str:
        return word() if rng.random() < share else match[0]

    return tuple(re.sub(r"(?<![\w'])[a-z]+(?![\w'])", other, part) if isinstance(part, str) else part for part in frame)


@functools.cache
def frame_words() -> tuple[str, ...]:
    """Plain words of the training frames that are no values."""
    frames = [frame for relation in RELATIONS.values() for pool in (relation.phrases.clauses, relation.phrases.direct)
              for frame in pool.train]  # fmt: skip
    frames += [*w.KEYED.clauses.train, *w.KEYED.direct.train, *w.FACT_WRAPPERS.train]
    found = {word for frame in frames for word in re.findall(r"(?<![\w{^'])[a-z]+(?![\w}'])", frame)}
    values = {word for section in _LIST_OF.values() for word in words(section, "any")}
    return tuple(sorted(found - values))


# ---- key -> number, word, uuid ------------------------------------------------------------------------------------

_ATTRS = {"number": w.NUMBER, "word": w.WORD, "uuid": w.UUID}


def keyed_statement(rng: random.Random, attribute: str, wording: str, turned: bool = False) -> tuple[Flat, str]:
    """A frame that states the value of a key, all but key and value fixed, and the name it gives the attribute."""
    if wording == "official":
        return fixed(w.OFFICIAL_KEYED[attribute]), attribute
    attr = _text(rng, _ATTRS[attribute], wording)
    if wording in ("train", "any") and not turned and rng.random() < 0.06:
        return fixed(w.OFFICIAL_KEYED[attribute]), attribute
    return _stated(rng, w.KEYED, {"attr": Pool((attr,), ())}, wording, turned), attr


def keyed_ask(key: str, attribute: str, attr: str, answer: str) -> Ask:
    """The question for it; half of the time the attribute gets another name than in the statement."""

    def make(rng: random.Random, wording: str) -> str:
        if wording == "official" or (wording in ("train", "any") and rng.random() < 0.06):
            return fill(fixed(w.OFFICIAL_KEYED_ASK[attribute]), {"key": key}).text
        name = attr if rng.random() < 0.5 else _text(rng, _ATTRS[attribute], wording)
        return fill(_asked(rng, w.KEYED, {"attr": Pool((name,), ())}, wording), {"key": key}).text

    return Ask(make, answer)


def number_fact(world: World, key: str | None = None) -> Fact:
    """key -> number: seven digits, in training sometimes four to ten."""
    count = 7 if world.wording == "official" or world.rng.random() < 0.85 else world.rng.randrange(4, 11)
    return _keyed_fact(world, "number", world.digits(count), key)


def word_fact(world: World, key: str | None = None) -> Fact:
    """key -> a plain word."""
    return _keyed_fact(world, "word", world.fresh(lambda: world.value("word")), key)


def _keyed_fact(world: World, attribute: str, value: str, key: str | None) -> Fact:
    alone = key is None and world.garbles()
    key = world.new_key() if key is None else key
    world.attributes.add((key, attribute))
    frame, attr = keyed_statement(world.rng, attribute, world.wording, world.turned())
    if not alone:
        statement = fill(frame, {"key": key, "value": value})
        return Fact(attribute, (statement,), (keyed_ask(key, attribute, attr, value),))
    world.attributes |= {(key, "number"), (key, "word")}
    noise = world.vocabulary if attribute == "number" else ()
    statement = fill(garbled(world.rng, frame, noise), {"key": key, "value": value})

    def make(rng: random.Random, wording: str) -> str:
        asked = _asked(rng, w.KEYED, {"attr": Pool((attr,), ())}, wording)
        return fill(garbled(rng, asked, world.vocabulary), {"key": key}).text

    return Fact(attribute, (statement,), (Ask(make, value),))


def multivalue_fact(world: World) -> Fact:
    """One key with two to four numbers, asked together."""
    key = world.new_key()
    world.attributes |= {(key, "number"), (key, "word")}
    values = [world.digits(7) for _ in range(world.rng.randrange(2, 5))]
    attr = "number" if world.wording == "official" else _text(world.rng, w.NUMBER, world.wording)
    statements = []
    for value in values:
        pools = {"attr": Pool((attr,), ())}
        frame = (
            fixed(w.OFFICIAL_KEYED["number"])
            if world.wording == "official"
            else _stated(world.rng, w.KEYED, pools, world.wording, world.turned())
        )
        statements.append(fill(frame, {"key": key, "value": value}))

    def make(rng: random.Random, wording: str) -> str:
        pools = {"attr": Pool((attr,), ())}
        frame = parse(w.OFFICIAL_MULTIVALUE_ASK) if wording == "official" else w.MULTIVALUE_ASKS.pick(rng, wording)
        return fill(flatten(rng, frame, pools, wording), {"key": key}).text

    return Fact("multivalue", tuple(statements), (Ask(make, ", ".join(values)),))


# ---- persons ------------------------------------------------------------------------------------------------------


def relation_fact(world: World, person: str | None = None) -> Fact:
    """A person and one of the relations: lives in, works as, was born in, owns ..."""
    rng = world.rng
    alone = person is None and world.garbles()
    person = world.new_person() if person is None else person
    free = [name for name in RELATIONS if (person, name) not in world.attributes]
    name = free[int(rng.random() * len(free))]
    world.attributes.add((person, name))
    relation = RELATIONS[name]
    value = world.value(relation.values)
    slots = {"person": person, "value": value, "a": "an" if value[0] in "aeiou" else "a"}
    wording = "train" if world.wording == "official" else world.wording
    label = Pool((_text(rng, relation.labels, wording),), ())
    if wording == world.wording and rng.random() < 0.35:
        frame = _stated(rng, LABELLED, {"label": label}, wording, world.turned())
    else:
        frame = _stated(rng, relation.phrases, {}, world.wording, world.turned())

    def make(rng: random.Random, wording: str) -> str:
        labels = Pool((_text(rng, relation.labels, wording),), ())
        if wording != "official" and rng.random() < 0.35:
            frame = _asked(rng, LABELLED, {"label": labels}, wording)
        else:
            frame = _asked(rng, relation.phrases, {}, wording)
        return fill(garbled(rng, frame, world.vocabulary) if alone else frame, {"person": person}).text

    if alone:
        world.persons.remove(person)  # no second fact about this person
        frame = garbled(rng, frame, () if value.islower() else world.vocabulary)

    return Fact("fact", (fill(frame, slots, UNMARKED),), (Ask(make, value),))


# ---- the pass key -------------------------------------------------------------------------------------------------


def passkey_fact(world: World) -> Fact:
    """The pass key, five to eight digits (officially five)."""
    rng = world.rng
    value = world.digits(5 if world.wording == "official" else rng.randrange(5, 9))
    attr = Pool((_text(rng, w.PASSKEY_ATTR, world.wording),), ())
    frame = (
        fixed(w.PASSKEY.official_fact)
        if world.wording == "official" or (world.wording in ("train", "any") and rng.random() < 0.06)
        else _stated(rng, w.PASSKEY, {"attr": attr}, world.wording)
    )

    def make(rng: random.Random, wording: str) -> str:
        if wording == "official" or (wording in ("train", "any") and rng.random() < 0.06):
            return w.PASSKEY.official_ask
        name = attr if rng.random() < 0.5 else Pool((_text(rng, w.PASSKEY_ATTR, wording),), ())
        return fill(_asked(rng, w.PASSKEY, {"attr": name}, wording), {}).text

    return Fact("passkey", (fill(frame, {"value": value}),), (Ask(make, value),))


# ---- variable chains ----------------------------------------------------------------------------------------------


def chain_fact(world: World, hops: int | None = None) -> Fact:
    """X1 = 12345, X2 = X1 ...: the first ask is for the last variable, the others for those before it.

    The answer spells the chain out, "X3 = X2 = X1 = 12345": each link is a look-up of its own, so that a small model is
    asked to read and not to compose in its head. It is right only if every link is.
    """
    rng = world.rng
    hops = rng.randrange(1, 4) if hops is None else hops
    value = world.digits(5)
    names = [world.variable() for _ in range(hops + 1)]
    place, held = _chain_style(rng, world.wording)
    define = flatten(rng, parse((w.CHAIN_DEFINE.heldout if held else w.CHAIN_DEFINE.train)[place]), {}, world.wording)
    statements = [fill(define, {"name": names[0], "value": value})]
    for source, name in itertools.pairwise(names):
        if rng.random() < 0.15 and world.wording != "official":
            place, held = _chain_style(rng, world.wording)
        link = flatten(rng, parse((w.CHAIN_LINK.heldout if held else w.CHAIN_LINK.train)[place]), {}, world.wording)
        statements.append(fill(link, {"name": name, "source": source}, UNMARKED))
    asks = []
    for place in reversed(range(len(names))):
        asks.append(_chain_ask(names[place], " = ".join([*reversed(names[: place + 1]), value])))
    return Fact("chain", tuple(statements), tuple(asks))


def _chain_style(rng: random.Random, wording: str) -> tuple[int, bool]:
    """Place of the frame in its list, and whether in the held-out one."""
    if wording == "official" or (wording in ("train", "any") and rng.random() < 0.3):
        return w.CHAIN_OFFICIAL, False
    num_train, num_held = len(w.CHAIN_DEFINE.train), len(w.CHAIN_DEFINE.heldout)
    if wording == "heldout":
        return rng.randrange(num_held), True
    place = rng.randrange(num_train + (num_held if wording == "any" else 0))
    return (place, False) if place < num_train else (place - num_train, True)


def _chain_ask(name: str, answer: str) -> Ask:
    def make(rng: random.Random, wording: str) -> str:
        if wording == "official":
            return fill(fixed(w.CHAIN_ASKS.train[w.CHAIN_OFFICIAL]), {"name": name}).text
        phrases = w.Phrases(w.CHAIN_NPS, w.CHAIN_NPS, w.CHAIN_NPS, w.CHAIN_ASKS)
        return fill(_asked(rng, phrases, {}, wording), {"name": name}).text

    return Ask(make, answer)


# ---- from frames to text ------------------------------------------------------------------------------------------


def _text(rng: random.Random, pool: Pool, wording: str) -> str:
    return fill(flatten(rng, pool.pick(rng, wording, strict=False), {}, wording), {}).text


def _stated(rng: random.Random, phrases: w.Phrases, pools: dict[str, Pool], wording: str, turned: bool = False) -> Flat:
    """A statement's frame: a direct one, or a clause in a wrapper. `turned`: one that names the value first."""
    if wording == "official":
        return (*fixed(phrases.clauses.train[0]), ".")
    pools = {**pools, "speaker": w.SPEAKER, "clause": phrases.clauses}
    frame = _statement(rng, phrases, pools, wording)
    for _ in range(_TURNS if turned else 0):
        if _names_value_first(frame):
            break
        frame = _statement(rng, phrases, pools, wording)
    return frame


_TURNS = 40  # a tenth of the frames and more name the value first, whatever the fact


def _names_value_first(frame: Flat) -> bool:
    slots = [part.name for part in frame if isinstance(part, Slot) and part.name not in UNMARKED]
    return slots[:1] == ["value"]


def _statement(rng: random.Random, phrases: w.Phrases, pools: dict[str, Pool], wording: str) -> Flat:
    if len(phrases.direct) and rng.random() < 0.35:
        return flatten(rng, phrases.direct.pick(rng, wording), pools, wording)
    if rng.random() < 0.3:
        return flatten(rng, parse("{^clause}."), pools, wording, strict=("clause",))
    wrapper = w.FACT_WRAPPERS.pick(rng, wording, strict=False)
    return flatten(rng, wrapper, pools, wording, strict=("clause",))


def _asked(rng: random.Random, phrases: w.Phrases, pools: dict[str, Pool], wording: str) -> Flat:
    """A question's frame: a direct one, a noun phrase in a wrapper, or an indirect question in a wrapper."""
    if wording == "official":
        return fixed(phrases.asks.train[0])
    draw = rng.random()
    if draw < 0.45:
        return flatten(rng, phrases.asks.pick(rng, wording), pools, wording)
    if draw < 0.6 and len(phrases.indirect):
        pools = {**pools, "indirect": phrases.indirect}
        return flatten(rng, w.INDIRECT_WRAPPERS.pick(rng, wording, False), pools, wording, strict=("indirect",))
    pools = {**pools, "np": phrases.nps}
    return flatten(rng, w.NP_WRAPPERS.pick(rng, wording, False), pools, wording, strict=("np",))
