"""Many-shot in-context learning: short requests with labels, and one more without (HELMET's ICL, arXiv:2410.02694).

Labels are random numbers, a new set a sample, so only the examples in the context can tell them. The requests of 24
intents are written here; what is asked is worded as no example is.
"""

from __future__ import annotations

import random

from locret.tasks.gauge import Draft, Plan, Units, Writer
from locret.tasks.grammar import fill, flatten, parse
from locret.tasks.request import Request, TaskInfo

_HEAD = (
    "Use the provided mapping from the text to label to assign a label to the text. "
    'Only output "label: {{label}}" and nothing else.\n\n'
).format()
_INTENTS = (
    "[please |][wake me|set an alarm|get me up] at {hour}[ tomorrow| on Monday|]",
    "[what is|tell me|how is] the weather [in|for] {place}[ today| tonight|]",
    "[send|transfer|wire] {amount} [euros|pounds|crowns] to {person}",
    "[book|reserve|find] a table for {count} at {hour}",
    "[my card was|I think my card got] [stolen|lost|swallowed by the machine] in {place}",
    "[play|put on|I want to hear] [some|a bit of] [jazz|folk|piano] music[ please|]",
    "how [far|many miles|long a drive] is it [from here |]to {place}",
    "[turn|switch] [off|down|on] the [lights|heating|lamp] in the [kitchen|hall|bedroom]",
    "[remind me|do not let me forget] to [call|visit|pay] {person} [at {hour}|on Friday]",
    "[translate|how do I say] [good morning|thank you|where is the station] [into|in] [Danish|Welsh|Greek]",
    "[is there|do you have] a [flight|plane] to {place} [before|after] {hour}",
    "[add|put] [milk|flour|soap] on the [shopping|grocery] list",
    "[what is|how high is] the exchange rate for {amount} [dollars|francs|yen]",
    "[who|which author] wrote the [book|novel|play] about {place}",
    "[my parcel|the package] from {person} has not [come|arrived|been delivered]",
    "[cancel|call off] [my|the] [meeting|appointment] with {person}",
    "[how do I|what is the way to] [cook|bake|prepare] [rice|pancakes|lentil soup] for {count}",
    "[I forgot|please reset|I cannot find] my [password|pin|login]",
    "[when|at what time] does the [train|last bus|tram] to {place} [leave|go]",
    "[give me|I need] the [phone number|address] of {person}",
    "[what|how much] [tax|duty] do I [pay|owe] on {amount}",
    "[start|set] a timer for {count} minutes",
    "[tell me|do you know] a [joke|funny story] about {place}",
    "[my|the] [tyre|engine|brake] [makes a noise|is flat|does not work], where is a [garage|mechanic]",
)
_SLOTS = {
    "place": ("Oslo", "Leeds", "Porto", "Graz", "Turin", "Cork", "Lyon", "Bergen", "Utrecht", "Malmo"),
    "person": ("Anna", "Mr. Brown", "my sister", "Paul", "the dentist", "Helen", "Doctor Gray", "my landlord"),
    "hour": ("six", "half past seven", "noon", "nine", "ten to eight", "four"),
    "amount": ("fifty", "two hundred", "thirty", "a thousand", "eighty"),
    "count": ("two", "five", "six", "ten", "four"),
}


def many_shot(request: Request) -> Plan:
    """Texts with labels, as many as fit; gold are the examples of the right label."""
    rng = request.rng("examples")
    labels = [str(label) for label in request.rng("labels").sample(range(10, 1000), len(_INTENTS))]
    asked = request.rng("asked").randrange(len(_INTENTS))
    question = _text(request.rng("question"), asked)
    intents: list[int] = []

    def example(index: int) -> str:
        if index % len(_INTENTS) == 0:  # every intent once before any comes again
            intents.extend(rng.sample(range(len(_INTENTS)), len(_INTENTS)))
        intent = intents[index]
        text = _text(rng, intent)
        while text == question:
            text = _text(rng, intent)
        return f"{text}\nlabel: {labels[intent]}"

    units = Units(request.gauge, example, "\n\n")

    def write(num: int) -> Draft:
        pieces = [(text, intents[i] == asked) for i, text in enumerate(units.first(num))]
        request.layout().shuffle(pieces)
        writer = Writer().add(_HEAD).join("\n\n", pieces).add("\n\n")
        return Draft(writer.text, question, (labels[asked],), " label:", tuple(writer.spans))

    return Plan(write, units.cost, least=len(_INTENTS))


def _text(rng: random.Random, intent: int) -> str:
    slots = {name: rng.choice(values) for name, values in _SLOTS.items()}
    return fill(flatten(rng, parse(_INTENTS[intent]), {}, "any"), slots).text


TASKS = (
    TaskInfo(
        "many_shot_icl", "icl", "the label of a text, from labelled texts", "helmet_icl",
        {"official": 20, "hardened": 6}, many_shot, stop="\n",
    ),
)  # fmt: skip
