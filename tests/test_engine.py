"""Answers equal transformers' own where nothing is evicted, rows equal themselves alone, ends are as said."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from conftest import build_byte_tokenizer, build_tiny_model
from oracles import llm_of, speak, spy_lengths, tokens
from transformers import GenerationConfig, StoppingCriteriaList

import locret
import locret.decode
from locret.attached import attach
from locret.cache import unit_bytes
from locret.config import Sampling
from locret.errors import BackboneError, ConfigError, NumericsError
from locret.graph import StepGraph
from locret.prefill import Reader

BIG = dict(budget=600, chunk_size=24)
SMALL = dict(budget=40, chunk_size=16)
GREEDY = ["llama", "qwen3", "phi3-longrope", "gemma2-window", "smollm3", "mixtral"]
TOKENIZER = build_byte_tokenizer()


def ids_of(length, seed=0):
    return tokens(length, seed=seed)[0].tolist()


def script(monkeypatch, *rows):
    """The model's choices are given: one list of token ids a row."""

    class Scripted:
        def __init__(self, sampling, count, device):
            self.at = -1

        def __call__(self, ids, logits):
            self.at += 1
            return torch.tensor([row[min(self.at, len(row) - 1)] for row in rows])

    monkeypatch.setattr(locret.decode, "Sampler", Scripted)


def say(text):
    return TOKENIZER(text).input_ids


# ---------------------------------------------------------------------- the same as transformers


@pytest.mark.parametrize("family", GREEDY)
def test_greedy_answers_equal_transformers_generate_when_nothing_is_evicted(family):
    model = build_tiny_model(family)
    prompt = ids_of(60)
    want = copy.deepcopy(model).generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)[0, 60:].tolist()
    got = llm_of(model, **BIG).generate(prompt, max_new_tokens=20)
    assert got.tokens + ([2] if got.finish_reason == "stop" else []) == want


@pytest.mark.parametrize("family", GREEDY)
def test_attached_generate_equals_plain_generate_when_nothing_is_evicted(family):
    model = build_tiny_model(family)
    ids = tokens(60)
    options = dict(do_sample=False, max_new_tokens=15, repetition_penalty=1.2)
    want = copy.deepcopy(model).generate(ids, **options)
    with attach(model, method="knorm", **BIG):
        got = model.generate(ids, **options)
    assert torch.equal(got, want)


def test_leaving_attach_leaves_the_model_as_it_was():
    model = build_tiny_model("llama")
    ids = tokens(30)
    before = model.generate(ids, do_sample=False, max_new_tokens=5)
    with attach(model, method="knorm", **SMALL):
        assert "generate" in vars(model)
    assert "generate" not in vars(model)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=5), before)
    with pytest.raises(RuntimeError, match="inside"), attach(model, method="knorm", **SMALL):
        raise RuntimeError("inside")
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=5), before)


def test_a_left_padded_batch_through_attach_gives_each_row_what_it_gets_alone():
    model = build_tiny_model("llama")
    lengths, width = (50, 31, 50, 9), 50
    batch = torch.zeros(4, width, dtype=torch.long)
    mask = torch.zeros(4, width, dtype=torch.long)
    for i, n in enumerate(lengths):
        batch[i, width - n :] = torch.tensor(ids_of(n, seed=i))
        mask[i, width - n :] = 1
    model.generation_config.eos_token_id = list(range(8, 60))  # rows end at different steps
    options = dict(do_sample=False, max_new_tokens=12)
    plain = copy.deepcopy(model).generate(batch, attention_mask=mask, **options)
    with attach(model, method="knorm", **BIG):
        assert torch.equal(model.generate(batch, attention_mask=mask, **options), plain)
    with attach(model, method="knorm", **SMALL):
        together = model.generate(batch, attention_mask=mask, **options)
        ends = set()
        for i, n in enumerate(lengths):
            alone = model.generate(batch[i : i + 1, width - n :], **options)[0, n:]
            row = together[i, width:]
            assert row[: len(alone)].tolist() == alone.tolist()
            assert (row[len(alone) :] == 0).all()  # padding after its end
            ends.add(len(alone))
        assert len(ends) > 1


