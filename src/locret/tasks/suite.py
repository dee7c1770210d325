"""Every generated evaluation task by name, at any length, for any tokenizer.

The same arguments give the same bytes; sample i does not depend on how many are asked for. `official` follows the
published generators and limits, `hardened` draws everything anew for each sample and generates fewer tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from locret.errors import ConfigError, unknown
from locret.tasks import babi, dialogue, even, icl, infinitebench, multiturn, niah, ruler, verbatim
from locret.tasks.filler import Filler
from locret.tasks.gauge import Draft, Plan, fit, gauge_of
from locret.tasks.haystack import Haystack
from locret.tasks.public import load_public
from locret.tasks.records import Record
from locret.tasks.request import MODES, Request, TaskInfo

__all__ = ["MODES", "TASKS", "Record", "TaskInfo", "generate", "group", "load_public", "options_of", "prompt"]

_NEXT_ATTEMPT = 1_000_003  # added to the seed when a sample is drawn again
SENTENCE = 32  # tokens that a model may need to say what a prefix says
_MODULES = (ruler, infinitebench, dialogue, niah, multiturn, verbatim, icl, babi)
TASKS: dict[str, TaskInfo] = {info.name: info for module in _MODULES for info in module.TASKS}
_GIVEN = {"request", "hops", "level", "haystack", "key", "value"}  # set by the registry, not by users


def generate(
    task: str,
    *,
    count: int,
    length: int,
    tokenizer: Any,
    seed: int = 0,
    mode: str = "hardened",
    filler: Haystack | Filler | str | Path | None = None,
    answer_prefix: bool = True,
    sentence: int = SENTENCE,
    even_lengths: bool = False,
    **options: Any,
) -> Iterator[Record]:
    """Samples 0..count-1 of a task.

    Args:
        length: most tokens of the prompt (`prompt`); filled up as far as whole units allow. RULER's official length
            includes the tokens to generate, so there the prompt is that much shorter.
        filler: natural text; None: the project's own prose; a file or folder of .txt, .jsonl or .jsonl.xz.
        answer_prefix: False leaves out the words that the answer is made to begin with, and gives hardened tasks
            `sentence` more tokens, for models that begin with such words by themselves. The embedded model must have
            False: it was trained to answer and stop, and stops behind a prefix.
        even_lengths: blank lines make contexts and questions of all samples equally long, so that they run as batches;
            not for official mode, which is as published.
        options: the task's own (`options_of`).
    Raises: ConfigError, at once: unknown task, mode or option, a count below 1; and a length that is too short.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if count < 1:
        raise ConfigError(f"count is {count}; ask for at least one sample")
    if even_lengths and mode == "official":
        raise ConfigError(
            "official samples are as published, so their lengths differ; even_lengths needs mode 'hardened'"
        )
    info = TASKS[task]
    valid = options_of(task)
    for name in options:
        if name not in valid:
            raise unknown(f"option of task {task!r}", name, valid)
    limit = length - info.max_new_tokens[mode] if info.counts_generated and mode == "official" else length
    gauge, haystack = gauge_of(tokenizer), Haystack.of(filler, tokenizer)

    def plan_of(index: int, attempt: int = 0) -> Plan:
        plan = info.build(Request(task, index, seed + attempt * _NEXT_ATTEMPT, mode, limit, gauge, haystack), **options)
        return plan if answer_prefix else _bare(plan)

    @cache
    def width() -> int:
        plans = map(plan_of, range(-even.NUM_PROBES, 0))
        return even.question_width([plan.write(plan.least) for plan in plans], gauge)

    def level(index: int) -> tuple[Draft, int]:
        for attempt in range(even.REDRAWS):
            plan = even.widened(plan_of(index, attempt), gauge, width())
            draft, tokens = fit(plan, gauge, limit, task)
            if even.question_width([draft], gauge) == width():
                return even.filled(draft, gauge, limit), limit
        return draft, tokens

    def sample(index: int) -> Record:
        draft, tokens = level(index) if even_lengths else fit(plan_of(index), gauge, limit, task)
        return Record(
            task=task,
            index=index,
            context=draft.context,
            question=draft.question,
            answers=draft.answers,
            metric=info.metric,
            max_new_tokens=info.max_new_tokens[mode] + (0 if answer_prefix or mode == "official" else sentence),
            answer_prefix=draft.answer_prefix,
            spans=draft.spans,
            turns=draft.turns,
            meta={"length": length, "tokens": tokens, "seed": seed, "mode": mode, **draft.meta},
        )

    return (sample(index) for index in range(count))


def _bare(plan: Plan) -> Plan:
    """The same without answer prefixes."""

    def write(num: int) -> Draft:
        draft = plan.write(num)
        turns = tuple(replace(turn, answer_prefix="") for turn in draft.turns)
        return replace(draft, answer_prefix="", turns=turns)

    return replace(plan, write=write)


def options_of(task: str) -> dict[str, Any]:
    """Names and defaults of a task's own options."""
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    parameters = inspect.signature(TASKS[task].build).parameters
    return {name: one.default for name, one in parameters.items() if name not in _GIVEN}


def group(name: str) -> list[str]:
    """The tasks of a group ("ruler", "infinitebench", ...), in the published order; a task's name gives itself."""
    found = [task for task, info in TASKS.items() if name in (task, info.group)]
    if not found:
        raise unknown("task or group", name, {*TASKS, *(info.group for info in TASKS.values())})
    return found


def prompt(record: Record, tokenizer: Any) -> str:
    """The text a model reads before it answers the first question; its tokens are what `length` limits.

    Template, context, question, template, answer prefix, with nothing between: blanks and line ends are part of the
    texts, so that context and question may be read apart and give the same text.
    """
    return gauge_of(tokenizer).prompt(record)
