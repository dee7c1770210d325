"""RULER's 13 tasks (arXiv:2404.06654): prompts, limits and layouts of its generators, written anew.

Templates and answer prefixes are RULER's (Apache-2.0, scripts/data/synthetic/constants.py), word for word. Differences
in official mode: key words come from this project's lists instead of wonderwords, essays are the haystack given or this
project's prose, sentences are split by a regular expression, every sample is filled to its own exact size (RULER finds
one size for all, fwe's in steps of 1/32), and no needle's key or value occurs twice.
"""

from __future__ import annotations

import random
import string
import uuid
from functools import cache, partial
from itertools import pairwise

import numpy as np

from locret.errors import ConfigError
from locret.tasks import paragraphs
from locret.tasks.gauge import Draft, Plan, Units, Writer
from locret.tasks.haystack import NOISE
from locret.tasks.request import Request, TaskInfo, dense_meta
from locret.tasks.words import invented, sections, words

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH_HEAD = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
NIAH_QUESTION = "What are all the special magic {kind} for {query} mentioned in the provided text?"
NIAH_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
VT_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
VT_QUESTION = "Question: Find all variables that are assigned the value {query} in the text above."
VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {query}, they are: "
)
CWE_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
CWE_QUESTION = "Question: What are the 10 most common words in the above list?"
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FWE_HEAD = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
FWE_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
QA_ORDER = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
QA_HEAD = QA_ORDER + "\n\nThe following are given documents.\n\n"
QA_QUESTION = QA_ORDER + "\n\nQuestion: {query}"
QA_PREFIX = " Answer:"

_DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, num=40))]
_ICL_TOKENS = 500
_SHORT = 4096  # below it, RULER's cwe repeats words less often
_ZETA_2 = np.pi**2 / 6
_TRIES = 200


# ---------------------------------------------------------------------- needles


class Names:
    """Random keys and values, none twice in a sample. Hardened keys are words that no training sample had as a key."""

    def __init__(self, request: Request, stream: str):
        self.rng = request.rng(stream)
        self.split = "heldout" if request.hardened else "any"
        self.used: set[str] = set()

    def new(self, kind: str) -> str:
        for attempt in range(_TRIES):
            name = self._draw(kind)
            if name not in self.used:
                self.used.add(name)
                return name
            if attempt == _TRIES // 2:  # a million tokens of needles need more keys than are held out
                self.split = "any"
        raise ConfigError(f"no {kind} are left after {len(self.used):,} different ones; ask for a shorter length")

    def _draw(self, kind: str) -> str:
        rng = self.rng
        if kind == "numbers":
            return str(rng.randint(10**6, 10**7 - 1))
        if kind == "uuids":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        return f"{rng.choice(words('adjectives', self.split))}-{rng.choice(words('nouns', self.split))}"


def needles(
    request: Request, haystack: str, key: str, value: str, num_keys: int = 1, num_values: int = 1, num_queries: int = 1
) -> Plan:
    """needle in a haystack: `num_keys` keys with `num_values` values each, `num_queries` of them asked for.

    Args:    haystack: "noise", "essay", "needle";  key, value: "words", "numbers", "uuids".
    """
    names = Names(request, "needles")
    keys = [names.new(key) for _ in range(num_keys)]
    values = [[names.new(value) for _ in range(num_values)] for _ in keys]
    asked = request.rng("query").sample(range(num_keys), num_queries)
    lines = [
        (NEEDLE.format(kind=value, key=name, value=one), i in asked) for i, name in enumerate(keys) for one in values[i]
    ]
    request.layout().shuffle(lines)
    queries = [keys[i] for i in asked]
    query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
    single = num_queries * num_values == 1
    head, question, prefix = (
        singular(text, single).format(kind=value[:-1] if single else value, query=query)
        for text in (NIAH_HEAD, NIAH_QUESTION, NIAH_PREFIX)
    )
    answers = tuple(one for i in asked for one in values[i])

    def draft(pieces: list[tuple[str, bool]], separator: str, **meta: object) -> Draft:
        writer = Writer().add(head).join(separator, pieces).add("\n")
        return Draft(writer.text, question, answers, prefix, tuple(writer.spans), meta=meta)

    if haystack == "essay":
        return _in_essay(request, lines, draft)
    if haystack == "noise":
        return _in_lines(request, lines, noise(request), draft)
    units = Units(request.gauge, lambda i: NEEDLE.format(kind=value, key=names.new(key), value=names.new(value)), "\n")
    return _in_lines(request, lines, units, draft, dense=True)