@pytest.mark.parametrize("options", [
    dict(temperature=1.0), dict(temperature=0.7, top_k=20), dict(temperature=1.3, top_p=0.8),
    dict(temperature=1.0, min_p=0.1), dict(temperature=0.9, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("cache", [BIG, SMALL], ids=["big", "small"])
def test_sampling_with_a_seed_equals_attached_and_plain_generate(options, cache):
    model = build_tiny_model("llama")
    prompt = ids_of(60)
    theirs = dict(do_sample=True, max_new_tokens=20, top_k=0, top_p=1.0) | options
    ours = llm_of(model, **cache).generate(prompt, max_new_tokens=20, seed=11, **options)
    want = ours.tokens + ([2] if ours.finish_reason == "stop" else [])
    with attach(model, method="knorm", **cache):
        torch.manual_seed(11)
        assert model.generate(torch.tensor([prompt]), **theirs)[0, 60:].tolist() == want
    if cache is BIG:
        torch.manual_seed(11)
        assert model.generate(torch.tensor([prompt]), **theirs)[0, 60:].tolist() == want


def test_a_repetition_penalty_equals_transformers_and_reads_the_whole_prompt():
    model = build_tiny_model("llama")
    prompt = ids_of(60)
    want = copy.deepcopy(model).generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=25,
                                         repetition_penalty=1.8)[0, 60:].tolist()  # fmt: skip
    got = llm_of(model, **BIG).generate(prompt, max_new_tokens=25, repetition_penalty=1.8)
    assert got.tokens == want[: len(got.tokens)]
    assert len(want) - len(got.tokens) <= 1


def test_attach_refuses_what_it_cannot_do():
    model = build_tiny_model("llama")
    with attach(model, method="knorm", **SMALL):
        with pytest.raises(ConfigError, match="num_beams is 3"):
            model.generate(tokens(10), num_beams=3, do_sample=False, max_new_tokens=3)
        mask = torch.ones(1, 10, dtype=torch.long)
        mask[0, -2:] = 0
        with pytest.raises(ConfigError, match="left-padded"):
            model.generate(tokens(10), attention_mask=mask, do_sample=False, max_new_tokens=3)
    with pytest.raises(ConfigError, match=r"'budge'.*did you mean 'budget'"), attach(model, method="knorm", budge=3):
        pass


@pytest.mark.parametrize("where", ["keyword", "config", "model"])
def test_stop_strings_end_an_attached_generate_where_they_end_a_plain_one(where):
    model = build_tiny_model("llama")
    ids = tokens(60)
    whole = model.generate(ids, do_sample=False, max_new_tokens=12)[0, 60:].tolist()
    stop = [next(text for text in map(TOKENIZER.decode, whole) if text.isascii() and text.isalnum())]
    options = dict(tokenizer=TOKENIZER)
    if where == "config":
        options["generation_config"] = GenerationConfig(stop_strings=stop, do_sample=False, max_new_tokens=12)
    else:
        options |= dict(do_sample=False, max_new_tokens=12)
    if where == "keyword":
        options["stop_strings"] = stop
    if where == "model":
        model.generation_config.stop_strings = stop
    want = model.generate(ids, **options)
    assert want.shape[1] < 60 + len(whole)
    with attach(model, method="knorm", **BIG):
        assert torch.equal(model.generate(ids, **options), want)
        never = StoppingCriteriaList([lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool)])
        assert torch.equal(model.generate(ids, options.pop("generation_config", None), None, never, **options), want)
        with pytest.raises(ConfigError, match="add tokenizer=tokenizer"):
            model.generate(ids, stop_strings=stop)


@pytest.mark.parametrize("name", ["output_scores", "output_logits", "output_attentions", "output_hidden_states"])
def test_attach_refuses_results_that_it_does_not_fill(name):
    model = build_tiny_model("llama", attn_implementation="eager")
    with attach(model, method="knorm", **SMALL), pytest.raises(ConfigError, match=f"{name} with return_dict"):
        model.generate(tokens(10), max_new_tokens=3, do_sample=False, return_dict_in_generate=True, **{name: True})


def test_attach_inside_attach_goes_back_to_the_outer_one():
    model = build_tiny_model("llama")
    with attach(model, method="knorm", **SMALL):
        outer = vars(model)["generate"]
        with attach(model, method="recency", **SMALL):
            pass
        assert vars(model)["generate"] is outer
    assert "generate" not in vars(model)


@pytest.mark.parametrize("options", [dict(assistant_model=True), dict(prompt_lookup_num_tokens=3)], ids=str)
def test_attach_refuses_assisted_decoding(options):
    """transformers drops the assistant before it calls our loop: the user would get another speed without a word."""
    model = build_tiny_model("llama")
    if "assistant_model" in options:
        options = dict(assistant_model=build_tiny_model("llama"))
    with attach(model, method="knorm", **SMALL), pytest.raises(ConfigError, match="assist"):
        model.generate(tokens(30), do_sample=False, max_new_tokens=6, **options)


def test_attached_generate_hands_every_token_to_the_streamer():
    """transformers gives the prompt to the streamer and then drops it for a callable `custom_generate`: a
    TextIteratorStreamer would wait for its end for ever."""
    model = build_tiny_model("llama")
    ids = tokens(30)
    seen = []

    class Streamer:
        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append("end")

    with attach(model, method="knorm", **SMALL):
        out = model.generate(ids, do_sample=False, max_new_tokens=6, streamer=Streamer(), return_dict_in_generate=True)
    assert seen == [*out.sequences[0].tolist(), "end"]


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.9, seed=4), dict(temperature=1.0, seed=1, top_p=0.9)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("method", ["knorm", "locret", "snapkv", "random", "recency", "full"])
def test_a_batch_row_gets_what_it_gets_alone(method, options):
    """Unequal lengths, equal lengths, the same prompt twice; float64, so that another batch size rounds alike."""
    llm = llm_of(build_tiny_model("llama", dtype=torch.float64), method, **SMALL)
    prompts = [ids_of(n, seed=s) for n, s in ((90, 0), (17, 1), (90, 2), (1, 3), (17, 1), (60, 5))]
    together = llm.generate(prompts, max_new_tokens=14, **options)
    for prompt, row in zip(prompts, together, strict=True):
        alone = llm.generate(prompt, max_new_tokens=14, **options)
        assert (row.tokens, row.text, row.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)


