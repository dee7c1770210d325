"""bAbI 1 to 3 in prose: who went where, who took what, spread over a long text (BABILong, arXiv:2406.10149).

People move between places, take objects and drop them. Task 1 asks where a person is, task 2 where an object is, task 3
where an object was before it came to a place. The rules and the scorer are BABILong's; the prompt's wording is ours.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial

from locret.tasks.gauge import Draft, Plan, Writer
from locret.tasks.request import Request, TaskInfo

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_PEOPLE = ("Mary", "John", "Daniel", "Sandra")
_OBJECTS = ("apple", "football", "milk")
_MOVES = ("went to", "moved to", "travelled to", "journeyed to", "went back to")
_TAKES = ("picked up", "took", "grabbed", "got")
_DROPS = ("dropped", "put down", "left", "discarded")
_HEADS = {
    1: "The following text tells, among other things, where people go. Somebody is where he or she went last.\n\n",
    2: "The following text tells, among other things, who takes which object and goes where. An object is carried "
    "along until it is dropped, and stays where it was dropped.\n\n",
}
_HEADS[3] = _HEADS[2]
_MOST_STEPS = 60


@dataclass
class _World:
    """What has happened so far, and the lines that made it so."""

    at: dict[str, str] = field(default_factory=dict)  # person -> place
    moved: dict[str, int] = field(default_factory=dict)  # person -> the line that says so
    holder: dict[str, str] = field(default_factory=dict)  # object -> person
    taken: dict[str, int] = field(default_factory=dict)  # object -> the last line that says so
    dropped: dict[str, int] = field(default_factory=dict)
    path: dict[str, list[tuple[str, set[int]]]] = field(default_factory=dict)  # object -> (place, lines that say so)
    lines: list[str] = field(default_factory=list)

    def step(self, rng: random.Random, with_objects: bool) -> None:
        person = rng.choice(_PEOPLE)
        held = [thing for thing, who in self.holder.items() if who == person]
        kind = rng.choice(("move", "move", "take", "drop")) if with_objects else "move"
        free = [thing for thing in _OBJECTS if thing not in self.holder and self._is_here(thing, person)]
        line = len(self.lines)
        if kind == "drop" and held:
            thing = rng.choice(held)
            del self.holder[thing]
            self.dropped[thing] = line
            self.lines.append(f"{person} {rng.choice(_DROPS)} the {thing}.")
        elif kind == "take" and person in self.at and free:
            thing = rng.choice(free)
            self.holder[thing], self.taken[thing] = person, line
            self.dropped.pop(thing, None)
            self._arrive(thing, self.at[person], {self.moved[person], line})
            self.lines.append(f"{person} {rng.choice(_TAKES)} the {thing}.")
        else:
            place = rng.choice([place for place in PLACES if place != self.at.get(person)])
            self.at[person], self.moved[person] = place, line
            for thing in held:
                self._arrive(thing, place, {self.taken[thing], line})
            self.lines.append(f"{person} {rng.choice(_MOVES)} the {place}.")

    def _is_here(self, thing: str, person: str) -> bool:
        """Objects lie where they were dropped; nobody knows where before they were first taken."""
        return thing not in self.path or self.path[thing][-1][0] == self.at.get(person)

    def _arrive(self, thing: str, place: str, lines: set[int]) -> None:
        path = self.path.setdefault(thing, [])
        if not path or path[-1][0] != place:
            path.append((place, lines))


def babi(request: Request, level: int) -> Plan:
    """The story's lines between the sentences of prose, in order; gold are the lines that the answer follows from."""
    world, question, answer, gold, named = _story(request.rng("story"), level)
    start = request.start()
    labels = (answer, *(place for place in PLACES if place not in (answer, named)))

    def write(num: int) -> Draft:
        sentences = request.haystack.sentences(start, num)
        rng = request.rng("depth")
        places = sorted(rng.randrange(len(sentences) + 1) for _ in world.lines)
        writer = Writer().add(_HEADS[level])
        at = 0
        for i, place in enumerate(places):
            writer.add("".join(text + " " for text in sentences[at:place]))
            writer.add(world.lines[i], gold=i in gold).add(" ")
            at = place
        writer.add(" ".join(sentences[at:])).add("\n\n")
        meta = {"depths": [round(places[i] / len(sentences), 3) for i in sorted(gold)]}
        return Draft(writer.text, question, labels, " Answer:", tuple(writer.spans), meta=meta)

    return Plan(write, lambda num: request.haystack.cost(request.gauge, start, num))


def _story(rng: random.Random, level: int) -> tuple[_World, str, str, set[int], str]:
    """(world, question, answer, gold lines, the place named in the question)."""
    while True:
        world = _World()
        for _ in range(rng.randrange(6, 16) if level == 1 else rng.randrange(12, _MOST_STEPS)):
            world.step(rng, with_objects=level > 1)
        if level == 1:
            person = rng.choice(sorted(world.at))
            return world, f"Where is {person}?", world.at[person], {world.moved[person]}, ""
        ready = sorted(thing for thing, path in world.path.items() if len(path) >= level - 1)
        if not ready:
            continue
        thing = rng.choice(ready)
        path = world.path[thing]
        if level == 2:
            gold = path[-1][1] | ({world.dropped[thing]} if thing in world.dropped else set())
            return world, f"Where is the {thing}?", path[-1][0], gold, ""
        # the last time that it came to this place is meant; take one where that leaves no doubt
        places = [place for place, _ in path]
        sure = [i for i in range(1, len(path)) if places.count(places[i]) == 1]
        if sure:
            i = rng.choice(sure)
            gold = path[i - 1][1] | path[i][1]
            return world, f"Where was the {thing} before the {places[i]}?", places[i - 1], gold, places[i]


def _task(level: int, summary: str) -> TaskInfo:
    limits = {"official": 20, "hardened": 10}
    return TaskInfo(f"babi_qa{level}", "babi", summary, "babilong", limits, partial(babi, level=level))


TASKS = (
    _task(1, "where a person is"),
    _task(2, "where an object is"),
    _task(3, "where an object was before it came to a place"),
)
