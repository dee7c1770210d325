"""Needle in a haystack on a grid of depths (gkamradt's test), judged by word recall instead of by another model.

Sample i lies at depth `depths[i % len(depths)]`; a grid of lengths is one call a length. The official needle, question
and answer are the published ones; hardened hides a number of its own in each sample, in RULER's wording.
"""

from __future__ import annotations

from collections.abc import Sequence

from locret.errors import ConfigError
from locret.tasks import ruler
from locret.tasks.gauge import Draft, Plan, Writer
from locret.tasks.request import Request, TaskInfo
from locret.tasks.ruler import Names, singular

NEEDLE = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
QUESTION = "What is the best thing to do in San Francisco?"
ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day"
DEPTHS = tuple(i / 10 for i in range(11))
_ORDER = "Don't give information outside the document or repeat your findings."


def needle_at_depth(request: Request, depths: Sequence[float] = DEPTHS) -> Plan:
    """One fact in prose. Args: depths: 0 is the beginning, 1 the end; each is taken in turn."""
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ConfigError(f"depths are numbers from 0 (the beginning) to 1 (the end), at least one; not {depths!r}")
    depth = depths[request.index % len(depths)]
    start = request.start()
    needle, question, answer, prefix = NEEDLE, f"{QUESTION} {_ORDER}", ANSWER, ""
    if request.hardened:
        names = Names(request, "needle")
        key, answer = names.new("words"), names.new("numbers")
        needle = ruler.NEEDLE.format(kind="numbers", key=key, value=answer)
        question, prefix = (
            singular(text, single=True).format(kind="number", query=key)
            for text in (ruler.NIAH_QUESTION, ruler.NIAH_PREFIX)
        )

    def write(num: int) -> Draft:
        sentences = request.haystack.sentences(start, num)
        at = round(depth * len(sentences))
        writer = Writer().add(" ".join(sentences[:at])).add(" " if at else "").add(needle, gold=True)
        writer.add(" " + " ".join(sentences[at:]) if at < len(sentences) else "").add("\n\n")
        return Draft(writer.text, question, (answer,), prefix, tuple(writer.spans), meta={"depths": [depth]})

    return Plan(write, lambda num: request.haystack.cost(request.gauge, start, num))


TASKS = (
    TaskInfo(
        "niah", "niah", "one fact in prose at a given depth", "word_recall", {"official": 64, "hardened": 16},
        needle_at_depth,
    ),
)  # fmt: skip