def test_a_batch_row_costs_what_it_costs_alone(monkeypatch):
    llm = llm_of(**SMALL)
    prompts = [ids_of(n, seed=s) for n, s in ((90, 0), (17, 1), (90, 2), (1, 3))]
    for row, prompt in zip(llm.generate(prompts, max_new_tokens=14), prompts, strict=True):
        a, b = row.stats, llm.generate(prompt, max_new_tokens=14).stats
        assert a.prompt_tokens == len(prompt)
        assert (a.new_tokens, a.kv_bytes, a.peak_kv_bytes) == (b.new_tokens, b.kv_bytes, b.peak_kv_bytes)


def test_a_list_of_one_prompt_gives_a_list_of_one_answer():
    llm = llm_of(**SMALL)
    assert [o.tokens for o in llm.generate(["hello"], max_new_tokens=4)] == [
        llm.generate("hello", max_new_tokens=4).tokens
    ]


def test_progress_of_a_batch_reaches_the_total_once():
    seen = []
    llm_of(**SMALL).generate([ids_of(40), ids_of(25), ids_of(40, 1)], max_new_tokens=2,
                             on_progress=lambda done, total: seen.append((done, total)))  # fmt: skip
    assert seen[-1] == (105, 105)
    assert all(a[0] < b[0] for a, b in itertools.pairwise(seen))


# ---------------------------------------------------------------------- ends


def first_tokens(llm, prompt, count):
    return llm.generate(prompt, max_new_tokens=count).tokens


