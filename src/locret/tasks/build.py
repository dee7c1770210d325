"""Documents of an exact length, with facts at random depths and questions about them.

Sparse tasks put a few facts between the sentences of a filler text. Dense tasks are nothing but distractors: every line
states a value for another key, so a policy that has not seen the question cannot know what matters.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locret.errors import ConfigError, unknown
from locret.tasks import families as f
from locret.tasks import wordings as w
from locret.tasks.base import BREAK, Question, Sample, overhead
from locret.tasks.encode import MARKED_WEIGHT, Encoder, encoder_of
from locret.tasks.filler import Filler
from locret.tasks.grammar import Flat, Rendered, Slot, check_wording, fill, fixed, flatten, parse

DEFAULT_FACTS = 4
FAMILIES = ("number", "word", "fact", "passkey", "chain", "multivalue")
HELD_OUT_FAMILIES = ("word", "passkey")  # never in the training data of retaining heads


@dataclass(frozen=True)
class TaskInfo:
    """What a task is. `held_out_from_head_training`: heads are measured on it but never trained on it."""

    summary: str
    dense: bool
    held_out_from_head_training: bool
    max_new_tokens: int
    families: tuple[str, ...]
    training_only: bool = False


TASKS: dict[str, TaskInfo] = {
    "number": TaskInfo("the number of a key, in prose", False, False, 12, ("number",)),
    "word": TaskInfo("the word of a key, in prose", False, True, 12, ("word",)),
    "fact": TaskInfo("where a person lives, works, was born ..., in prose", False, False, 16, ("fact",)),
    "passkey": TaskInfo("the pass key, in prose", False, True, 12, ("passkey",)),
    "chain": TaskInfo("a chain of assignments back to its value, in prose", False, False, 48, ("chain",)),
    "multivalue": TaskInfo("the two to four numbers of one key, in prose", False, False, 48, ("multivalue",)),
    "mixed": TaskInfo("facts of all families in one text", False, False, 48, FAMILIES),
    "multikey2": TaskInfo("the number of one key among nothing but keys", True, False, 12, ("multikey2",)),
    "multikey3": TaskInfo("the uuid of one uuid among nothing but uuids", True, False, 44, ("multikey3",)),
    "kv": TaskInfo("the value of one key of a JSON object of uuids", True, False, 44, ("kv",)),
    "verbatim": TaskInfo("the tokens that follow a quotation", False, False, 16, ("verbatim",), training_only=True),
    "repeat": TaskInfo("random spans that repeat; no question", True, False, 0, ("repeat",), training_only=True),
}  # fmt: skip


def build(
    task: str,
    *,
    seed: int | str,
    length: int,
    tokenizer: Any,
    filler: Filler,
    num_questions: int = 1,
    num_facts: int | None = None,
    wording: str = "any",
    values: str = "any",
    families: Sequence[str] | None = None,
) -> Sample:
    """One sample, whose prompt of shape one_turn for question 0 has exactly `length` tokens.

    Args:    num_facts: facts in a sparse document (default 4);  wording: "train", "heldout", "official", "any";
             values: "train", "heldout", "any" (which words serve as keys and values);  families: of the task `mixed`.
    Returns: the same bytes for the same arguments.
    Raises:  ConfigError: unknown names, or a length too short for the facts.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    check_wording(wording)
    rng = random.Random(f"{task}:{seed}")
    plan = Plan(task, wording, values, num_questions, num_facts, tuple(families or TASKS[task].families))
    sample = compose(rng, plan, tokenizer, filler, fit_prompt(tokenizer, length, "one_turn", seed), seed)
    if sample.questions:
        assert len(sample.prompt_ids(tokenizer)) == length, "a sample missed its length"
    return sample