def singular(text: str, single: bool) -> str:
    """RULER's template for one value: "A special magic number is ...", if `single`."""
    if not single:
        return text
    return text.replace("Some", "A").replace("are all", "is").replace("are", "is")


def noise(request: Request) -> Units:
    """RULER's noise, the same line again and again; hardened shuffles its five sentences, once a sample."""
    parts = NOISE.split(". ")
    line = NOISE
    if request.hardened:
        parts[-1] = parts[-1].removesuffix(".")
        request.rng("noise").shuffle(parts)
        line = ". ".join(parts) + "."
    return Units(request.gauge, lambda i: line, "\n")


def _in_essay(request: Request, lines: list[tuple[str, bool]], draft) -> Plan:  # type: ignore[no-untyped-def]
    start = request.start()

    def write(num_words: int) -> Draft:
        sentences = request.haystack.sentences(start, num_words)
        places = essay_places(request, len(lines), len(sentences))
        pieces: list[tuple[str, bool]] = []
        at = 0
        for place, line in zip(places, lines):
            pieces += [(" ".join(sentences[at:place]), False), line]
            at = place
        pieces.append((" ".join(sentences[at:]), False))
        return draft(pieces, " ", depths=[round(place / max(1, len(sentences)), 3) for place in places])

    return Plan(write, lambda n: request.haystack.cost(request.gauge, start, n), least=len(lines))


def essay_places(request: Request, num: int, num_sentences: int) -> list[int]:
    """Before which sentences the needles go: distinct ones of 40 even depths as published, any depths if hardened."""
    rng = request.rng("depth")
    if request.hardened:
        return sorted(int(num_sentences * rng.random()) for _ in range(num))
    return sorted(int(num_sentences * depth / 100) for depth in rng.sample(_DEPTHS, num))


def _in_lines(  # type: ignore[no-untyped-def]
    request: Request, lines: list[tuple[str, bool]], hay: Units, draft, dense: bool = False
) -> Plan:
    def write(num: int) -> Draft:
        pieces = [(text, False) for text in hay.first(num)]
        places = sorted(request.rng("depth").sample(range(num), len(lines)), reverse=True)
        for place, line in zip(places, lines):
            pieces.insert(place, line)
        meta = dense_meta(num, hay.cost(num)) if dense else {}
        return draft(pieces, "\n", depths=[round(place / num, 3) for place in places[::-1]], **meta)

    return Plan(write, hay.cost, least=len(lines))


# ---------------------------------------------------------------------- variable tracking


def variable_tracking(request: Request, num_hops: int = 4) -> Plan:
    """One chain of assignments in noise, after one solved example with names of three letters."""
    hay = noise(request)
    example = _chain_example(request, hay, num_hops)
    names, lines = _chain(request.rng("chain"), num_hops, 5)
    value = lines[0].rsplit(" ", 1)[1]

    def write(num: int) -> Draft:
        writer = Writer().add(example + "\n" + VT_HEAD)
        pieces, places = _chain_in_noise(request.rng("depth"), hay.first(num), lines)
        writer.join("\n", pieces).add("\n")
        prefix = VT_PREFIX.format(count=len(names), query=value)
        meta = {"depths": [round(place / num, 3) for place in places]}
        return Draft(writer.text, VT_QUESTION.format(query=value), tuple(names), prefix, tuple(writer.spans), meta=meta)

    return Plan(write, hay.cost, least=len(lines))


def _chain(rng: random.Random, num_hops: int, size: int) -> tuple[list[str], list[str]]:
    names: list[str] = []
    while len(names) <= num_hops:
        name = "".join(rng.choices(string.ascii_uppercase, k=size))
        if name not in names:
            names.append(name)
    lines = [f"VAR {names[0]} = {rng.randint(10000, 99998)}"]
    lines += [f"VAR {new} = VAR {old} " for old, new in pairwise(names)]
    return names, lines