def test_an_end_token_as_the_first_one_gives_an_empty_answer():
    model = build_tiny_model("llama")
    model.generation_config.eos_token_id = None
    llm = llm_of(model, tokenizer=None, **SMALL)
    first = first_tokens(llm, ids_of(50), 1)[0]
    model.generation_config.eos_token_id = first
    out = llm_of(model, **SMALL).generate(ids_of(50))
    assert (out.text, out.tokens, out.finish_reason) == ("", [], "stop")
    assert (out.stats.prompt_tokens, out.stats.new_tokens) == (50, 0)


def test_any_of_a_list_of_end_tokens_ends_the_answer():
    model = build_tiny_model("llama")
    model.generation_config.eos_token_id = []
    free = first_tokens(llm_of(model, **SMALL), ids_of(50), 30)
    end = next(t for i, t in enumerate(free) if i >= 3 and t not in free[:i])
    model.generation_config.eos_token_id = [7, end]
    out = llm_of(model, **SMALL).generate(ids_of(50), max_new_tokens=30)
    assert out.tokens == free[: free.index(end)]
    assert out.finish_reason == "stop"


def test_the_tokenizers_end_token_counts_when_the_model_names_none(monkeypatch):
    model = build_tiny_model("llama")
    model.generation_config.eos_token_id = None
    script(monkeypatch, [*say("ab"), 2, *say("cd")])
    assert llm_of(model, **SMALL).generate("x").text == "ab"


def test_max_new_tokens_is_exact():
    llm = llm_of(speak(build_tiny_model("llama")), **SMALL)
    for count in (1, 2, 13):
        out = llm.generate(ids_of(50), max_new_tokens=count)
        assert len(out.tokens) == len(out.text) == out.stats.new_tokens == count
        assert out.finish_reason == "length"


def test_a_stop_string_spread_over_tokens_ends_the_answer_and_never_shows(monkeypatch):
    script(monkeypatch, say("one two STOP three"))
    llm = llm_of(**SMALL)
    stream = llm.stream("x", stop=["STOP", "never"])
    pieces = list(stream)
    assert "".join(pieces) == stream.output.text == "one two "
    assert stream.output.finish_reason == "stop"
    assert stream.output.tokens == say("one two STOP")
    assert llm.generate("x", stop="two").text == "one "


def test_the_beginning_of_a_stop_string_shows_when_the_answer_ends_there(monkeypatch):
    script(monkeypatch, [*say("one STO"), 2])
    out = llm_of(**SMALL).generate("x", stop="STOP")
    assert (out.text, out.finish_reason) == ("one STO", "stop")
    script(monkeypatch, say("one STOP"))
    out = llm_of(**SMALL).generate("x", stop="STOP", max_new_tokens=7)
    assert (out.text, out.finish_reason) == ("one STO", "length")


def test_rows_of_a_batch_end_on_their_own(monkeypatch):
    script(monkeypatch, [*say("abc"), 2, *say("junk")], [*say("a stop!"), *say("junk")], say("0123456789" * 3))
    outs = llm_of(**SMALL).generate([ids_of(20, s) for s in range(3)], stop="stop", max_new_tokens=12)
    assert [o.text for o in outs] == ["abc", "a ", "012345678901"]
    assert [o.finish_reason for o in outs] == ["stop", "stop", "length"]
    assert [o.stats.new_tokens for o in outs] == [3, 6, 12]


# ---------------------------------------------------------------------- streams


# ---------------------------------------------------------------------- logits that are NaN


def poison(monkeypatch, llm, step, row):
    """The token that a row reads in this decode step, from 1 on, is NaN to the model."""
    run, weight, steps = llm.backbone.run, llm.backbone.model.get_input_embeddings().weight, itertools.count(1)

    def poisoned(ids, context, **options):
        if ids.shape[1] > 1 or next(steps) != step:
            return run(ids, context, **options)
        assert ids[:, 0].tolist().count(ids[row, 0]) == 1, "the rows read different tokens"
        whole = weight[ids[row, 0]].clone()
        weight[ids[row, 0]] = float("nan")
        out = run(ids, context, **options)
        weight[ids[row, 0]] = whole
        return out

    monkeypatch.setattr(llm.backbone, "run", poisoned)