def score(answer: str, prediction: str, task: str) -> float:
    """1.0 for an exact match after stripping white space and a final full stop, else 0.0.

    >>> score("1234567", " 1234567.", "number"), score("1, 2", "1,2", "multivalue"), score("1, 2", "2, 1", "multivalue")
    (1.0, 1.0, 0.0)
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    return float(_normal(answer) == _normal(prediction))


def _normal(text: str) -> str:
    return ", ".join(part.strip() for part in text.strip().rstrip(".").strip().split(","))


# ---- plans: what a document holds ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What to build. `fill`: share of a dense document that distractors may take (the rest is prose)."""

    task: str
    wording: str = "train"
    values: str = "train"
    num_questions: int = 1
    num_facts: int | None = None
    families: tuple[str, ...] = ()
    hard: bool = False  # chains are asked for every variable, facts come with hard distractors
    fill: float = 1.0
    chain_share: float = 0.2
    garble: float = 0.0  # this and the next three: see families.World; training only
    strange: float = 0.0
    value_first: float = 0.0
    vocabulary: tuple[str, ...] = field(default=(), repr=False)


Fit = Callable[[tuple[Question, ...]], int]  # questions -> tokens the document must have


def fit_prompt(tokenizer: Any, length: int, shape: str, seed: int | str) -> Fit:
    """The prompt of question 0 has `length` tokens (a sample without questions: its training ids)."""
    return lambda questions: length - overhead(tokenizer, questions[:1], shape, closed=not questions, seed=seed)


def fit_training(tokenizer: Any, length: int, shape: str, seed: int | str, gap: str = BREAK) -> Fit:
    """The training ids, with all questions and answers, have `length` tokens."""
    return lambda questions: length - overhead(tokenizer, questions, shape, closed=True, seed=seed, gap=gap)


def compose(rng: random.Random, plan: Plan, tokenizer: Any, filler: Filler, fit: Fit, seed: int | str) -> Sample:
    """Build the sample of a plan; `fit` tells how long the document must be, once the questions are known."""
    encoder = encoder_of(tokenizer)
    if plan.task == "repeat":
        return _repeat(rng, encoder, filler, fit(()), seed)
    if plan.task == "verbatim":
        return _verbatim(rng, plan, tokenizer, filler, fit, seed)
    return (
        _dense(rng, plan, encoder, filler, fit, seed)
        if TASKS[plan.task].dense
        else _sparse(rng, plan, encoder, filler, fit, seed)
    )


def make_facts(world: f.World, plan: Plan) -> list[f.Fact]:
    """The facts of a sparse document, in no order; never two that answer one question differently."""
    rng = world.rng
    count = DEFAULT_FACTS if plan.num_facts is None else plan.num_facts
    if plan.families == ("passkey",):
        return [f.passkey_fact(world)]
    facts: list[f.Fact] = []
    while len(facts) < count:
        family = plan.families[0]
        if len(plan.families) > 1:
            family = _draw_family(rng, plan)
            if family == "passkey" and any(fact.family == "passkey" for fact in facts):
                family = "number" if "number" in plan.families else "fact"
        facts.append(_fact(world, family, plan))
    return facts


_SHARES = {"number": 0.25, "word": 0.22, "fact": 0.4, "passkey": 0.07, "multivalue": 0.06}


def _draw_family(rng: random.Random, plan: Plan) -> str:
    if "chain" in plan.families and rng.random() < plan.chain_share:
        return "chain"
    names = [name for name in plan.families if name != "chain"]
    return rng.choices(names, [_SHARES[name] for name in names])[0]


def _fact(world: f.World, family: str, plan: Plan) -> f.Fact:
    rng = world.rng
    near = plan.hard and rng.random() < 0.35  # the same key with the other attribute, or the same person again
    if family in ("number", "word"):
        free = [key for key in world.keys if (key, family) not in world.attributes] if near else []
        key = free[int(rng.random() * len(free))] if free else None
        return (f.number_fact if family == "number" else f.word_fact)(world, key)
    if family == "fact":
        busy = world.persons if near else []
        free = [person for person in busy if sum(name == person for name, _ in world.attributes) < 5]
        return f.relation_fact(world, free[int(rng.random() * len(free))] if free else None)
    if family == "chain":
        return f.chain_fact(world, rng.choice((0, 1, 1, 2, 2, 3, 3, 4, 4)) if plan.hard else None)
    return f.multivalue_fact(world) if family == "multivalue" else f.passkey_fact(world)


