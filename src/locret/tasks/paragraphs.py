"""Paragraphs and questions about them for RULER's qa tasks: invented towns and people, or SQuAD and HotpotQA files.

The invented ones state several facts in prose among sentences that say nothing of use; questions ask one fact
(`single`) or need two paragraphs (`double`: where somebody was born, and something about that town).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from locret.errors import ConfigError, DataError
from locret.tasks import prose
from locret.tasks.words import sections, towns

_TOWN = {  # attribute: statements, question, question by way of somebody born there
    "founded": (
        ("{name} was founded in {founded}.", "The charter of {name} dates from {founded}.",
         "In {founded} the first houses of {name} went up."),
        "In what year was {name} founded?",
        "In what year was the town founded where {person} was born?",
    ),
    "people": (
        ("About {people} people live in {name}.", "Its population is {people}.",
         "At the last count {name} had {people} inhabitants."),
        "How many people live in {name}?",
        "How many people live in the town where {person} was born?",
    ),
    "river": (
        ("The {river} runs through the middle of the town.", "It lies on both banks of the {river}.",
         "Two bridges cross the {river} at {name}."),
        "Which river runs through {name}?",
        "Which river runs through the town where {person} was born?",
    ),
    "trade": (
        ("{name} is known for its {trade}.", "Most families there have lived by {trade} for generations.",
         "Its wealth came from {trade}."),
        "What is {name} known for making?",
        "What is the town known for making where {person} was born?",
    ),
    "mayor": (
        ("The mayor is {mayor}.", "{mayor} has been its mayor for nine years.",
         "The town council is led by {mayor}."),
        "Who is the mayor of {name}?",
        "Who is the mayor of the town where {person} was born?",
    ),
}  # fmt: skip
_PERSON = {
    "town": (
        ("{name} was born in {town}.", "The childhood of {name} was spent in {town}, where the family came from.",
         "{town} is the birthplace of {name}."),
        "Where was {name} born?",
    ),
    "born": (
        ("The year of birth is given as {born}.", "{name} came into the world in {born}.",
         "It was in {born} that {name} was born."),
        "In what year was {name} born?",
    ),
    "work": (
        ("{name} worked as a {work}.", "For most of those years {name} earned a living as a {work}.",
         "By training {name} was a {work}."),
        "What was the profession of {name}?",
    ),
    "instrument": (
        ("In the evenings {name} played the {instrument}.", "{name} was never seen without the {instrument}.",
         "Those who visited heard {name} practise the {instrument}."),
        "Which instrument did {name} play?",
    ),
    "dish": (
        ("The favourite dish of {name} was {dish}.", "{name} liked nothing better than {dish}.",
         "On Sundays {name} always cooked {dish}."),
        "What was the favourite dish of {name}?",
    ),
}  # fmt: skip
_TRADES = (
    "glass", "rope", "paper", "clocks", "carpets", "bells", "barrels", "lace", "candles", "saddles", "pianos", "tiles",
    "knives", "buttons", "lanterns", "cider", "mustard", "boats", "gloves", "bricks", "soap", "kites",
)  # fmt: skip
_RIVERS = (
    "Ashwater", "Bramble", "Culver", "Dorn", "Eskine", "Fallow", "Garl", "Hestrel", "Ister", "Jannow", "Kestle",
    "Lorimer", "Medlar", "Norrin", "Osmer", "Pellin", "Quarl", "Rathe", "Sorrow", "Tansy", "Umber", "Velden", "Wraye",
)  # fmt: skip
_TOWN_EVERY = 4


@dataclass(frozen=True)
class Question:
    """A question, its answers, the paragraphs that hold them and where; `more`: distractors that belong to them."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """Questions by sample, and paragraphs that answer none of them: `other(i)` is the i-th."""

    question: Question
    other: Callable[[int], str]
    num_others: int


class _World:
    """Names and facts of one sample; every name is used once."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.used: set[str] = set()
        self.towns = list(towns("any"))
        rng.shuffle(self.towns)

    def person_name(self) -> str:
        middle = ""
        while True:
            name = f"{self.rng.choice(sections()['first'])} {middle}{self.rng.choice(sections()['last'])}"
            middle = f"{self.rng.choice('ABCDEFGHIJKLMNOPRSTVW')}. "  # should the plain name be taken
            if name not in self.used:
                self.used.add(name)
                return name

    def town(self) -> dict[str, str]:
        rng = self.rng
        return {
            "name": self.towns.pop(),
            "founded": str(rng.randrange(1050, 1890)),
            "people": f"{rng.randrange(1100, 98000):,}",
            "river": rng.choice(_RIVERS),
            "trade": rng.choice(_TRADES),
            "mayor": self.person_name(),
        }

    def person(self, town: str = "") -> dict[str, str]:
        rng = self.rng
        return {
            "name": self.person_name(),
            "town": town or (self.towns.pop() if self.towns else rng.choice(towns("any"))),
            "born": str(rng.randrange(1790, 1990)),
            "work": rng.choice(sections()["professions"]),
            "instrument": rng.choice(sections()["instruments"]),
            "dish": rng.choice(sections()["dishes"]),
        }

    def paragraph(self, facts: dict[str, str]) -> str:
        """Title, then all facts in random order with two idle sentences between them."""
        frames: dict[str, Any] = _TOWN if "founded" in facts else _PERSON
        said = [self.rng.choice(frames[key][0]).format(**facts) for key in frames]
        self.rng.shuffle(said)
        first = next(i for i, text in enumerate(said) if facts["name"] in text)
        said.insert(0, said.pop(first))  # the subject is named before "it"
        for idle in prose.write(self.rng, 2):
            said.insert(self.rng.randrange(1, len(said) + 1), idle)
        return f"{facts['name']}\n{' '.join(said)}"