def replay_steps(monkeypatch):
    """As on a GPU: alike, and launched before the host has seen the token that they read."""

    def of(reader):
        if reader._graph is None:
            reader._graph = StepGraph.of(reader, capture=False) or False
        return reader._graph or None

    monkeypatch.setattr(Reader, "_step_graph", of)


# knorm's scores are NaN in the same step; ordinary steps look at these first
@pytest.mark.parametrize(("method", "replayed"), [("full", False), ("full", True), ("knorm", True)])
@pytest.mark.parametrize("options", [{}, dict(temperature=1.0, seed=3), dict(repetition_penalty=1.2)], ids=str)
def test_logits_that_become_nan_while_an_answer_is_made_are_an_error(method, replayed, options, monkeypatch):
    """They once were looked at behind the prompt only: the likeliest token was the first NaN, and so on to the end."""
    llm = llm_of(build_tiny_model("llama"), method, **BIG)
    if replayed:
        replay_steps(monkeypatch)
    prompts = [ids_of(n, seed) for seed, n in enumerate((31, 20, 20))]
    want = llm.generate(prompts, max_new_tokens=12, **options)
    assert all(output.finish_reason == "length" for output in want)
    poison(monkeypatch, llm, 11 + 5, 1)  # the longer prompt's 11 steps, then the fifth of the other two
    with pytest.raises(NumericsError, match=r"the logits of row 2 are NaN or infinite after 5 tokens"):
        llm.generate(prompts, max_new_tokens=12, **options)
    assert [output.tokens for output in llm.generate(prompts, max_new_tokens=12, **options)] == [
        output.tokens for output in want
    ]


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("options", [{}, dict(repetition_penalty=1.2)], ids=str)
def test_a_row_that_has_ended_may_be_nan(replayed, options, monkeypatch):
    """Nobody reads on in it; what it is given in the place of a token must be one to the model."""
    llm = llm_of(build_tiny_model("llama"), "full", **BIG)
    if replayed:
        replay_steps(monkeypatch)
    prompts = [ids_of(20, seed) for seed in (1, 2)]
    first, second = llm.generate(prompts, max_new_tokens=12, **options)
    assert first.tokens[3] not in [*first.tokens[:3], *second.tokens]
    llm.backbone.model.generation_config.eos_token_id = first.tokens[3]
    poison(monkeypatch, llm, 5, 0)
    got = llm.generate(prompts, max_new_tokens=12, **options)
    assert [output.tokens for output in got] == [first.tokens[:3], second.tokens]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, dict(temperature=1.0, seed=3)], ids=str)
def test_logits_that_become_nan_on_a_gpu_are_an_error_and_the_process_lives_on(options):
    """Steps are replayed there, and the next one is on its way when the host learns of it."""
    llm = llm_of(build_tiny_model("llama", head_dim=64).cuda(), "full", **BIG)
    want = llm.generate(ids_of(20), max_new_tokens=12, **options).tokens
    weight, poisoned = llm.backbone.model.get_input_embeddings().weight, want[4]
    assert poisoned not in [*ids_of(20), *want[:4]]
    whole = weight[poisoned].clone()
    weight[poisoned] = float("nan")
    with pytest.raises(NumericsError, match=r"the logits of row 0 are NaN or infinite after 5 tokens"):
        llm.generate(ids_of(20), max_new_tokens=12, **options)
    weight[poisoned] = whole
    assert llm.generate(ids_of(20), max_new_tokens=12, **options).tokens == want


def test_streams_give_characters_whole_and_the_answer_complete(monkeypatch):
    text = "naïve 世界 🎉👩‍👧 done"
    script(monkeypatch, [*say(text), 2])
    stream = llm_of(**SMALL).stream("x")
    pieces = list(stream)
    assert "".join(pieces) == stream.output.text == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) == len(text)  # one token is one byte, so each character is a piece of its own


@pytest.mark.parametrize("options", [dict(), dict(temperature=1.0, seed=3)], ids=str)
def test_a_stream_equals_generate(options):
    llm = llm_of("llama", "locret", **SMALL)
    stream = llm.stream("tell me " * 20, max_new_tokens=40, **options)
    pieces = list(stream)
    want = llm.generate("tell me " * 20, max_new_tokens=40, **options)
    assert "".join(pieces) == want.text
    assert (stream.output.tokens, stream.output.finish_reason) == (want.tokens, want.finish_reason)