def _choose_asks(rng: random.Random, facts: list[f.Fact], plan: Plan) -> list[tuple[int, f.Ask]]:
    """Which facts are asked for, all different ones as long as there are some."""
    options = [(place, ask) for place, fact in enumerate(facts) for ask in (fact.asks if plan.hard else fact.asks[:1])]
    if plan.hard:  # the end of a chain more often than its middle
        options = [o for o in options if o[1] is facts[o[0]].asks[0] or rng.random() < 0.4]
    chosen = rng.sample(options, min(plan.num_questions, len(options)))
    if not plan.hard and len(chosen) < plan.num_questions:
        raise ConfigError(
            f"{plan.num_questions} questions about {len(options)} facts; lower num_questions or raise num_facts"
        )
    return chosen


# ---- sparse documents ---------------------------------------------------------------------------------------------


@dataclass
class _Piece:
    """An encoded statement: where it belongs (fact, own line) and its ids."""

    fact: int
    own_line: bool
    ids: list[int]
    weights: list[float]


def _sparse(rng: random.Random, plan: Plan, encoder: Encoder, filler: Filler, fit: Fit, seed: int | str) -> Sample:
    world = f.World(
        rng, plan.wording, plan.values, garble=plan.garble, strange=plan.strange, value_first=plan.value_first,
        vocabulary=plan.vocabulary,
    )  # fmt: skip
    facts = make_facts(world, plan)
    asks = _choose_asks(rng, facts, plan)
    drafts = [
        Question(ask.make(rng, plan.wording), ask.answer, facts[place].family, plan.wording, ()) for place, ask in asks
    ]
    pieces = [_piece(rng, encoder, i, text, plan) for i, fact in enumerate(facts) for text in fact.statements]
    total = fit(tuple(drafts))
    room = total - sum(len(piece.ids) for piece in pieces)
    if room < 0:
        raise ConfigError(
            f"a document of {total} tokens cannot hold {len(facts)} facts; raise length or lower num_facts"
        )
    text, breaks = filler.take(rng, room)
    document, weights, spans = _weave(rng, pieces, text, breaks, encoder)
    questions = tuple(
        Question(q.text, q.answer, q.family, q.wording, tuple(spans[place]))
        for q, (place, _) in zip(drafts, asks, strict=True)
    )
    return Sample(plan.task, document, questions, weights, seed, {"num_facts": len(facts)})


def _piece(rng: random.Random, encoder: Encoder, fact: int, statement: Rendered, plan: Plan) -> _Piece:
    text = statement.text
    closed = text[-1] in '.!?")'
    own_line = plan.wording != "official" and rng.random() < (0.12 if closed else 0.7)
    lead = "\n" if own_line else " "
    tail = "" if own_line or closed else "."
    moved = Rendered(lead + text + tail, tuple((a + 1, b + 1) for a, b in statement.marks))
    return _Piece(fact, own_line, *encoder.weighted(moved))


def _weave(
    rng: random.Random, pieces: list[_Piece], text: NDArray[np.int32], breaks: NDArray[np.int64], encoder: Encoder
) -> tuple[NDArray[np.int32], NDArray[np.float32], dict[int, list[tuple[int, int]]]]:
    """Put the pieces between sentences at uniform depths; statements of one fact keep their order."""
    line_ends = breaks[text[breaks] == encoder.ids("\n")[0]] if len(breaks) else breaks
    by_fact: dict[int, list[int]] = {}
    for place, piece in enumerate(pieces):
        by_fact.setdefault(piece.fact, []).append(place)
    placed: list[tuple[int, float, int]] = []
    for members in by_fact.values():
        offsets = sorted(_offset(rng, pieces[m], len(text), breaks, line_ends) for m in members)
        ties = sorted(rng.random() for _ in members)
        placed += zip(offsets, ties, members, strict=True)
    placed.sort()
    ids: list[Any] = []
    weights: list[Any] = []
    spans: dict[int, list[tuple[int, int]]] = {}
    done = length = 0
    for offset, _, place in placed:
        piece = pieces[place]
        ids += [text[done:offset], piece.ids]
        weights += [np.ones(offset - done, np.float32), piece.weights]
        length += offset - done
        spans.setdefault(piece.fact, []).append((length, length + len(piece.ids)))
        length += len(piece.ids)
        done = offset
    ids.append(text[done:])
    weights.append(np.ones(len(text) - done, np.float32))
    return _join(ids, np.int32), _join(weights, np.float32), spans


