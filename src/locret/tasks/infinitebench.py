"""InfiniteBench's five synthetic tasks (arXiv:2402.13718) at any length, written anew.

Templates are its yarn-mistral set (MIT, src/prompt.py), word for word; limits are its eval_utils.py's. The published
sets sweep depth in order; here sample i takes a step of the same sweep such that any first n samples cover all depths.
Official prompts of math_find and code_run name the question before the context, so a compressed context has seen it;
hardened ones ask only at the end.
"""

from __future__ import annotations

import uuid

from locret.tasks.gauge import Draft, Plan, Units, Writer
from locret.tasks.request import Request, TaskInfo, dense_meta
from locret.tasks.ruler import noise

PASSKEY_HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n\n"
)
NUMBER_HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it. "
    "I will quiz you about the important information there.\n\n"
)
KV_HEAD = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
KV_LEAD = "The value associated with the specified key is: "
MATH_ORDER = "You should answer with only one number, no other words. The {which} number of the list is: "
CODE_HEAD = "There is a function called {name} in the following Python code.\n\n"
CODE_QUESTION = "Please compute the exact value of {call}."
CODE_LEAD = "The value of {call} is"

_SWEEP = 59  # passkey and number_string: 59 depths; 37 has no factor of it
_KV_SWEEP = 500
_WHICH = ("largest", "second largest", "third largest", "smallest", "second smallest", "third smallest", "median")
_LEAST_NUMBERS = 24


def _depth(request: Request, steps: int, stride: int) -> float:
    """0..1; random if hardened."""
    if request.hardened:
        return request.rng("depth").random()
    return (request.index * stride % steps) / (steps - 1)


def _lead(request: Request, question: str, blank: str, lead: str) -> tuple[str, str]:
    """(question, answer prefix): the published text, or one blank between question and prefix if hardened."""
    return (question, " " + lead.rstrip()) if request.hardened else (question + blank, lead)


def passkey(request: Request) -> Plan:
    """Five digits in noise, said twice in one line."""
    digits = "".join(request.rng("key").choices("0123456789", k=5))
    line = f"The pass key is {digits}. Remember it. {digits} is the pass key."
    question, prefix = _lead(request, "What is the pass key?", "\n\n", "The pass key is")
    return _hidden(request, PASSKEY_HEAD, line, digits, question, prefix)


def number_string(request: Request) -> Plan:
    """Ten digits: five random ones, then five times one of them doubled in place."""
    rng = request.rng("key")
    digits = rng.choices("0123456789", k=5)
    for _ in range(5):
        place = rng.randrange(len(digits))
        digits.insert(place, digits[place])
    key = "".join(digits)
    line = f"The sequence of digits is {key}. Remember it. {key} is the sequence of digits."
    question, prefix = _lead(request, "What is the sequence of digits?", "\n\n", "The sequence of digits is")
    return _hidden(request, NUMBER_HEAD, line, key, question, prefix)


def _hidden(request: Request, head: str, line: str, key: str, question: str, prefix: str) -> Plan:
    hay = noise(request)
    depth = _depth(request, _SWEEP, 37)

    def write(num: int) -> Draft:
        place = round(depth * num)
        texts = hay.first(num)
        writer = Writer().add(head)
        for text in texts[:place]:
            writer.add(text + "\n")
        writer.add(line, gold=True).add("\n")
        for text in texts[place:]:
            writer.add(text + "\n")
        writer.add("\n")
        return Draft(writer.text, question, (key,), prefix, tuple(writer.spans), meta={"depths": [round(depth, 3)]})

    return Plan(write, hay.cost, least=0)


def kv_pairs(request: Request) -> tuple[Units, list[tuple[str, str]]]:
    """Endless pairs of different uuids: as JSON members, and as they are."""
    rng = request.rng("pairs")
    pairs: list[tuple[str, str]] = []

    def member(index: int) -> str:
        key, value = (str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2))
        pairs.append((key, value))
        return f'"{key}": "{value}"'

    return Units(request.gauge, member, ", "), pairs


def write_kv(units: Units, num: int, gold: list[int]) -> Writer:
    """Head and JSON object of the first `num` pairs."""
    pieces = [(text, i in gold) for i, text in enumerate(units.first(num))]
    return Writer().add(KV_HEAD + "{").join(", ", pieces).add("}\n\n")


def kv_retrieval(request: Request) -> Plan:
    """One value of a JSON object whose keys and values are uuids."""
    units, pairs = kv_pairs(request)
    depth = _depth(request, _KV_SWEEP, 309)

    def write(num: int) -> Draft:
        target = min(num - 1, int(depth * num))
        writer = write_kv(units, num, [target])
        key, value = pairs[target]
        question, prefix = f'Key: "{key}"\n{KV_LEAD}', ""
        if request.hardened:
            question, prefix = f'Key: "{key}"', " " + KV_LEAD.rstrip()
        meta = {"depths": [round(target / num, 3)], **dense_meta(num, units.cost(num))}
        return Draft(writer.text, question, (value,), prefix, tuple(writer.spans), meta=meta)

    return Plan(write, units.cost)


