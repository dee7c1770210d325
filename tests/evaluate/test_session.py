"""A session of several rows against the public surface that it stands in for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from eval_samples import record

from locret.backbone import Backbone
from locret.config import CacheConfig, Sampling
from locret.engine import LLM
from locret.evaluate.prompts import Encoder
from locret.evaluate.session import Session
from locret.methods import get_method, list_methods
from locret.tasks.records import Turn


@pytest.fixture
def llm(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> LLM:
    backbone = Backbone(tiny_model("llama"), tiny_tokenizer)
    return LLM(backbone, get_method("snapkv"), CacheConfig(budget=160, chunk_size=64, local_window=4))


def test_compress_and_ask_is_what_a_context_answers(llm: LLM) -> None:
    records = [record(i) for i in (0, 3, 6)]  # one length
    prompts = [Encoder(llm.backbone.tokenizer).prompt(r) for r in records]
    assert len({len(p.context) for p in prompts}) == 1
    session = Session.compress(llm, [p.context for p in prompts])
    answers = session.ask([p.asks[0].first for p in prompts], sampling=Sampling(max_new_tokens=6))
    for i, r in enumerate(records):
        context = llm.compress(r.context)
        assert answers[i].text == context.ask(r.question.strip(), max_new_tokens=6).text
        gold = prompts[i].gold
        held = [[len(set(gold) & set(head.tolist())) for head in layer] for layer in context.kept()]
        assert session.gold_kept([p.gold for p in prompts])[i] == held
        assert session.kv_bytes == context.kv_bytes
        assert session.peak_kv_bytes == context.peak_kv_bytes


@pytest.mark.parametrize("method", [info.name for info in list_methods() if not info.trained])
def test_rows_of_a_batch_are_what_they_are_alone(llm: LLM, method: str) -> None:
    """Every method: whole batch, some of its rows, and each row's context by itself."""
    if method == "full":
        other = dataclasses.replace(llm, method=get_method("full"), config=CacheConfig())
    else:
        other = dataclasses.replace(llm, method=get_method(method, **({"lag": 16} if method == "lagkv" else {})))
    records = [record(i) for i in (0, 3, 6)]
    prompts = [Encoder(llm.backbone.tokenizer).prompt(r) for r in records]
    session = Session.compress(other, [p.context for p in prompts])
    sampling = Sampling(max_new_tokens=4)
    together = session.ask([p.asks[0].first for p in prompts], sampling)
    [last] = session.rows([2]).ask([prompts[2].asks[0].first], sampling)
    for i, r in enumerate(records):
        context = other.compress(r.context)
        assert together[i].text == context.ask(r.question.strip(), sampling=sampling).text
        held = [[len(set(prompts[i].gold) & set(head.tolist())) for head in layer] for layer in context.kept()]
        assert session.gold_kept([p.gold for p in prompts])[i] == held
        assert session.kv_bytes == context.kv_bytes
    assert last.text == together[2].text


def test_chat_is_what_a_context_chats(llm: LLM) -> None:
    r = record(1, turns=2)
    prompt = Encoder(llm.backbone.tokenizer).prompt(r)
    session = Session.compress(llm, [prompt.context])
    answers = session.chat([(ask.first, ask.later) for ask in prompt.asks], Sampling(max_new_tokens=5))
    context = llm.compress(r.context)
    texts = [context.chat(q, max_new_tokens=5).text for q in (r.question.strip(), *(t.question for t in r.turns))]
    assert [a.text for a in answers] == texts
    assert session.chat([(prompt.asks[0].first, [])], Sampling(max_new_tokens=5))[0].text == texts[0], (
        "the session stays as it was"
    )


def test_reading_whole_prompts_is_what_generate_does(llm: LLM) -> None:
    records = [record(i) for i in (0, 3)]
    encoder = Encoder(llm.backbone.tokenizer)
    ids = [np.concatenate((p.context, np.array(p.asks[0].first, dtype=np.int32))) for p in map(encoder.prompt, records)]
    answers = Session.read(llm, ids, Sampling(max_new_tokens=6)).answer(Sampling(max_new_tokens=6))
    outputs = llm.generate([r.context + r.question for r in records], max_new_tokens=6)
    assert [a.text for a in answers] == [o.text for o in outputs]


def test_gold_tokens_are_those_of_the_spans(tiny_tokenizer: Any) -> None:
    """One token a byte: token i is character i - 2 (the template's two opening tokens)."""
    r = record(0)
    prompt = Encoder(tiny_tokenizer).prompt(r)
    [(start, stop)] = r.spans
    assert prompt.gold == list(range(start + 2, stop + 2))
    with_turn = dataclasses.replace(r, turns=(Turn("q", ("a",), spans=((0, 3),)),))
    assert Encoder(tiny_tokenizer).prompt(with_turn).gold == [2, 3, 4, *prompt.gold]


def test_a_long_context_loses_its_middle(tiny_tokenizer: Any) -> None:
    r = record(0)
    whole = Encoder(tiny_tokenizer).prompt(r)
    cut = Encoder(tiny_tokenizer, max_context=101).prompt(r)
    assert cut.context.tolist() == whole.context[:51].tolist() + whole.context[-50:].tolist()
    keep = Encoder(tiny_tokenizer, max_context=len(whole.context)).prompt(r)
    assert keep.context.tolist() == whole.context.tolist()
    near = record(0, spans=((0, 4), (len(r.context) - 3, len(r.context))))
    assert Encoder(tiny_tokenizer, max_context=101).prompt(near).gold == [2, 3, 4, 5, 98, 99, 100]


def test_the_prefix_begins_the_answer(tiny_tokenizer: Any) -> None:
    ask = Encoder(tiny_tokenizer).prompt(record(0, answer_prefix=" The key is")).asks[0]
    text = tiny_tokenizer.decode(ask.first)
    assert text.endswith("<|assistant|> The key is")
    assert tiny_tokenizer.decode(ask.target) == " 4000"
