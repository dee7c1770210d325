"""Prompts of exactly one length: blank lines make up for what whole units leave over, so that samples run as batches.

A prompt is a context and a question that are read apart, so both must have one length each. The question's is the
task's width: the most tokens that a fixed set of its questions has; a sample with a longer one is drawn again. Blank
lines go before the question, and between the context's lines (behind its commas where it has too few lines), never into
a gold span.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from locret.tasks.gauge import Draft, Gauge, Plan
from locret.tasks.records import Turn

NUM_PROBES = 24  # questions of a task that are looked at to find its width
REDRAWS = 12
_MOST_A_LINE = 2  # blank lines behind a line, before commas are used too
_ROUNDS = 6
BLANK = "\n"


def question_width(drafts: list[Draft], gauge: Gauge) -> int:
    """Tokens of the longest of these questions, from the end of the context to where the model writes."""
    count = _counter(gauge)
    return max(count(_asked(turn, gauge)) for draft in drafts for turn in (_own(draft), *draft.turns))


def widened(plan: Plan, gauge: Gauge, width: int) -> Plan:
    """The same with every question at least `width` tokens long."""
    count = _counter(gauge)

    def wide(turn: Turn) -> str:
        return BLANK * (width - count(_asked(turn, gauge))) + turn.question

    def write(num: int) -> Draft:
        draft = plan.write(num)
        turns = tuple(replace(turn, question=wide(turn)) for turn in draft.turns)
        return replace(draft, question=wide(_own(draft)), turns=turns)

    return replace(plan, write=write)


def filled(draft: Draft, gauge: Gauge, limit: int) -> Draft:
    """The same with a context that, with the question, has exactly `limit` tokens; as near as blank lines can get."""
    begin, asked = gauge.turns.begin, _asked(_own(draft), gauge)
    for count in (_counter(gauge), gauge.count):  # the quick one is wrong for some texts, as code
        aim = limit - count(asked)
        blanks, best = 0, draft
        for _ in range(_ROUNDS):  # a blank line is one token for most tokenizers: one round
            size = count(begin + best.context)
            blanks += aim - size
            if size == aim or blanks < 0:
                break
            best = _with_blanks(draft, blanks)
        if gauge.count(begin + best.context) == aim:
            return best
    return best if gauge.count(begin + best.context) <= aim else draft


def _with_blanks(draft: Draft, blanks: int) -> Draft:
    """So many blank lines spread over the context; spans move with their text."""
    text = draft.context
    spans = sorted({*draft.spans, *(span for turn in draft.turns for span in turn.spans)})
    places = _outside([i + 1 for i, c in enumerate(text) if c == "\n"], spans)
    if blanks > _MOST_A_LINE * len(places):
        commas = [i + 1 for i in range(len(text) - 1) if text[i : i + 2] == ", "]
        places = sorted({*places, *_outside(commas, spans)})
    if not places:
        places = [len(text)]
    chosen = [places[i * len(places) // blanks] for i in range(blanks)]
    pieces, at = [], 0
    for place in chosen:
        pieces.append(text[at:place])
        at = place
    context = BLANK.join([*pieces, text[at:]])

    def moved(span: tuple[int, int]) -> tuple[int, int]:
        shift = sum(place <= span[0] for place in chosen)
        return span[0] + shift, span[1] + shift

    turns = tuple(replace(turn, spans=tuple(map(moved, turn.spans))) for turn in draft.turns)
    return replace(draft, context=context, spans=tuple(map(moved, draft.spans)), turns=turns)


def _outside(places: list[int], spans: list[tuple[int, int]]) -> list[int]:
    """Those of the ascending places that do not lie inside a span."""
    found, at = [], 0
    for place in places:
        while at < len(spans) and spans[at][1] <= place:
            at += 1
        if at == len(spans) or place <= spans[at][0]:
            found.append(place)
    return found


def _own(draft: Draft) -> Turn:
    return Turn(draft.question, draft.answers, draft.answer_prefix)


def _asked(turn: Turn, gauge: Gauge) -> str:
    return turn.question + gauge.turns.end + turn.answer_prefix


def _counter(gauge: Gauge) -> Callable[[str], int]:
    return gauge.quick or gauge.count
