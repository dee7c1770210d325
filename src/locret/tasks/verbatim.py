"""Verbatim copy: a sentence's beginning is quoted, its continuation is asked for. Prose without planted facts."""

from __future__ import annotations

from locret.errors import DataError
from locret.tasks.gauge import Draft, Plan, Writer
from locret.tasks.request import Request, TaskInfo

QUOTED, CONTINUED = 12, 16
_HEAD = "Read the following text carefully.\n\n"
_QUESTION = 'Copy the words that follow these words in the text, exactly and in order: "{quote}"'
_PREFIX = " The text goes on:"


def verbatim_copy(request: Request) -> Plan:
    """The next 16 words after 12 that occur once in the text; at a random depth."""
    start = request.start()

    def write(num: int) -> Draft:
        words = " ".join(request.haystack.sentences(start, num)).split(" ")
        at = _unique_place(request, words)
        quote, answer = words[at : at + QUOTED], words[at + QUOTED : at + QUOTED + CONTINUED]
        writer = Writer().add(_HEAD).add(" ".join(words[:at]) + (" " if at else ""))
        writer.add(" ".join(quote + answer), gold=True)
        writer.add("".join(" " + word for word in words[at + QUOTED + CONTINUED :])).add("\n\n")
        meta = {"depths": [round(at / len(words), 3)]}
        question = _QUESTION.format(quote=" ".join(quote))
        return Draft(writer.text, question, (" ".join(answer),), _PREFIX, tuple(writer.spans), meta=meta)

    return Plan(write, lambda num: request.haystack.cost(request.gauge, start, num), least=QUOTED + CONTINUED)


def _unique_place(request: Request, words: list[str]) -> int:
    """A word where a quotation can begin whose continuation is the same wherever it occurs.

    It occurs once, unless the context is longer than the haystack, which then repeats.
    """
    rng = request.rng("depth")
    text = " ".join(words)
    last = len(words) - QUOTED - CONTINUED
    for _ in range(64):
        at = rng.randrange(last + 1)
        quote, both = " ".join(words[at : at + QUOTED]), " ".join(words[at : at + QUOTED + CONTINUED])
        if text.count(quote) == text.count(both):
            return at
    raise DataError("the haystack says the same words again and again; give it more varied text")


TASKS = (
    TaskInfo(
        "verbatim_copy", "verbatim", "the words that follow a quotation", "word_prefix",
        {"official": 48, "hardened": 32}, verbatim_copy,
    ),
)  # fmt: skip