def test_leaving_a_stream_early_keeps_what_was_generated_and_puts_the_model_back():
    model = speak(build_tiny_model("llama"))
    stream = llm_of(model, **SMALL).stream("hello", max_new_tokens=30)
    got = [next(stream) for _ in range(3)]
    stream.close()
    assert stream.output.text == "".join(got)
    assert stream.output.stats.new_tokens == len(stream.output.tokens) < 30
    assert model.config._attn_implementation == "sdpa"


# ---------------------------------------------------------------------- prompts


def test_text_is_one_user_turn_of_the_template():
    llm = llm_of(**SMALL)
    ids = TOKENIZER.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    ids = ids if isinstance(ids, list) else ids["input_ids"]
    want = llm.generate(list(ids), max_new_tokens=8)
    assert llm.generate("hello", max_new_tokens=8).tokens == want.tokens
    assert llm.generate([{"role": "user", "content": "hello"}], max_new_tokens=8).tokens == want.tokens
    assert want.stats.prompt_tokens == len(ids)


def test_all_messages_are_read():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
                {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"}]  # fmt: skip
    out = llm_of(**SMALL).generate(messages, max_new_tokens=1)
    assert out.stats.prompt_tokens == 1 + 3 + 3 + 3 + 3 + 1  # bos; role, letter, end of each; the assistant's mark


def test_token_ids_are_taken_as_they_are():
    llm = llm_of(tokenizer=None, **SMALL)
    out = llm.generate([5, 6, 7], max_new_tokens=3)
    assert (out.stats.prompt_tokens, out.text) == (3, "")
    with pytest.raises(ConfigError, match="without a tokenizer"):
        llm.generate("text")


def test_without_a_chat_template_text_follows_the_first_token():
    llm = llm_of(tokenizer=build_byte_tokenizer(chat_template=None), **SMALL)
    assert llm.generate("hello", max_new_tokens=1).stats.prompt_tokens == 6
    with pytest.raises(ConfigError, match="no chat template"):
        llm.generate([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("prompt", ["", "  \n", [], [[]], ["fine", ""], [{"role": "user"}], 7, None], ids=repr)
def test_prompts_of_nothing_are_refused(prompt):
    with pytest.raises(ConfigError):
        llm_of(**SMALL).generate(prompt)


def test_unknown_options_are_refused_with_the_nearest_name(tiny_folder):
    llm = llm_of(**SMALL)
    for call in (llm.generate, llm.stream):
        with pytest.raises(ConfigError, match=r"'max_tokens'.*did you mean 'max_new_tokens'"):
            call("x", max_tokens=3)
    with pytest.raises(ConfigError, match=r"'chunksize'.*did you mean 'chunk_size'"):
        locret.load(tiny_folder("llama"), method="knorm", chunksize=3)
    with pytest.raises(ConfigError, match=r"'snapvk'.*did you mean 'snapkv'"):
        locret.load(tiny_folder("llama"), method="snapvk")
    with pytest.raises(ConfigError, match=r"'windw'.*did you mean 'window'"):
        locret.load(tiny_folder("llama"), method="snapkv", method_options={"windw": 3})
    with pytest.raises(ConfigError, match=r"'compac'.*did you mean 'compact'"):
        locret.load(tiny_folder("llama"), method="knorm", positions="compac")
    with pytest.raises(ConfigError, match="not both"):
        llm.generate("x", sampling=Sampling(), max_new_tokens=3)


def test_the_trained_method_without_heads_says_where_to_get_them(tiny_folder):
    with pytest.raises(ConfigError, match="needs heads"):
        locret.load(tiny_folder("llama"))


def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path):
    with pytest.raises(BackboneError, match=re.escape(str(tmp_path))):
        locret.load(tmp_path, method="knorm")


def test_a_loaded_folder_answers_as_the_model_in_memory(tiny_folder):
    got = locret.load(tiny_folder("llama"), method="knorm", **SMALL).generate("hello", max_new_tokens=8)
    assert got.tokens == llm_of(**SMALL).generate("hello", max_new_tokens=8).tokens


# ---------------------------------------------------------------------- protected spans


def test_protected_text_survives_prefill_and_decoding():
    from locret import prefill

    readers = []
    start = prefill.Reader.start.__func__

    def spy(cls, *args, **options):
        readers.append(start(cls, *args, **options))
        return readers[-1]

    llm = llm_of(speak(build_tiny_model("llama")), "random", **SMALL)
    text = "x" * 50 + "KEEP" + "y" * 40 + "KEEP" + "z" * 30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill.Reader, "start", classmethod(spy))
        out = llm.generate(text, protect=["KEEP"], max_new_tokens=60)
    assert out.stats.new_tokens == 60  # many evictions while decoding
    begin = 2  # after <bos> and <|user|>
    want = {begin + i for i in (*range(50, 54), *range(94, 98))}
    for layer in readers[0].cache.layers:
        for head in layer.units().position[0].tolist():
            assert want <= set(head)


def test_protecting_text_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match="protect: 'MISSING' does not occur"):
        llm_of(**SMALL).generate("some text", protect=["MISSING"])
    with pytest.raises(ConfigError, match="token ids has none"):
        llm_of(**SMALL).generate([1, 2, 3], protect=["x"])
    with pytest.raises(ConfigError, match="protect"):
        llm_of(**SMALL).generate("some text", protect=[""])