def invented(rng: random.Random, hops: int) -> Corpus:
    """A question and distractors of a world of its own.

    Args:    hops: 1, or 2 for a question whose answer needs two paragraphs.
    """
    world = _World(rng)
    town = world.town()
    person = world.person(town["name"])
    about: dict[str, str]
    if hops == 2:
        about, key = town, rng.choice(list(_TOWN))
        asked = _TOWN[key][2].format(person=person["name"])
        gold: tuple[str, ...] = (world.paragraph(person), world.paragraph(town))
    else:
        about = town if rng.random() < 0.5 else person
        frames: dict[str, Any] = _TOWN if about is town else _PERSON
        key = rng.choice(list(frames))
        asked = frames[key][1].format(name=about["name"])
        gold = (world.paragraph(about),)
    answer = about[key]
    answers = (answer, answer.replace(",", "")) if "," in answer else (answer,)

    def other(index: int) -> str:
        if index % _TOWN_EVERY == 0 and world.towns:
            return world.paragraph(world.town())
        return world.paragraph(world.person())

    return Corpus(Question(asked, answers, gold), other, 1 << 40)


def from_file(path: str, index: int, rng: random.Random) -> Corpus:
    """Question number `index` of a SQuAD (dev-v2.0.json) or HotpotQA (dev_distractor) file, others in random order."""
    questions, paragraphs = _read(path)
    question = questions[index % len(questions)]
    taken = {*question.gold, *question.more}
    others = [*question.more, *rng.sample([p for p in paragraphs if p not in taken], len(paragraphs) - len(taken))]
    return Corpus(question, others.__getitem__, len(others))


@cache
def _read(path: str) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; get dev-v2.0.json from https://rajpurkar.github.io/SQuAD-explorer or "
                        f"hotpot_dev_distractor_v1.json from https://hotpotqa.github.io") from None  # fmt: skip
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    try:
        questions, paragraphs = _hotpot(data) if isinstance(data, list) else _squad(data["data"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is neither SQuAD nor HotpotQA JSON (missing {error})") from None
    if not questions:
        raise ConfigError(f"{path} holds no question that has an answer")
    return tuple(questions), tuple(sorted(set(paragraphs)))


def _squad(articles: list[dict[str, Any]]) -> tuple[list[Question], list[str]]:
    questions = []
    for article in articles:
        texts = [paragraph["context"] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            more = tuple(dict.fromkeys(text for text in texts if text != paragraph["context"]))
            for asked in paragraph["qas"]:
                if not asked.get("is_impossible", False):
                    answers = tuple(answer["text"] for answer in asked["answers"])
                    questions.append(Question(asked["question"], answers, (paragraph["context"],), more))
    return questions, [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]


def _hotpot(data: list[dict[str, Any]]) -> tuple[list[Question], list[str]]:
    questions: list[Question] = []
    paragraphs: list[str] = []
    for asked in data:
        own = tuple(dict.fromkeys(f"{title}\n{''.join(lines)}" for title, lines in asked["context"]))
        paragraphs += own
        questions.append(Question(asked["question"], (asked["answer"],), own))
    return questions, paragraphs