def _chain_in_noise(
    rng: random.Random, noise_lines: list[str], chain: list[str]
) -> tuple[list[tuple[str, bool]], list[int]]:
    pieces = [(text, False) for text in noise_lines]
    places = sorted(rng.sample(range(len(noise_lines)), len(chain)))
    for i, (place, line) in enumerate(zip(places, chain)):
        pieces.insert(place + i, (line, True))
    return pieces, places


def _chain_example(request: Request, hay: Units, num_hops: int) -> str:
    """A solved sample of at most 500 tokens (but no less than five lines of noise)."""
    rng = request.rng("example")
    names, lines = _chain(rng, num_hops, 3)
    value = lines[0].rsplit(" ", 1)[1]
    tail = VT_QUESTION.format(query=value) + VT_PREFIX.format(count=len(names), query=value)
    frame = request.gauge.count(VT_HEAD + "\n".join(lines) + "\n" + tail)
    num = len(lines)
    while hay.cost(num + 1) <= _ICL_TOKENS - frame:
        num += 1
    pieces, _ = _chain_in_noise(rng, hay.first(num), lines)
    return VT_HEAD + "\n".join(text for text, _ in pieces) + "\n" + tail + " " + " ".join(names) + "\n"


# ---------------------------------------------------------------------- common and frequent words


@cache
def _plain_words() -> tuple[str, ...]:
    return tuple(
        sorted({word for section in sections().values() for word in section if word.isalpha() and word.islower()})
    )


@cache
def _more_words() -> tuple[str, ...]:
    """For lists longer than all of the project's words: invented ones (RULER takes a second dictionary)."""
    rng = random.Random("more words")
    return tuple(dict.fromkeys(invented(rng).lower() for _ in range(60_000)))


def common_words(request: Request) -> Plan:
    """A numbered list in which ten words occur often (30 times) and all others seldom (3 times); one solved example."""
    long = request.limit + 120 >= _SHORT
    often, seldom = (30, 3) if long else (6, 1)
    example_words = request.rng("example").sample(_plain_words(), 40 if long else 20)
    shown = _numbered(request, example_words, *((10, 3) if long else (3, 1)))
    answer = " ".join(f"{i}. {word}" for i, word in enumerate(example_words[:10], 1))
    example = f"{CWE_HEAD}{' '.join(shown)}\n{CWE_QUESTION}{CWE_PREFIX} {answer}\n"
    rng = request.rng("words")
    pool = rng.sample(_plain_words(), len(_plain_words()))
    units = Units(request.gauge, lambda i: pool[i] if i < len(pool) else _more_words()[i - len(pool)])
    numbers = Units(request.gauge, lambda i: f" {i + 1}. ")

    def cost(num: int) -> int:
        return (
            seldom * units.cost(num)
            + (often - seldom) * units.cost(10)
            + numbers.cost(10 * often + (num - 10) * seldom)
        )

    def write(num: int) -> Draft:
        chosen = units.first(num)
        common = set(chosen[:10])
        writer = Writer().add(example + CWE_HEAD)
        for i, entry in enumerate(_numbered(request, chosen, often, seldom)):
            number, word = entry.split(" ")
            writer.add((" " if i else "") + number + " ").add(word, gold=word in common)
        writer.add("\n")
        return Draft(writer.text, CWE_QUESTION, tuple(chosen[:10]), CWE_PREFIX, tuple(writer.spans))

    return Plan(write, cost, least=11, most=len(pool) + len(_more_words()))


def _numbered(request: Request, chosen: list[str], often: int, seldom: int) -> list[str]:
    entries = chosen[:10] * often + chosen[10:] * seldom
    request.layout().shuffle(entries)
    return [f"{i}. {word}" for i, word in enumerate(entries, 1)]