def math_find(request: Request) -> Plan:
    """An extreme or the median of a list of whole numbers from about 0 to about 99."""
    rng = request.rng("numbers")
    which = _WHICH[request.rng("which").randrange(7) if request.hardened else request.index % 7]
    # one bound is moved by up to a fifth of the range, or the answer would always be the same
    low = rng.randint(0, 20) if "smallest" in which or which == "median" else 0
    high = rng.randint(79, 99) if "largest" in which or (which == "median" and low < 10) else 99
    units = Units(request.gauge, lambda i: str(rng.randint(low, high)), ", ")

    def write(num: int) -> Draft:
        texts = units.first(num)
        numbers = sorted(int(text) for text in texts)
        answer = order_statistic(numbers, which)
        writer = Writer()
        if not request.hardened:
            writer.add(f"What is the {which} number in the following list?\n\n")
        if which == "median":
            writer.add("[" + ", ".join(texts) + "]", gold=True)
        else:
            writer.add("[").join(", ", [(text, text == answer) for text in texts]).add("]")
        question = MATH_ORDER.format(which=which)
        if request.hardened:
            return Draft(
                writer.add("\n\n").text, f"What is the {which} number of the list above? Answer with the number only.",
                (answer,), f" The {which} number of the list is:", tuple(writer.spans), meta={"which": which},
            )  # fmt: skip
        meta = {"which": which, "question_in_context": True}
        return Draft(writer.add("\n\n").text, question, (answer,), "", tuple(writer.spans), meta=meta)

    return Plan(write, units.cost, least=_LEAST_NUMBERS)


def order_statistic(numbers: list[int], which: str) -> str:
    """The answer, from the sorted list; "second" and "third" count different values."""
    if which == "median":
        middle = len(numbers) // 2
        if len(numbers) % 2:
            return str(numbers[middle])
        half = (numbers[middle - 1] + numbers[middle]) / 2
        return str(int(half)) if half == int(half) else str(half)
    different = sorted(set(numbers), reverse="largest" in which)
    return str(different["second" in which or ("third" in which and 2)])


def code_run(request: Request, depth: int | None = None) -> Plan:
    """What a chain of functions returns, each of which calls the next and adds or takes away a number.

    Args:    depth: functions in the chain; 2, 4, 6, 8, 10 in turn as published, 2 if hardened.
    """
    rng = request.rng("functions")
    depth = depth or (2 if request.hardened else 2 + 2 * (request.index % 5))
    names: list[str] = []
    calls: list[tuple[int | None, int]] = []  # (callee, constant)
    labels = set[int]()

    def define(index: int) -> str:
        # the deepest layer first, so that every callee exists; layer of i is i % depth, 0 the deepest
        label = index
        while request.hardened and (label := rng.randrange(max(10_000, 2 * index))) in labels:
            pass
        labels.add(label)
        names.append(f"func_{label}")
        constant = rng.randint(-12, 17)
        layer = index % depth
        callee = None
        if layer:
            callee = rng.randrange(index // depth + 1) * depth + layer - 1
        calls.append((callee, constant))
        inner = "x" if callee is None else f"{names[callee]}(x)"
        sign = "+" if constant >= 0 else "-"
        return f"def {names[index]}(x):\n    return {inner} {sign} {abs(constant)}\n"

    units = Units(request.gauge, define, "\n")

    def write(num: int) -> Draft:
        texts = units.first(num)
        asked = request.rng("asked").randrange(num // depth) * depth + depth - 1
        x = request.rng("x").randint(-10, 10)
        chain, value = [asked], x
        while calls[chain[-1]][0] is not None:
            chain.append(calls[chain[-1]][0])  # type: ignore[arg-type]
        value += sum(calls[i][1] for i in chain)
        order = list(range(num))
        request.rng("order").shuffle(order)
        call = f"{names[asked]}({x})"
        head = "Here is some Python code.\n\n" if request.hardened else CODE_HEAD.format(name=names[asked])
        writer = Writer().add(head)
        writer.join("\n", [(texts[i], i in chain) for i in order]).add("\n\n")
        question, prefix = _lead(request, CODE_QUESTION.format(call=call), " ", CODE_LEAD.format(call=call))
        meta = {"chain": depth} if request.hardened else {"chain": depth, "question_in_context": True}
        return Draft(writer.text, question, (str(value),), prefix, tuple(writer.spans), meta=meta)

    return Plan(write, units.cost, least=depth)


def _task(name: str, summary: str, metric: str, official: int, hardened: int, build, dense: bool = False) -> TaskInfo:  # type: ignore[no-untyped-def]
    limits = {"official": official, "hardened": hardened}
    return TaskInfo(name, "infinitebench", summary, f"infinitebench_{metric}", limits, build, dense)


TASKS = (
    _task("passkey", "five digits in repeated noise", "first_number", 6, 8, passkey),
    _task("number_string", "ten digits with repeats in repeated noise", "first_number", 12, 14, number_string),
    _task("kv_retrieval", "one uuid among JSON pairs of uuids", "kv", 50, 40, kv_retrieval, dense=True),
    _task("math_find", "an extreme or the median of a list of numbers", "math_find", 3, 5, math_find),
    _task("code_run", "what nested functions return", "code_run", 5, 6, code_run),
)
