"""Prompts of a given length: units are measured once, a sample is written once or twice, and never token by token.

A task gives a `Plan`: how to write a draft from n units, and about what n units cost. `fit` finds the largest n whose
whole prompt, counted for real through the chat template, fits the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from locret import chat
from locret.errors import ConfigError
from locret.tasks.encode import Encoder, encoder_of
from locret.tasks.records import Record, Turn

_MOST_CACHED = 200_000
_ROUNDS = 12


@dataclass(frozen=True)
class Draft:
    """The texts of a sample; see `records.Record`."""

    context: str
    question: str
    answers: tuple[str, ...]
    answer_prefix: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    turns: tuple[Turn, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A sample whose size is open.

    Attributes:
        write: a draft with n units; the same n gives the same draft.
        cost: about how many tokens n units are; rises with n.
        least, most: numbers of units that make sense.
    """

    write: Callable[[int], Draft]
    cost: Callable[[int], int]
    least: int = 1
    most: int = 1 << 40


class Writer:
    """Joins texts and remembers where the gold ones lie."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._size = 0
        self.spans: list[tuple[int, int]] = []

    def add(self, text: str, gold: bool = False) -> Writer:
        if gold and text:
            self.spans.append((self._size, self._size + len(text)))
        self._parts.append(text)
        self._size += len(text)
        return self

    def join(self, separator: str, pieces: Sequence[tuple[str, bool]]) -> Writer:
        """(text, gold) pieces with a separator between them."""
        for i, (text, gold) in enumerate(pieces):
            if i:
                self.add(separator)
            self.add(text, gold)
        return self

    @property
    def text(self) -> str:
        return "".join(self._parts)


class Gauge:
    """Counts tokens with one tokenizer; get it from `gauge_of`, so that what it has measured is shared."""

    def __init__(self, tokenizer: Any):
        self.turns = chat.Turns.of(tokenizer)
        self._tokenizer = tokenizer
        self._cache: dict[str, int] = {}
        try:
            self._encoder: Encoder | None = encoder_of(tokenizer)
        except ValueError:  # a template that repeats a message: only counting is needed here
            self._encoder = None

    @property
    def quick(self) -> Callable[[str], int] | None:
        """A count ten times faster than `count`, right for most texts; None where this tokenizer has none."""
        if self._encoder is None or not self._encoder._separable:
            return None
        encoder = self._encoder
        return lambda text: len(encoder.ids(text))

    def count(self, text: str) -> int:
        """Tokens of a text; special tokens stand in it, none are added."""
        return self._direct([text])[0]

    def counts(self, units: Sequence[str]) -> list[int]:
        """About the tokens of many short texts, remembered."""
        new = [unit for unit in dict.fromkeys(units) if unit not in self._cache]
        if len(self._cache) + len(new) > _MOST_CACHED:
            self._cache.clear()
            new = list(dict.fromkeys(units))
        quick = self.quick
        counted = [quick(unit) for unit in new] if quick else self._direct(new)
        self._cache.update(zip(new, counted, strict=True))
        return [self._cache[unit] for unit in units]

    def prompt(self, sample: Draft | Record) -> str:
        """The whole text that a model reads: template, context, question, template, answer prefix."""
        turns = self.turns
        return turns.begin + sample.context + sample.question + turns.end + sample.answer_prefix

    def _direct(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [len(ids) for ids in self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        return [len(found) for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


_GAUGES: WeakKeyDictionary[Any, Gauge] = WeakKeyDictionary()


def gauge_of(tokenizer: Any) -> Gauge:
    """The gauge of this tokenizer object; made once."""
    found = _GAUGES.get(tokenizer)
    if found is None:
        found = _GAUGES[tokenizer] = Gauge(tokenizer)
    return found


class Units:
    """A list of texts that grows when it is measured: `make(i)` writes the i-th, its cost includes `separator`."""

    def __init__(self, gauge: Gauge, make: Callable[[int], str], separator: str = ""):
        self.gauge, self.make, self.separator = gauge, make, separator
        self.texts: list[str] = []
        self._sums = [0]

    def cost(self, num: int) -> int:
        """Tokens of the first `num` units."""
        if num > len(self.texts):
            new = [self.make(i) for i in range(len(self.texts), num)]
            self.texts += new
            for count in self.gauge.counts([unit + self.separator for unit in new]):
                self._sums.append(self._sums[-1] + count)
        return self._sums[num]

    def first(self, num: int) -> list[str]:
        self.cost(num)
        return self.texts[:num]


def fit(plan: Plan, gauge: Gauge, limit: int, name: str) -> tuple[Draft, int]:
    """The draft with the most units whose prompt has at most `limit` tokens, and how many it has.

    Raises: ConfigError: even the fewest units do not fit.
    """
    if gauge.quick is not None:
        draft, size = _fit(plan, gauge, gauge.quick, limit)
        if size <= limit and gauge.count(gauge.prompt(draft)) == size:
            return draft, size
    draft, size = _fit(plan, gauge, gauge.count, limit)
    if size > limit:
        raise ConfigError(
            f"task {name!r} needs at least {size} tokens of prompt with this tokenizer, {limit} are left for it; "
            f"ask for a greater length"
        )
    return draft, size


def _fit(plan: Plan, gauge: Gauge, count: Callable[[str], int], limit: int) -> tuple[Draft, int]:
    """The same with this way of counting; the smallest draft where nothing fits."""
    low, best = plan.least, plan.write(plan.least)
    num, size = low, count(gauge.prompt(best))
    if size > limit:
        return best, size
    best_size, high = size, plan.most + 1
    for _ in range(_ROUNDS):  # units cost nearly the same in the text: one or two rounds
        # what the prompt costs beside its units, as seen at the last size
        guess = _most(plan, limit - (size - plan.cost(num)))
        if guess == num == low or high - low == 1:
            break
        num = guess if low < guess < high else (low + high) // 2 if high <= plan.most else plan.most
        draft = plan.write(num)
        size = count(gauge.prompt(draft))
        if size <= limit:
            low, best, best_size = num, draft, size
        else:
            high = num
    return best, best_size


def _most(plan: Plan, budget: int) -> int:
    """The most units that cost at most `budget` (or plan.least)."""
    low = high = plan.least
    while high < plan.most and (spent := plan.cost(high)) <= budget:
        low = high
        high = min(plan.most, max(high + 1, int(high * min(4.0, 1.02 * budget / max(1, spent)))))
    if plan.cost(high) <= budget:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan.cost(middle) <= budget else (low, middle)
    return low
