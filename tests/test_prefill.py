"""The chunk loop equals a reading of the method that never gathers, and exact attention where nothing is evicted."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import build_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    MaskedReference,
    kept,
    method_of,
    naive_head_scores,
    naive_key_norm,
    naive_recency,
    reader_of,
    relative,
    tokens,
)  # fmt: skip

import locret.prefill
from locret.backbone import Backbone
from locret.config import POSITIONS, CacheConfig
from locret.errors import ConfigError
from locret.prefill import Reader

N = 110


@pytest.fixture(scope="module")
def exact():
    """A Llama with llama3 RoPE scaling, in float64."""
    return Backbone(build_tiny_model("llama", dtype=torch.float64))


@pytest.fixture(scope="module")
def backbone():
    return Backbone(build_tiny_model("llama"))


def plain(backbone, ids):
    with torch.no_grad():
        return backbone.model(ids, use_cache=False).logits[:, -1]


# ---------------------------------------------------------------------- eviction

SETTINGS = [  # budget, chunk, sinks, stabilizers, local, interval
    (40, 24, 4, 10, 10, 5),
    (40, 24, 0, 0, 0, 1),
    (30, 7, 2, 3, 20, 8),  # the local window is longer than a chunk: it is read in pieces
    (30, 64, 0, 12, 5, 13),
    (109, 16, 4, 5, 9, 3),  # one unit too many
    (25, 110, 1, 6, 0, 4),  # one chunk
    (12, 1, 1, 3, 2, 2),  # token by token
]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(("budget", "chunk", "sinks", "stabilizers", "local", "interval"), SETTINGS)
@pytest.mark.parametrize("name", ["locret", "knorm"])
def test_eviction_equals_a_masked_reference_that_never_gathers(
    exact, name, budget, chunk, sinks, stabilizers, local, interval, positions
):
    """Kept sets of every layer and head, prompt logits and 12 decode steps."""
    options = dict(budget=budget, positions=positions)
    method = method_of(name, exact)
    score = naive_head_scores(method.heads) if name == "locret" else naive_key_norm
    want = MaskedReference(exact.model, score, chunk=chunk, sinks=sinks, stabilizers=stabilizers, local=local,
                           interval=interval, **options)  # fmt: skip
    ids = tokens(N + 12)
    with torch.inference_mode():
        reader = reader_of(exact, method, N, chunk_size=chunk, num_sinks=sinks, num_stabilizers=stabilizers,
                           local_window=local, decode_interval=interval, **options)  # fmt: skip
        assert relative(reader.read(ids[:, :N])[0], want.prefill(ids[:, :N])) < 1e-9
        assert kept(reader) == want.kept()
        for token in ids[0, N:].tolist():
            assert relative(reader.step(torch.tensor([token]))[0], want.step(token)) < 1e-9
            assert kept(reader) == want.kept()


@pytest.mark.parametrize("positions", POSITIONS)
def test_eviction_with_protected_units_equals_the_masked_reference(exact, positions):
    mask = torch.zeros(N, dtype=torch.bool)
    mask[[5, 6, 7, 30, 31, 70, 108]] = True
    want = MaskedReference(exact.model, naive_key_norm, budget=32, chunk=16, sinks=2, stabilizers=6, local=5,
                           interval=4, positions=positions, protected=mask)  # fmt: skip
    config = CacheConfig(budget=32, chunk_size=16, num_sinks=2, num_stabilizers=6, local_window=5, decode_interval=4,
                         positions=positions)  # fmt: skip
    ids = tokens(N + 20)
    with torch.inference_mode():
        reader = Reader.start(exact, method_of("knorm", exact), config, batch=1, prompt_len=N, num_protected=7)
        assert relative(reader.read(ids[:, :N], protected=mask)[0], want.prefill(ids[:, :N])) < 1e-9
        for token in ids[0, N:].tolist():
            assert relative(reader.step(torch.tensor([token]))[0], want.step(token)) < 1e-9
    assert kept(reader) == want.kept()
    assert all({5, 6, 7, 30, 31, 70, 108} <= set(head) for layer in kept(reader) for head in layer)


def test_recency_equals_the_masked_reference(exact):
    want = MaskedReference(exact.model, naive_recency, budget=30, chunk=16, sinks=4, stabilizers=7, local=6, interval=3,
                           positions="compact")  # fmt: skip
    ids = tokens(N)
    with torch.inference_mode():
        reader = reader_of(exact, "recency", N, budget=30, chunk_size=16, num_sinks=4, num_stabilizers=7,
                           local_window=6, decode_interval=3)  # fmt: skip
        assert relative(reader.read(ids)[0], want.prefill(ids)) < 1e-9
        for token in range(40, 60):
            assert relative(reader.step(torch.tensor([token]))[0], want.step(token)) < 1e-9
    assert kept(reader) == want.kept()


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_options_give_what_the_masked_reference_gives(data):
    model = build_tiny_model("llama-plain", dtype=torch.float64, hidden_size=32, num_attention_heads=4, seed=3)
    backbone = Backbone(model)
    n = data.draw(st.integers(1, 60))
    sinks, stabilizers, local, interval = (data.draw(st.integers(low, 6)) for low in (0, 0, 0, 1))
    budget = sinks + max(stabilizers, local) + interval + data.draw(st.integers(0, 30))
    chunk, positions = data.draw(st.integers(1, 70)), data.draw(st.sampled_from(POSITIONS))
    want = MaskedReference(model, naive_key_norm, budget=budget, chunk=chunk, sinks=sinks, stabilizers=stabilizers,
                           local=local, interval=interval, positions=positions)  # fmt: skip
    ids = tokens(n + 8, seed=n)
    with torch.inference_mode():
        reader = reader_of(backbone, "knorm", n, budget=budget, chunk_size=chunk, num_sinks=sinks, local_window=local,
                           num_stabilizers=stabilizers, decode_interval=interval, positions=positions)  # fmt: skip
        assert relative(reader.read(ids[:, :n])[0], want.prefill(ids[:, :n])) < 1e-9
        for token in ids[0, n:].tolist():
            assert relative(reader.step(torch.tensor([token]))[0], want.step(token)) < 1e-9
    assert kept(reader) == want.kept()


def test_attention_over_the_compacted_cache_is_full_attention_without_the_evicted(exact, monkeypatch):
    """One decode step: softmax over all tokens with -inf on what was evicted, rotated where they were read."""
    seen = {}

    class Watch(type(method_of("knorm", exact))):
        def score(self, view):
            for name in "qkv":
                seen.setdefault((name, view.layer), []).append(getattr(view, name).clone())
            return super().score(view)

    outputs = []

    def recorded(inner):
        def record(*args, **options):
            outputs.append(inner(*args, **options))
            return outputs[-1]

        return record

    for name in ("prefix_causal_attention", "add_prefix"):
        monkeypatch.setattr(locret.prefill, name, recorded(getattr(locret.prefill, name)))
    ids = tokens(N)
    with torch.inference_mode():
        reader = reader_of(exact, Watch(), N, budget=40, chunk_size=16, positions="original")
        reader.read(ids)
        before = kept(reader)
        outputs.clear()
        reader.step(torch.tensor([77]))
    rope = exact.rope(N + 1, N)
    for layer in range(exact.num_layers):
        q = rope.rotate(layer, seen["q", layer][-1], torch.tensor([N]))
        k = rope.rotate(layer, torch.cat(seen["k", layer], 2), torch.arange(N + 1))
        v = torch.cat(seen["v", layer], 2)
        hidden = torch.full((exact.num_kv_heads, N + 1), float("-inf"), dtype=torch.float64)
        for head in range(exact.num_kv_heads):
            hidden[head, [*before[layer][head], N]] = 0.0
        group = exact.num_q_heads // exact.num_kv_heads
        for head in range(exact.num_q_heads):
            kv = head // group
            weights = (q[0, head] @ k[0, kv].T * exact.head_dim**-0.5 + hidden[kv]).softmax(-1)
            torch.testing.assert_close(outputs[layer][0, head], weights @ v[0, kv], rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- scores


def cached_scores(backbone, name, ids, **options):
    with torch.inference_mode():
        reader = reader_of(backbone, name, ids.shape[1], budget=4096, positions="original", **options)
        reader.read(ids)
    return [layer.units().score.clone() for layer in reader.cache.layers]


@pytest.mark.parametrize("name", ["locret", "knorm"])
def test_a_score_does_not_depend_on_later_tokens(exact, name):
    ids = tokens(80)
    before = cached_scores(exact, name, ids, chunk_size=16)
    for t in (0, 40, 79):
        changed = ids.clone()
        changed[0, t] = 8 + (ids[0, t] - 7) % 250
        for a, b in zip(before, cached_scores(exact, name, changed, chunk_size=16), strict=True):
            assert torch.equal(a[..., :t], b[..., :t])
            assert not torch.equal(a[..., t], b[..., t])


@pytest.mark.parametrize("name", ["locret", "knorm", "random", "recency"])
def test_a_score_does_not_depend_on_the_chunks_when_nothing_is_evicted(exact, name):
    ids = tokens(80)
    want = cached_scores(exact, name, ids, chunk_size=80, local_window=0)
    for chunk, local in ((1, 0), (7, 13), (79, 1), (16, 40)):
        for a, b in zip(want, cached_scores(exact, name, ids, chunk_size=chunk, local_window=local), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- nothing to evict


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 70), chunk=st.integers(1, 80), local=st.integers(0, 75), positions=st.sampled_from(POSITIONS),
       name=st.sampled_from(["knorm", "locret", "snapkv", "full"]))  # fmt: skip
def test_any_chunk_size_gives_the_plain_logits_when_the_budget_holds_the_prompt(n, chunk, local, positions, name):
    backbone = Backbone(build_tiny_model("llama", dtype=torch.float64))
    ids = tokens(n, seed=n)
    with torch.inference_mode():
        method = method_of(name, backbone, **(dict(window=1) if name == "snapkv" else {}))
        reader = reader_of(backbone, method, n, budget=200, chunk_size=chunk, local_window=local, positions=positions)
        got = reader.read(ids)
    assert relative(got, plain(backbone, ids)) < 1e-12
    assert kept(reader) == [[list(range(n))] * 2] * 2


@pytest.mark.parametrize("name", ["knorm", "locret", "snapkv", "recency", "random", "full"])
def test_a_prompt_of_one_token_is_exact(exact, name):
    ids = tokens(1)
    with torch.inference_mode():
        reader = reader_of(exact, name, 1, budget=40)
        assert relative(reader.read(ids), plain(exact, ids)) < 1e-12
        more = reader.step(torch.tensor([99]))
    assert relative(more, plain(exact, torch.cat((ids, torch.tensor([[99]])), 1))) < 1e-12


def test_a_prompt_shorter_than_the_local_window_is_exact(exact):
    ids = tokens(9)
    with torch.inference_mode():
        reader = reader_of(exact, "knorm", 9, budget=80, local_window=50, chunk_size=4)
        assert relative(reader.read(ids), plain(exact, ids)) < 1e-12


def test_a_prompt_exactly_as_long_as_the_budget_is_exact(exact):
    ids = tokens(40)
    with torch.inference_mode():
        reader = reader_of(exact, "knorm", 40, budget=40, chunk_size=16)
        assert relative(reader.read(ids), plain(exact, ids)) < 1e-12
    assert reader.cache.held == 40
    assert not any(layer.evicted for layer in reader.cache.layers)


def test_reading_in_two_goes_equals_reading_at_once_when_the_budget_holds_both(exact):
    ids = tokens(60)
    with torch.inference_mode():
        reader = reader_of(exact, "knorm", 60, budget=80, chunk_size=16)
        reader.read(ids[:, :33], local_window=0, more=True)
        got = reader.read(ids[:, 33:])
    assert relative(got, plain(exact, ids)) < 1e-12


def test_a_prompt_of_no_tokens_is_refused(backbone):
    with pytest.raises(ConfigError, match="no tokens"):
        reader_of(backbone, "knorm", 0, budget=40).read(torch.empty(1, 0, dtype=torch.long))


def test_progress_counts_every_chunk_up_to_the_prompt(backbone):
    seen = []
    with torch.inference_mode():
        reader = reader_of(backbone, "knorm", 50, budget=40, chunk_size=16, local_window=5)
        reader.read(tokens(50), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 50), (32, 50), (45, 50), (50, 50)]


# ---------------------------------------------------------------------- pins


def test_a_budget_smaller_than_its_pins_is_refused_with_the_numbers(backbone):
    with pytest.raises(ConfigError) as error:
        reader_of(backbone, "knorm", 100, budget=30, num_sinks=4, num_stabilizers=20, local_window=25,
                  decode_interval=3)  # fmt: skip
    for number in (30, 4, 20, 25, 3, 32):
        assert re.search(rf"\b{number}\b", str(error.value)), (number, str(error.value))
    reader_of(backbone, "knorm", 100, budget=32, num_sinks=4, num_stabilizers=20, local_window=25, decode_interval=3)


def test_protected_units_that_do_not_fit_are_refused_with_the_numbers(backbone):
    config = CacheConfig(budget=40, num_sinks=2, num_stabilizers=5, local_window=5, decode_interval=3)
    Reader.start(backbone, method_of("knorm", backbone), config, batch=1, prompt_len=100, num_protected=30)
    with pytest.raises(ConfigError, match=r"budget 40 .* num_sinks 2 \+ protected 31 .*at least 41"):
        Reader.start(backbone, method_of("knorm", backbone), config, batch=1, prompt_len=100, num_protected=31)


def resolved(**options):
    return CacheConfig(**options).resolve(prompt_len=38, unit_bytes=100)


@pytest.mark.parametrize(("options", "others"), [
    (dict(budget=40), dict(num_sinks=50)), (dict(budget=1), {}), (dict(budget=900), dict(num_sinks=2000)),
    (dict(budget=10), dict(decode_interval=100)), (dict(budget=7), dict(local_window=9)),
    (dict(budget="5%"), {}), (dict(budget="500B"), dict(num_sinks=30)),
], ids=str)  # fmt: skip
def test_the_least_budget_that_an_error_names_is_the_least_that_works(options, others):
    """Defaults grow with the budget: the sum of the pins at the refused one was refused too."""
    with pytest.raises(ConfigError) as error:
        resolved(**options, **others)
    least = int(re.search(r"at least (\d+) units", str(error.value))[1])
    resolved(budget=least, **others)
    refused = int(re.search(r"(\d+)( units)? cannot hold", str(error.value))[1])
    for budget in range(refused, least):
        with pytest.raises(ConfigError):
            resolved(budget=budget, **others)


def test_a_refused_budget_is_named_as_it_was_written():
    for budget, said in (("5%", "5% of 38 tokens = 2 units"), ("500B", "500B = 5 units"), (" 3 ", "3")):
        with pytest.raises(ConfigError, match=f"budget {said} cannot hold its pinned units"):
            resolved(budget=budget)


def test_stabilizers_stay_pinned_while_more_chunks_follow_and_only_then(backbone):
    """With scores that fall with age the oldest units win, so the newest stay only where they are pinned."""

    class Oldest(type(method_of("knorm", backbone))):
        def score(self, view):
            b, h, c, _ = view.k.shape
            return -(view.start + torch.arange(c)).float().expand(b, h, c)

    def after(length, **options):
        with torch.inference_mode():
            reader = reader_of(backbone, Oldest(), 96, budget=20, chunk_size=16, num_sinks=0, num_stabilizers=6,
                               local_window=4, decode_interval=2)  # fmt: skip
            reader.read(tokens(96)[:, :length], **options)
        return kept(reader)[0][0]

    assert after(32, local_window=0, more=True) == [*range(14), *range(26, 32)]
    assert after(32, local_window=0) == list(range(20))  # nothing follows: the best of all of them
    assert after(36) == [*range(16), *range(32, 36)]  # the local window came last and stayed


# ---------------------------------------------------------------------- windows


@pytest.mark.parametrize("positions", POSITIONS)
def test_windowed_layers_keep_their_window_and_no_more(positions):
    backbone = Backbone(build_tiny_model("gemma3"))
    with torch.inference_mode():
        reader = reader_of(backbone, "knorm", N, budget=40, chunk_size=16, positions=positions)
        reader.read(tokens(N))
        windowed, budgeted = reader.cache.layers
        assert windowed.units().position[0].tolist() == [list(range(N - 23, N))] * 2
        for i in range(30):
            reader.step(torch.tensor([9 + i]))
    assert windowed.units().position[0].tolist() == [list(range(N + 7, N + 30))] * 2
    assert len(windowed.slab) == 23
    assert len(budgeted.slab) == 41


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ["knorm", "full"])
def test_a_model_of_windows_only_is_exact_in_any_budget(name, positions):
    """Nothing is evicted that the model itself would still see; only the fp32 rounding of shifted angles differs."""
    backbone = Backbone(build_tiny_model("mistral-window", dtype=torch.float64))
    ids = tokens(N + 8)
    with torch.inference_mode():
        reader = reader_of(backbone, name, N, budget=30, chunk_size=16, positions=positions, decode_interval=2)
        got = [reader.read(ids[:, :N])] + [reader.step(ids[:, i]) for i in range(N, N + 8)]
    with torch.no_grad():
        want = backbone.model(ids, use_cache=False).logits[0, N - 1 :]
    assert relative(torch.cat(got), want) < (5e-6 if positions == "compact" else 1e-12)


@pytest.mark.parametrize("method", ["knorm", "sirllm", "adakv"])
def test_a_budget_of_too_few_bytes_says_what_is_taken_whatever_it_is(method):
    backbone = Backbone(build_tiny_model("gemma3"))
    with pytest.raises(
        ConfigError, match=r"\d+ bytes are taken whatever it is \(sliding windows, room for a chunk, leng"
    ):
        reader_of(backbone, method, 50, budget="100B")