def _offset(
    rng: random.Random, piece: _Piece, size: int, breaks: NDArray[np.int64], line_ends: NDArray[np.int64]
) -> int:
    options = line_ends if piece.own_line and len(line_ends) > 4 else breaks
    if not len(options):
        return 0 if rng.random() < 0.5 else size
    place = int(np.searchsorted(options, rng.random() * size))
    return int(options[min(place, len(options) - 1)])


def _join(parts: list[Any], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.asarray(part, dtype=dtype) for part in parts]) if parts else np.zeros(0, dtype)


# ---- dense documents ----------------------------------------------------------------------------------------------

_ENDS_SLACK = 4  # tokens that the first and the last line may be longer than the others
_PREAMBLES = (
    "A special magic {what} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {what} afterwards.",
    "Here is a list. Read it with care.",
    "The following entries must be remembered.",
    "Below is a table of {what}s.",
    "Data:",
)


@dataclass
class _DenseStyle:
    """How one dense document writes its pairs: `head`, then a line per pair; the first and last may look different."""

    head: str
    line: Flat
    key: Callable[[], str]
    value: Callable[[], str]
    attribute: str
    attr: str
    first: Flat = ()
    last: Flat = ()

    def render(self, key: str, value: str, frame: Flat = ()) -> Rendered:
        """One line; `frame` instead of the usual one."""
        return fill(frame or self.line, {"key": key, "value": value})


def _dense(rng: random.Random, plan: Plan, encoder: Encoder, filler: Filler, fit: Fit, seed: int | str) -> Sample:
    world = f.World(
        rng, plan.wording, plan.values, strange=plan.strange, value_first=plan.value_first, vocabulary=plan.vocabulary
    )
    style = _style(rng, world, plan)
    asked = [(world.fresh(style.key), world.fresh(style.value)) for _ in range(max(1, plan.num_questions))]
    drafts = tuple(
        Question(_dense_ask(rng, style, key, value, plan), value, plan.task, plan.wording, ()) for key, value in asked
    )
    total = fit(drafts)
    head = encoder.ids(style.head)
    pairs = [(key, value, place) for place, (key, value) in enumerate(asked)]
    lines = [(*encoder.weighted(style.render(key, value)), place) for key, value, place in pairs]
    used = len(head) + sum(len(line[0]) for line in lines) + _ENDS_SLACK
    if used > total:
        raise ConfigError(
            f"a document of {total} tokens cannot hold {len(asked)} pairs; raise length or lower num_questions"
        )
    target = used + int((total - used) * plan.fill)
    while True:
        key, value = style.key(), style.value()
        if key in world.used or value in world.used:
            continue
        ids, weights = encoder.weighted(style.render(key, value))
        if used + len(ids) > target:
            break
        world.used |= {key, value}
        if len(world.keys) < 200:
            world.keys.append(key)
        pairs.append((key, value, -1))
        lines.append((ids, weights, -1))
        used += len(ids)
    order = rng.sample(range(len(lines)), len(lines))
    lines = [lines[i] for i in order]
    for edge, frame in ((0, style.first), (-1, style.last)):
        if frame and len(lines) > 1:
            key, value, place = pairs[order[edge]]
            lines[edge] = (*encoder.weighted(style.render(key, value, frame)), place)
    used = len(head) + sum(len(line[0]) for line in lines)
    assert used <= total, "the first and the last line are longer than foreseen"
    return _assemble(rng, plan, drafts, head, lines, filler.take(rng, total - used), seed)


def _assemble(
    rng: random.Random,
    plan: Plan,
    drafts: tuple[Question, ...],
    head: list[int],
    lines: list[tuple[list[int], list[float], int]],
    taken: tuple[NDArray[np.int32], NDArray[np.int64]],
    seed: int | str,
) -> Sample:
    """Prose (what is left of the length), then the block of lines; a half-full document also gets prose behind it."""
    prose, breaks = taken
    cut = len(prose)
    if plan.fill < 1 and len(breaks):
        cut = int(breaks[int(rng.random() * len(breaks))])
    ids: list[Any] = [prose[:cut], head]
    weights: list[Any] = [np.ones(cut + len(head), np.float32)]
    spans: dict[int, tuple[int, int]] = {}
    at = cut + len(head)
    flat_ids: list[int] = []
    flat_weights: list[float] = []
    for line_ids, line_weights, place in lines:
        if place >= 0:
            spans[place] = (at, at + len(line_ids))
        flat_ids += line_ids
        flat_weights += line_weights
        at += len(line_ids)
    ids += [flat_ids, prose[cut:]]
    weights += [flat_weights, np.ones(len(prose) - cut, np.float32)]
    questions = tuple(Question(q.text, q.answer, q.family, q.wording, (spans[i],)) for i, q in enumerate(drafts))
    return Sample(
        plan.task, _join(ids, np.int32), questions, _join(weights, np.float32), seed, {"num_facts": len(lines)}
    )


