"""Several questions of one context: what a method dropped for the first is missing for the others.

`kv_multi_turn` asks five keys of one JSON object (SCBench's scbench_kv, arXiv:2412.10319); `needles_scdq` asks for five
numbers that lie in prose. Both can be run as turns of one conversation or each alone on the same compressed context
(same context, different question).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from locret.errors import ConfigError
from locret.tasks.gauge import Draft, Plan, Writer
from locret.tasks.infinitebench import KV_LEAD, kv_pairs, write_kv
from locret.tasks.records import Turn
from locret.tasks.request import Request, TaskInfo, dense_meta
from locret.tasks.ruler import NEEDLE, NIAH_HEAD, NIAH_PREFIX, NIAH_QUESTION, Names, essay_places, singular


def _checked(num_questions: int) -> int:
    if num_questions < 1:
        raise ConfigError(f"num_questions is {num_questions}; ask at least one question")
    return num_questions


def kv_multi_turn(request: Request, num_questions: int = 5) -> Plan:
    """Values of `num_questions` different keys of one object."""
    units, pairs = kv_pairs(request)
    count = _checked(num_questions)

    def write(num: int) -> Draft:
        asked = request.rng("asked").sample(range(num), count)
        writer = write_kv(units, num, asked)
        # spans come in document order: give every turn its own
        where = dict(zip(sorted(asked), writer.spans, strict=True))
        turns = []
        for place in asked:
            key, value = pairs[place]
            question, prefix = f'Key: "{key}"\n{KV_LEAD}', ""
            if request.hardened:
                question, prefix = f'Key: "{key}"', " " + KV_LEAD.rstrip()
            turns.append(Turn(question, (value,), prefix, (where[place],)))
        meta = {"depths": [round(place / num, 3) for place in asked], **dense_meta(num, units.cost(num))}
        return _of_turns(writer, turns, meta)

    return Plan(write, units.cost, least=count)


def needles_scdq(request: Request, num_questions: int = 5) -> Plan:
    """Numbers of `num_questions` keys in prose, asked one by one; RULER's needles and wording."""
    count = _checked(num_questions)
    names = Names(request, "needles")
    facts = [(names.new("words"), names.new("numbers")) for _ in range(count)]
    order = request.rng("order").sample(range(count), count)
    start = request.start()
    ask: Callable[[str], str] = partial(singular, single=True)

    def write(num: int) -> Draft:
        sentences = request.haystack.sentences(start, num)
        places = essay_places(request, count, len(sentences))
        writer = Writer().add(NIAH_HEAD.format(kind="numbers"))
        at = 0
        for place, (key, value) in zip(places, facts):
            writer.add("".join(sentence + " " for sentence in sentences[at:place]))
            writer.add(NEEDLE.format(kind="numbers", key=key, value=value), gold=True).add(" ")
            at = place
        writer.add(" ".join(sentences[at:])).add("\n")
        turns = [
            Turn(
                ask(NIAH_QUESTION).format(kind="number", query=facts[i][0]), (facts[i][1],),
                ask(NIAH_PREFIX).format(kind="number", query=facts[i][0]), (writer.spans[i],),
            )
            for i in order
        ]  # fmt: skip
        return _of_turns(writer, turns, {"depths": [round(places[i] / len(sentences), 3) for i in order]})

    return Plan(write, lambda num: request.haystack.cost(request.gauge, start, num), least=count)


def _of_turns(writer: Writer, turns: list[Turn], meta: dict[str, object]) -> Draft:
    first = turns[0]
    return Draft(writer.text, first.question, first.answers, first.answer_prefix, first.spans, tuple(turns[1:]), meta)


TASKS = (
    TaskInfo(
        "kv_multi_turn", "multi_turn", "five uuids asked of one JSON object", "infinitebench_kv",
        {"official": 150, "hardened": 40}, kv_multi_turn, dense=True,
    ),
    TaskInfo(
        "needles_scdq", "multi_turn", "five numbers asked of one prose text", "string_match_all",
        {"official": 128, "hardened": 12}, needles_scdq,
    ),
)  # fmt: skip
