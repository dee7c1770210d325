"""Dialogue mask: a script in which one speaker's name is hidden and must be told from what that speaker looks after.

The form is InfiniteBench's longdialogue_qa_eng (a line `NAME: words`, one name replaced by $$MASK$$, its question);
its scripts are copyrighted, so these are written here. Each speaker says once, elsewhere, what is in his or her charge,
and the masked line names it again.
"""

from __future__ import annotations

import random

from locret.tasks import prose
from locret.tasks.gauge import Draft, Plan, Units, Writer
from locret.tasks.request import Request, TaskInfo
from locret.tasks.words import sections

MASK = "$$MASK$$"
HEAD = (
    "Below is a dialogue script where one random occurrence of a character name is replaced with "
    f'"{MASK}", and you should try to guess who that character is.\n\n'
)
LEAD = f"The name that has been replaced with {MASK} is likely"
_QUESTION = f"Which character is {MASK}? Answer with the name."
_NUM_SPEAKERS = 8
_CHARGES = (
    "the lighthouse", "the north mill", "the ferry", "the school bell", "the orchard", "the weighing house",
    "the old library", "the town clock", "the salt store", "the glass house", "the rope walk", "the stone bridge",
    "the signal tower", "the brick kiln", "the dry dock", "the bee hives",
)  # fmt: skip
_STATES = ("{^charge} is in my care, and has been for years.", "I look after {charge}, as everybody here knows.",
           "They put {charge} into my hands last spring.")  # fmt: skip
_HINTS = ("I was up half the night at {charge}; looking after it is not easy.",
          "{^charge} needs new paint, and I shall do it myself as usual.",
          "Whoever wants to see {charge} has to ask me for the key.")  # fmt: skip


def dialogue_mask(request: Request) -> Plan:
    """Who is $$MASK$$? The two lines that tell it are the gold ones."""
    rng = request.rng("script")
    names = [name.upper() for name in rng.sample(sections()["first"], _NUM_SPEAKERS)]
    charges = rng.sample(_CHARGES, _NUM_SPEAKERS)
    said = [_fill(rng, _STATES, charge) for charge in charges]
    hint = _fill(rng, _HINTS, charges[0])
    talk = request.rng("talk")
    lines: list[str] = []

    def line(index: int) -> str:
        while index >= len(lines):
            lines.extend(prose.write(talk, 100))
        return f"{talk.choice(names)}: {lines[index]}"

    units = Units(request.gauge, line, "\n")

    def write(num: int) -> Draft:
        script = [(text, False) for text in units.first(num)]
        place = request.rng("places")
        for i in range(_NUM_SPEAKERS - 1, -1, -1):
            script.insert(place.randrange(len(script) + 1), (f"{names[i]}: {said[i]}", i == 0))
        at = place.randrange(len(script) + 1)
        script.insert(at, (f"{MASK}: {hint}", True))
        writer = Writer().add(HEAD).join("\n", script).add("\n\n")
        question, prefix = (_QUESTION, " " + LEAD) if request.hardened else (LEAD, "")
        meta = {"depths": [round(at / len(script), 3)]}
        return Draft(writer.text, question, (names[0],), prefix, tuple(writer.spans), meta=meta)

    return Plan(write, units.cost, least=0)


def _fill(rng: random.Random, frames: tuple[str, ...], charge: str) -> str:
    frame = rng.choice(frames)
    return frame.replace("{^charge}", charge[0].upper() + charge[1:]).replace("{charge}", charge)


TASKS = (
    TaskInfo(
        "dialogue_mask", "infinitebench", "the hidden speaker of a script", "infinitebench_dialogue",
        {"official": 40, "hardened": 10}, dialogue_mask,
    ),
)  # fmt: skip