def _style(rng: random.Random, world: f.World, plan: Plan) -> _DenseStyle:
    if plan.task == "kv":
        return _kv_style(rng, world, plan)
    attribute = "number" if plan.task == "multikey2" else "uuid"
    turned = world.turned()
    official = not turned and (plan.wording == "official" or (plan.wording in ("train", "any") and rng.random() < 0.5))
    frame, attr = f.keyed_statement(rng, attribute, "official" if official else plan.wording, turned)
    lead = " " if plan.wording == "train" and rng.random() < 0.25 else "\n"
    stop = "." if lead == " " and not (isinstance(frame[-1], str) and frame[-1][-1:] in ".!?") else ""
    frame = (lead, *frame, stop)
    head = fill(fixed(_PREAMBLES[0] if official else rng.choice(_PREAMBLES)), {"what": attr}, ("what",)).text
    head = "\n" + head if plan.wording == "official" or (plan.wording != "heldout" and rng.random() < 0.3) else ""
    if plan.task == "multikey2":
        return _DenseStyle(head, frame, world.pair_key, lambda: str(rng.randrange(10**6, 10**7)), attribute, attr)
    return _DenseStyle(head, frame, lambda: uuid(rng), lambda: uuid(rng), attribute, attr)


_KV_TABLES = (  # (opening, line) of other ways to write keys and values; § stands for the key, % for the value
    ("\n{", '\n  "§": "%",'),
    ("\nkey,value", "\n§,%"),
    ("", "\n§: %"),
    ("", "\n§ -> %"),
    ("\n| key | value |", "\n| § | % |"),
    ("", "\n§ = %"),
    ("", "\nKey: § Value: %"),
    ("\ndict:", "\n'§': '%',"),
)


def _table_line(text: str) -> Flat:
    """'"§": "%",' as a frame: braces mean themselves here."""
    slots = {"§": Slot("key", False), "%": Slot("value", False)}
    return tuple(slots.get(part, part) for part in re.split("([§%])", text) if part)


def _kv_style(rng: random.Random, world: f.World, plan: Plan) -> _DenseStyle:
    """One JSON line as in InfiniteBench, or (training) other tables; keys and values may be shorter than uuids."""
    json = plan.wording in ("official", "heldout") or rng.random() < 0.5
    head, line = ("\nJSON data:\n", ' "§": "%",') if json else rng.choice(_KV_TABLES)
    short = not json and rng.random() < 0.35
    kinds: list[Callable[[], str]] = [
        lambda: uuid(rng),
        world.pair_key,
        lambda: str(rng.randrange(10**4, 10**8)),
        lambda: f.invented(rng) + str(rng.randrange(100)),
    ]
    key = rng.choice(kinds[1:]) if short else kinds[0]
    value = rng.choice(kinds[1:]) if short else kinds[0]
    first, last = ('{"§": "%",', ' "§": "%"}') if json else ("", "")
    return _DenseStyle(head, _table_line(line), key, value, "kv", "value", _table_line(first), _table_line(last))


def _dense_ask(rng: random.Random, style: _DenseStyle, key: str, value: str, plan: Plan) -> str:
    if style.attribute != "kv":
        return f.keyed_ask(key, style.attribute, style.attr, value).make(rng, plan.wording)
    frame = parse(w.KV_ASKS.train[0]) if plan.wording == "official" else w.KV_ASKS.pick(rng, plan.wording)
    return fill(flatten(rng, frame, {}, plan.wording), {"key": key}).text


def uuid(rng: random.Random) -> str:
    """A random uuid in lower-case hex.

    >>> len(uuid(random.Random(0)))
    36
    """
    text = f"{rng.getrandbits(128):032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


