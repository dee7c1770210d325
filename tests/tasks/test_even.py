"""Prompts of exactly one length: every task, several tokenizers, gold text untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import build_byte_tokenizer
from transformers import AutoTokenizer

import locret
from locret.errors import ConfigError
from locret.evaluate.prompts import Encoder
from locret.tasks.even import filled
from locret.tasks.gauge import Draft, gauge_of
from locret.tasks.records import Record
from locret.tasks.suite import TASKS, generate

EMBEDDED = Path(locret.__file__).parent / "models" / "embedded"
LENGTHS = {"embedded": 2048, "bytes": 7000}


@pytest.fixture(scope="module")
def take() -> Callable[..., list[Record]]:
    tokenizers = {"embedded": AutoTokenizer.from_pretrained(EMBEDDED), "bytes": build_byte_tokenizer()}

    def take(task: str, name: str = "embedded", count: int = 5, **options: Any) -> list[Record]:
        given = dict(length=LENGTHS[name], tokenizer=tokenizers[name], answer_prefix=False)
        return list(generate(task, count=count, **{**given, **options}))

    return take


def gold(record: Record | Draft) -> list[list[str]]:
    """The gold text of every turn."""
    spans = [record.spans, *(turn.spans for turn in record.turns)]
    return [[record.context[start:stop] for start, stop in turn] for turn in spans]


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("task", TASKS)
def test_contexts_and_questions_have_one_length_each(task: str, name: str, take: Callable[..., list[Record]]) -> None:
    records = take(task, name, count=3 if name == "embedded" else 2, even_lengths=True)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED) if name == "embedded" else build_byte_tokenizer()
    prompts = [Encoder(tokenizer).prompt(record) for record in records]
    assert len({len(prompt.context) for prompt in prompts}) == 1
    assert len({len(ask.first) for prompt in prompts for ask in prompt.asks}) == 1
    assert len(prompts[0].context) + len(prompts[0].asks[0].first) == LENGTHS[name]


@pytest.mark.parametrize("task", TASKS)
def test_only_blank_lines_are_added_and_never_into_gold_text(task: str, take: Callable[..., list[Record]]) -> None:
    gauge = gauge_of(AutoTokenizer.from_pretrained(EMBEDDED))
    [record] = take(task, count=1, length=1400)
    draft = Draft(record.context, record.question, record.answers, "", record.spans, record.turns)
    limit = gauge.count(gauge.turns.begin + draft.context) + gauge.count(draft.question + gauge.turns.end) + 97
    found = filled(draft, gauge, limit)
    assert found.context.count("\n") == draft.context.count("\n") + 97
    assert found.context.replace("\n", "") == draft.context.replace("\n", "")
    assert gold(found) == gold(draft)


def test_a_sample_does_not_depend_on_how_many_are_made(take: Callable[..., list[Record]]) -> None:
    assert take("qa_1", count=2, even_lengths=True) == take("qa_1", count=4, even_lengths=True)[:2]


def test_official_samples_stay_as_published(take: Callable[..., list[Record]]) -> None:
    with pytest.raises(ConfigError, match="official samples are as published"):
        take("vt", even_lengths=True, mode="official")


def test_blank_lines_by_hand() -> None:
    """Three to place among two line ends, one of which lies inside the gold text: behind the other, and at commas."""
    gauge = gauge_of(build_byte_tokenizer())
    text = "one, two\nthe gold\nfact, here"
    spans = ((9, 22),)
    assert text[9:22] == "the gold\nfact"
    draft = Draft(text, "?", ("x",), spans=spans)
    size = gauge.count(gauge.turns.begin + text) + gauge.count("?" + gauge.turns.end)
    found = filled(draft, gauge, size + 3)
    assert found.context == "one,\n two\n\nthe gold\nfact,\n here"
    [(start, stop)] = found.spans
    assert found.context[start:stop] == "the gold\nfact"
    assert filled(draft, gauge, size) == draft