def test_protecting_more_than_the_budget_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"budget 40 .* protected 60"):
        llm_of(**SMALL).generate("x" * 60 + "y" * 60, protect=["x" * 60])


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("length", "ends"), [(50, False), (50, True), (5, False), (5, True)])
def test_the_numbers_of_an_answer_agree_with_each_other(monkeypatch, length, ends):
    llm = llm_of(**SMALL)
    script(monkeypatch, [*say("abcdef"), 2] if ends else say("abcdefghij"))
    with spy_lengths(monkeypatch) as seen:
        out = llm.generate(ids_of(length), max_new_tokens=8)
    stats, one = out.stats, unit_bytes(8, torch.float32)
    assert stats.prompt_tokens == length
    assert stats.new_tokens == len(out.tokens) == (6 if ends else 8)
    assert (stats.method, stats.budget) == ("knorm", 40)
    capacity = min(40, length + 8)
    assert stats.kv_bytes == 2 * 2 * min(41, length + 8) * one  # one to spare for a replayed step
    assert max(seen.held) <= capacity
    assert stats.kv_bytes < stats.peak_kv_bytes <= stats.kv_bytes + 2 * (capacity + 16) * one * 2
    assert stats.kv_bytes_full == 2 * 2 * (length + stats.new_tokens) * 2 * 8 * 4
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0
    flat = out.to_dict()
    assert {"text", "prompt_tokens", "new_tokens", "finish_reason", "method", "budget", "chunk_size", "kv_bytes",
            "peak_kv_bytes", "kv_bytes_full", "prefill_seconds", "decode_seconds"} <= set(flat)  # fmt: skip


def test_a_question_counts_the_tokens_that_were_read(monkeypatch):
    llm = llm_of(**SMALL)
    context = llm.compress(ids_of(70))
    script(monkeypatch, [*say("abc"), 2])
    out = context.ask([9, 10, 11], max_new_tokens=8)
    assert (out.stats.prompt_tokens, out.stats.new_tokens) == (73, 3)


def test_the_full_method_reports_a_cache_that_grows():
    out = llm_of("llama", "full", **SMALL).generate(ids_of(100), max_new_tokens=8)
    assert out.stats.budget is None
    assert out.stats.kv_bytes >= 2 * 2 * 107 * unit_bytes(8, torch.float32)


def test_answering_leaves_the_programs_own_random_numbers_alone():
    llm = llm_of(**SMALL)
    torch.manual_seed(0)
    want = torch.randn(3)
    torch.manual_seed(0)
    llm.generate("hello", max_new_tokens=3)
    assert torch.equal(torch.randn(3), want)