# ---- tasks that teach copying -------------------------------------------------------------------------------------


def _repeat(rng: random.Random, encoder: Encoder, filler: Filler, total: int, seed: int | str) -> Sample:
    """Spans of random tokens, or of text, some of which come again."""
    low = max(encoder.special_ids, default=-1) + 1
    pick = np.random.default_rng(rng.getrandbits(64))
    spans: list[NDArray[np.int32]] = []
    ids: list[NDArray[np.int32]] = []
    weights: list[NDArray[np.float32]] = []
    size = 0
    while size < total:
        if spans and rng.random() < 0.55:
            span, weight = spans[int(rng.random() * len(spans))], 1.0
        else:
            count = rng.randrange(8, 65)
            if rng.random() < 0.7:
                span, weight = pick.integers(low, encoder.vocab_size, count).astype(np.int32), MARKED_WEIGHT
            else:
                span, weight = filler.take(rng, count)[0], 1.0
            spans.append(span)
        ids.append(span)
        weights.append(np.full(len(span), weight, np.float32))
        weights[-1][0] = MARKED_WEIGHT
        size += len(span)
    return Sample("repeat", _join(ids, np.int32)[:total], (), _join(weights, np.float32)[:total], seed)


_VERBATIM_ASKS = (
    'What comes right after "{quote}"?',
    'Continue: "{quote}"',
    'Continue the passage that begins with "{quote}".',
    "Which words follow: {quote}",
    'The text says "{quote}". How does it go on?',
    "{quote}",
    "Quote the words after: {quote}",
    'After "{quote}" the text goes on with',
    'Find "{quote}" and copy what stands next.',
    'Complete the sentence of the text: "{quote} ..."',
)


_SLACK = 1024


def _verbatim(rng: random.Random, plan: Plan, tokenizer: Any, filler: Filler, fit: Fit, seed: int | str) -> Sample:
    """The question quotes 6 to 12 tokens that occur once; the answer is the 6 to 9 tokens that follow."""
    long_question = Question("word " * 40, "word " * 12, "verbatim", plan.wording, ())
    room = fit((long_question,) * plan.num_questions)
    if room < 64:
        raise ConfigError(f"too short for {plan.num_questions} quotations; raise length or lower num_questions")
    text, _ = filler.take(rng, room + _SLACK)
    starts = np.flatnonzero(encoder_of(tokenizer).word_starts[text[:room]])
    questions: list[Question] = []
    for _ in range(60 * plan.num_questions):
        found = _quotation(rng, text, starts, encoder_of(tokenizer), tokenizer)
        if found is not None:
            quote, answer, span = found
            asked = rng.choice(_VERBATIM_ASKS).replace("{quote}", quote)
            questions.append(Question(asked, answer, "verbatim", plan.wording, (span,)))
            if len(questions) == plan.num_questions:
                break
    if not questions:
        raise ConfigError("found no words in the filler that occur once; give more text")
    total = fit(tuple(questions))
    if not room <= total <= len(text):
        raise ConfigError("the quotations are longer than foreseen; draw others")
    return Sample("verbatim", text[:total], tuple(questions), np.ones(total, np.float32), seed)


def _quotation(
    rng: random.Random, text: NDArray[np.int32], starts: NDArray[np.int64], encoder: Encoder, tokenizer: Any
) -> tuple[str, str, tuple[int, int]] | None:
    """Quote, answer, span of both; None if the words at the place drawn do not serve."""
    first = int(rng.random() * max(1, len(starts) - 24))
    if first + 24 > len(starts):
        return None
    begin = int(starts[first])
    middle, end = (int(starts[np.searchsorted(starts, at)]) for at in (begin + rng.randrange(6, 11), begin + 17))
    if middle - begin > 12 or not 4 <= end - middle <= 12:
        return None
    quote, answer = text[begin:middle], text[middle:end]
    said, told = tokenizer.decode(quote.tolist()).strip(), tokenizer.decode(answer.tolist()).strip()
    if "\n" in said + told or encoder.ids(" " + told) != answer.tolist() or text.tobytes().count(quote.tobytes()) != 1:
        return None
    return said, told, (begin, end)