def frequent_words(request: Request, alpha: float = 2.0) -> Plan:
    """Coded words whose frequencies follow a zeta law; the most frequent is shown as dots, the next three are asked."""
    rng = request.rng("words")
    size = max(8, request.limit // 50)
    coded: set[str] = set()
    while len(coded) < size:
        coded.add("".join(rng.choices(string.ascii_lowercase, k=6)))
    vocabulary = sorted(coded)
    request.layout().shuffle(vocabulary)
    vocabulary[0] = "..."
    counts = np.array(request.gauge.counts([" " + word for word in vocabulary]))
    ranks = np.arange(1, size + 1)
    total = _ZETA_2 if alpha == 2.0 else float((np.arange(1, 100_000) ** -alpha).sum())
    gold = set(vocabulary[1:4])

    def times(num: int) -> np.ndarray:
        return (num * ranks**-alpha / total).astype(int)

    def write(num: int) -> Draft:
        text = [word for word, count in zip(vocabulary, times(num)) for _ in range(count)]
        request.layout().shuffle(text)
        writer = Writer().add(FWE_HEAD).join(" ", [(word, word in gold) for word in text]).add("\n")
        return Draft(writer.text, FWE_QUESTION, tuple(vocabulary[1:4]), FWE_PREFIX, tuple(writer.spans))

    return Plan(write, lambda num: int(times(num) @ counts), least=60 if alpha == 2.0 else 200)


# ---------------------------------------------------------------------- questions about documents


def documents_qa(request: Request, hops: int, pool: str | None = None) -> Plan:
    """A question among numbered documents.

    Args:    pool: a SQuAD or HotpotQA JSON file; without it, invented towns and people (`paragraphs`).
    """
    rng = request.rng("facts")
    corpus = paragraphs.invented(rng, hops) if pool is None else paragraphs.from_file(pool, request.index, rng)
    question = corpus.question
    units = Units(request.gauge, corpus.other, "\n\nDocument 100:\n")

    def write(num: int) -> Draft:
        texts = [(text, True) for text in question.gold] + [(text, False) for text in units.first(num)]
        request.layout().shuffle(texts)
        writer = Writer().add(QA_HEAD)
        for i, (text, gold) in enumerate(texts, 1):
            writer.add(("\n\n" if i > 1 else "") + f"Document {i}:\n").add(text, gold)
        writer.add("\n\n")
        return Draft(
            writer.text, QA_QUESTION.format(query=question.text), question.answers, QA_PREFIX, tuple(writer.spans)
        )

    return Plan(write, units.cost, least=0, most=corpus.num_others)


# ---------------------------------------------------------------------- the registry


def _niah(name: str, summary: str, hardened: int, **options: object) -> TaskInfo:
    return TaskInfo(
        name, "ruler", summary, "string_match_all", {"official": 128, "hardened": hardened},
        partial(needles, **options), dense=options["haystack"] == "needle", counts_generated=True,  # type: ignore[arg-type]
    )  # fmt: skip


def _other(name: str, summary: str, official: int, hardened: int, build, metric: str = "string_match_all") -> TaskInfo:  # type: ignore[no-untyped-def]
    return TaskInfo(
        name, "ruler", summary, metric, {"official": official, "hardened": hardened}, build, counts_generated=True
    )


_WORD = dict(key="words", value="numbers")
TASKS = (
    _niah("niah_single_1", "one number in repeated noise", 12, haystack="noise", **_WORD),
    _niah("niah_single_2", "one number in prose", 12, haystack="essay", **_WORD),
    _niah("niah_single_3", "one uuid in prose", 40, haystack="essay", key="words", value="uuids"),
    _niah("niah_multikey_1", "one of four numbers in prose", 12, haystack="essay", num_keys=4, **_WORD),
    _niah("niah_multikey_2", "one number among nothing but numbers", 12, haystack="needle", **_WORD),
    _niah("niah_multikey_3", "one uuid among nothing but uuids", 40, haystack="needle", key="uuids", value="uuids"),
    _niah("niah_multivalue", "all four numbers of one key in prose", 48, haystack="essay", num_values=4, **_WORD),
    _niah("niah_multiquery", "four keys' numbers in prose", 48, haystack="essay", num_keys=4, num_queries=4, **_WORD),
    _other("vt", "variables assigned one value through a chain", 30, 30, variable_tracking),
    _other("cwe", "the ten most common words of a list", 120, 60, common_words),
    _other("fwe", "the three most frequent coded words", 50, 24, frequent_words),
    _other(
        "qa_1", "a fact stated in one of many documents", 32, 16, partial(documents_qa, hops=1), "string_match_part"
    ),
    _other(
        "qa_2", "a fact that needs two of many documents", 32, 16, partial(documents_qa, hops=2), "string_match_part"
    ),
)
