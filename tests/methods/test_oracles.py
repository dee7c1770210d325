"""Every method equals a slow float64 reading of its paper: kept sets of every layer and head, logits, decode steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_model
from oracles import Meter, joined_of, kept, reader_of, relative, tokens, units_of
from references import (
    Chain,
    Reference,
    SurprisalReference,
    accumulated,
    accumulated_shared,
    against_the_mean,
    best_and_drawn,
    chained,
    flagged,
    gaussian_queries,
    lagged,
    last_query,
    moving_average,
    null_votes,
    position,
    proxies,
    two_kinds,
    window_votes,
)  # fmt: skip

from locret.backbone import Backbone
from locret.errors import ConfigError
from locret.methods import ChunkView, get_method
from locret.methods.cascading import cascade
from locret.methods.expected_attention import ExpectedAttention
from locret.methods.prefixkv import equal_mass, measure
from locret.methods.snapkv import SnapKV
from locret.select import draws, select_across_heads

N = 110
SNAP = dict(window=5, kernel_size=5, pooling="avg")
CACHE = [  # budget, chunk, sinks, stabilizers, local, interval
    (40, 24, 4, 10, 10, 5), (30, 7, 2, 3, 20, 8), (36, 110, 1, 6, 0, 4), (30, 5, 0, 0, 0, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def exact():
    return Backbone(build_tiny_model("llama", dtype=torch.float64))


def noise(layer, head, p):
    return draws(3, layer, torch.full((1, 2, 1), p))[0, head, 0].item()


CASES = {
    "streamingllm": (dict(num_sinks=3), dict(rule=position(3))),
    "h2o": ({}, dict(rule=accumulated)),
    "tova": ({}, dict(rule=last_query)),
    "snapkv": (SNAP, dict(rule=window_votes(5, 5))),
    "nacl": (dict(proxy_share=0.1, seed=3),
             dict(rule=proxies(0.1), choose=best_and_drawn(0.37, noise))),
    "corm": (dict(window=4), dict(rule=flagged(4))),
    "csp": (dict(window=5, cross_share=0.3), dict(rule=null_votes(5), choose=two_kinds(0.3))),
    "prefixkv": ({}, dict(rule=accumulated_shared)),
    "keydiff": ({}, dict(rule=against_the_mean)),
    "expected_attention": (dict(num_future=4, num_sinks=2), dict(rule=gaussian_queries(4, 2))),
    "lagkv": (dict(lag=3, num_sinks=2), dict(rule=lagged(3, 2))),
    "adakv": (dict(base=SnapKV(**SNAP)), dict(rule=window_votes(5, 5), across=True)),
}  # fmt: skip


def follow(exact, method, want, *, steps=12, **options):
    """The method's reader and the reference, side by side."""
    ids = tokens(N + steps)
    with torch.inference_mode():
        reader = reader_of(exact, method, N, **options)
        assert relative(reader.read(ids[:, :N])[0], want.prefill(ids[:, :N])) < 1e-9
        assert kept(reader) == want.kept()
        for token in ids[0, N:].tolist():
            assert relative(reader.step(torch.tensor([token]))[0], want.step(token)) < 1e-9
            assert kept(reader) == want.kept()
    return reader


def both(budget, chunk, sinks, stabilizers, local, interval, positions):
    """The same options for the cache and for the reference."""
    ours = dict(budget=budget, chunk_size=chunk, num_sinks=sinks, num_stabilizers=stabilizers, local_window=local,
                decode_interval=interval, positions=positions)  # fmt: skip
    theirs = dict(budget=budget, chunk=chunk, sinks=sinks, stabilizers=stabilizers, local=local, interval=interval,
                  positions=positions)  # fmt: skip
    return ours, theirs


@pytest.mark.parametrize(("cache", "positions"), [*((c, "compact") for c in CACHE), (CACHE[0], "original")], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_whole_run_equals_the_reference(exact, name, cache, positions):
    """U2, U3, U4 and U8 at once: scores, state, selection, positions and bytes moved, over prefill and 12 steps."""
    options, reference = CASES[name]
    ours, theirs = both(*cache, positions)
    if reference.get("across"):
        reference = {**reference, "across": None}
        theirs["across"] = 0  # set below: the floor is a share of each eviction's target
        want = Reference(exact.model, reference["rule"], **theirs)
        evict = want._evict

        def with_floor(i, head, newest, target):
            want.across = max(1, int(0.2 * target))
            evict(i, head, newest, target)

        want._evict = with_floor
    else:
        want = Reference(exact.model, **reference, **theirs)
    follow(exact, get_method(name, **options), want, **ours)


@pytest.mark.parametrize("cache", CACHE, ids=str)
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_sirllm_equals_the_reference(exact, cache, decay):
    ours, theirs = both(*cache, "compact")
    follow(exact, get_method("sirllm", decay=decay), SurprisalReference(exact.model, decay, **theirs), **ours)


def test_sirllm_keeps_the_same_tokens_everywhere_whatever_the_chunks(exact):
    """Nothing evicted: the scores are the naive cross entropy, whatever the chunking."""
    ids = tokens(60)
    logits = exact.model(ids, use_cache=False).logits[0]
    want = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    for chunk in (7, 60):
        with torch.inference_mode():
            reader = reader_of(exact, "sirllm", 60, budget=200, chunk_size=chunk, local_window=0)
            reader.read(ids)
        for layer in reader.cache.layers:
            for head in range(2):
                torch.testing.assert_close(layer.units().score[0, head, 1:].double(), want, rtol=1e-5, atol=1e-5)
            assert layer.units().score[0, 0, 0] == layer.units().score[0, 0, 1:chunk].max()


# ---------------------------------------------------------------------- budgets that differ


def test_pyramid_budgets_by_hand():
    pyramid = get_method("pyramidkv", beta=4)
    assert pyramid.budgets(40, 2) == [70, 10]  # 2 * 40 - 10, 10
    assert pyramid.budgets(40, 4) == [70, 50, 30, 10]
    assert pyramid.budgets(40, 1) == [40]
    assert get_method("pyramidkv", beta=1).budgets(33, 5) == [33] * 5


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 32, 80])
@pytest.mark.parametrize("beta", [1, 2, 7, 20])
@pytest.mark.parametrize("free", [0, 1, 39, 1000])
def test_pyramid_budgets_have_the_same_sum_and_follow_the_line(layers, beta, free):
    got = get_method("pyramidkv", beta=beta).budgets(free, layers)
    assert sum(got) == free * layers
    assert got == sorted(got, reverse=True)
    low, high = free / beta, 2 * free - free / beta
    for layer, units in enumerate(got):
        line = free if layers == 1 else high - (high - low) * layer / (layers - 1)
        assert abs(units - line) < 1 + 1e-9


def test_pyramidkv_equals_snapkv_with_budgets_of_its_own(exact):
    ours, theirs = both(60, 24, 4, 10, 10, 5, "compact")
    want = Reference(exact.model, window_votes(5, 5), budgets=[19 + 72, 19 + 10], **theirs)  # free 41, beta 4: 71.75
    method = get_method("pyramidkv", base=SnapKV(**SNAP), beta=4)
    reader = follow(exact, method, want, **ours)
    assert [len(layer.slab) for layer in reader.cache.layers] == reader.budgets == [91, 29]  # bytes really differ


def test_prefixkv_with_a_profile_equals_the_reference(exact):
    ours, theirs = both(40, 24, 4, 5, 5, 3, "compact")  # 28 free a layer
    want = Reference(exact.model, accumulated_shared, budgets=[12 + 14, 12 + 42], **theirs)
    reader = follow(exact, get_method("prefixkv", profile=(2, 6)), want, **ours)
    assert len({tuple(head) for head in kept(reader)[0]}) == 1  # one set for all heads of a layer


def test_equal_mass_by_hand():
    masses = torch.tensor([[8.0, 1.0, 1.0, 0.0], [4.0, 3.0, 2.0, 1.0]])
    assert equal_mass(masses, 0.5) == (1, 3)  # p = 0.8: the first layer has it in one unit, the second in three
    assert equal_mass(masses, 1.0) == (3, 4)  # the first layer's fourth unit got nothing


def test_equal_mass_keeps_the_same_share_and_not_one_unit_more():
    masses = torch.rand(5, 200, generator=torch.Generator().manual_seed(1)).double() ** 4
    sums = []
    for keep in (0.05, 0.2, 0.5, 0.9):
        counts = equal_mass(masses, keep)
        ranked = (masses / masses.sum(-1, keepdim=True)).sort(-1, descending=True).values
        inside = [ranked[layer, :n].sum().item() for layer, n in enumerate(counts)]
        before = [ranked[layer, : n - 1].sum().item() for layer, n in enumerate(counts)]
        assert max(before) <= min(inside) + 1e-9  # some p lies above every "one less" and below every mass
        assert keep * 1000 - 5 <= sum(counts) <= keep * 1000
        sums.append(sum(counts))
    assert sums == sorted(sums)
    assert len(set(equal_mass(masses[:1].expand(3, -1), 0.3))) == 1


def test_a_measured_profile_is_that_of_the_whole_attention_matrices(exact):
    ids = tokens(40)
    exact.model.set_attn_implementation("eager")
    weights = exact.model(ids, use_cache=False, output_attentions=True).attentions
    exact.model.set_attn_implementation("sdpa")
    masses = torch.stack([w[0].sum(1).mean(0) for w in weights])
    assert measure(exact, ids, 0.3) == equal_mass(masses, 0.3)


def test_heads_share_a_layer_by_hand():
    scores = torch.tensor([[[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0]]])
    none = torch.zeros(1, 2, 4, dtype=torch.bool)
    assert select_across_heads(scores, 2, none, floor=1).tolist() == [[0, 1, 2, 7]]  # 9 8 7 and the second head's 4
    assert select_across_heads(scores, 2, none, floor=2).tolist() == [[0, 1, 6, 7]]
    pins = none.clone()
    pins[0, 1, 0] = True
    assert select_across_heads(scores, 2, pins, floor=1).tolist() == [[0, 1, 2, 4]]


def test_ada_budgets_take_the_bytes_of_equal_ones(exact):
    ours, _ = both(40, 24, 4, 10, 10, 5, "compact")
    with torch.inference_mode():
        reader, plain = (reader_of(exact, get_method(name, base=SnapKV(**SNAP)) if name == "adakv" else
                                   get_method(name, **SNAP), N, **ours) for name in ("adakv", "snapkv"))  # fmt: skip
        reader.read(tokens(N))
        plain.read(tokens(N))
    lengths = [[len(head) for head in heads] for heads in kept(reader)]
    assert any(a != b for a, b in lengths)  # else this tests nothing
    assert [sum(pair) for pair in lengths] == [80, 80]
    assert reader.cache.nbytes == plain.cache.nbytes + 2 * 2 * 8  # two heads' lengths in two layers


# ---------------------------------------------------------------------- a choice of their own


def test_cascading_equals_the_reference(exact):
    ours, theirs = both(31, 24, 4, 0, 0, 1, "compact")
    want = Reference(exact.model, moving_average(0.99), choose=chained(3), **theirs)
    follow(exact, get_method("cascading", cascades=3, decay=0.99), want, **ours)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", [[1], [2], [7], [7, 4, 6, 3]], ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_a_chunk_pushed_down_the_windows_is_the_units_pushed_one_by_one(count, sizes, chunk):
    """Windows may grow and shrink between chunks, as the budget does between prefill and decoding."""
    g = torch.Generator().manual_seed(count + 10 * sizes[0])
    scores = torch.rand(300, generator=g)
    chain = Chain(count)
    window, opened, alive = torch.zeros(0), torch.zeros(0), []
    for turn, start in enumerate(range(0, 300, chunk)):
        size = sizes[turn // 7 % len(sizes)]
        fresh = list(range(start, min(start + chunk, 300)))
        chain.shrink(size, lambda p: scores[p].item())
        for p in fresh:
            chain.insert(p, size, lambda p: scores[p].item())
        alive += fresh
        window, opened = (torch.cat((x, torch.zeros(len(fresh)))) for x in (window, opened))
        a, b = cascade(window[None], opened[None], scores[alive][None], torch.ones(1, len(alive)).bool(),
                       torch.tensor([[size]]), count)  # fmt: skip
        stay = (a[0] < count).nonzero()[:, 0]
        alive, window, opened = [alive[j] for j in stay], a[0, stay], b[0, stay]
        levels = [[p for p, w in zip(alive, window, strict=True) if w == level] for level in range(count)]
        assert levels == chain.windows


def test_one_window_is_streamingllm(exact):
    options = dict(budget=40, chunk_size=16, num_stabilizers=5, local_window=5)
    readers = []
    with torch.inference_mode():
        for method in (get_method("cascading", cascades=1), get_method("streamingllm")):
            reader = reader_of(exact, method, N, **options)
            reader.read(tokens(N))
            for i in range(20):
                reader.step(torch.tensor([9 + i]))
            readers.append(kept(reader))
    assert readers[0] == readers[1]


def test_equal_scores_thin_each_window_by_two():
    """All duels are draws, and the unit that was taken stays: every second, fourth, eighth unit."""
    window, opened = torch.zeros(1, 400), torch.zeros(1, 400)
    got, _ = cascade(window, opened, torch.ones(1, 400), torch.ones(1, 400).bool(), torch.tensor([[10]]), 4)
    for level, step in enumerate((1, 2, 4, 8)):
        at = (got[0] == level).nonzero()[:, 0]
        assert len(at) == 10
        assert at.diff().tolist() == [step] * 9


def test_nacl_draws_more_of_what_scores_more_and_never_twice():
    """A hundred thousand draws of one unit out of four: frequencies are softmax(scores)."""
    scores = torch.tensor([0.0, 0.5, 1.0, 1.5])
    seeds = 20_000
    counts = torch.zeros(4)
    view = joined_of(ChunkView(0, *(torch.zeros(1, 1, 4, 2) for _ in range(3)), 0, 1.0), torch.zeros(1, 1, 4, 2),
                     torch.zeros(1, 1, 4, 2), units=units_of(torch.zeros(1, 1, 4, 2)))  # fmt: skip
    none = torch.zeros(1, 1, 4, dtype=torch.bool)
    for seed in range(seeds):
        keep = get_method("nacl", seed=seed, random_share=1.0).select(scores[None, None], 1, none, view)
        counts[keep.flatten()] += 1
    expected = scores.softmax(0) * seeds
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-squared, 3 degrees of freedom, p = 0.001
    keep = get_method("nacl", random_share=0.0).select(scores[None, None], 2, none, view)
    assert keep.flatten().tolist() == [2, 3]


def test_every_query_flags_a_key_and_equal_weights_flag_all():
    """CORM: weights that are all 1 / t lie on the threshold, up to rounding."""
    keys = torch.zeros(1, 1, 9, 4)
    q = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    view = ChunkView(0, q, keys[:, :, 4:], keys[:, :, 4:], 4, 0.5)
    equal = get_method("corm").score(joined_of(view, q, keys))
    assert equal[0, 0].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0]
    sharp = torch.randn(1, 1, 9, 4, generator=torch.Generator().manual_seed(1)) * 9
    assert get_method("corm").score(joined_of(view, q, sharp)).max() == 0


# ---------------------------------------------------------------------- worked by hand

LN2 = math.log(2)


def by_hand(name, **options):
    """Two queries over three units, one head, logits [[0, ln 2, -], [ln 2, 0, 0]]:

    weights [[1/3, 2/3, 0], [1/2, 1/4, 1/4]]; with a null logit of 0 [[1/4, 1/2, 0], [2/5, 1/5, 1/5]].
    """
    q = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    keys = torch.tensor([[[[0.0, LN2], [LN2, 0.0], [5.0, 0.0]]]])
    new = keys[:, :, 1:]
    method = get_method(name, **options)
    view = joined_of(ChunkView(0, q, new, new, 1, 1.0), q, keys)
    view.all.units.score[0, 0, 0] = 0.5  # of the old unit
    return method.score(view)[0, 0]


@pytest.mark.parametrize(("name", "options", "want"), [
    ("h2o", {}, [0.5 + 5 / 6, 11 / 12, 1 / 4]),
    ("prefixkv", {}, [0.5 + 5 / 6, 11 / 12, 1 / 4]),
    ("tova", {}, [1 / 2, 1 / 4, 1 / 4]),
    ("snapkv", dict(window=1, kernel_size=1), [1 / 2, 1 / 4, 1]),
    ("snapkv", dict(window=1, kernel_size=3), [1 / 2, 1 / 2, 1]),
    ("snapkv", dict(window=1, kernel_size=3, pooling="avg"), [1 / 4, 1 / 4, 1]),  # zeros beyond the edges count
    ("pyramidkv", {"base.window": 1, "base.kernel_size": 3}, [1 / 2, 1 / 2, 1]),
    ("adakv", {"base.window": 1, "base.kernel_size": 1}, [1 / 2, 1 / 4, 1]),
    ("kvmerger", {}, [0.5 + 5 / 6, 11 / 12, 1 / 4]),
    ("recency", {}, [0, 1, 2]),
    ("razor", {}, [0, 1, 2]),
    ("knorm", {}, [-LN2, -5]),  # of new units only
    ("keydiff", {}, [-1 / math.sqrt(5), -2 / math.sqrt(5), -2 / math.sqrt(5)]),  # directions e2, e1, e1
    ("nacl", dict(proxy_share=0.34), [1 / 2, 1 / 4, 1 / 4]),
    ("nacl", dict(proxy_share=0.6), [5 / 6, 11 / 12, 1 / 4]),
    ("csp", dict(window=2), [1 / 4 + 2 / 5, 1 / 2 + 1 / 5, 1 / 5]),
    ("corm", {}, [0, -1, -(2**23)]),  # averages 1/2 and 1/3: the first row flags unit 1, the second unit 0
    ("cascading", dict(decay=0.5), [0.5 * (0.25 + 1 / 6 + 1 / 2), 0.5 * (1 / 3 + 1 / 4), 0.5 / 4]),
    ("streamingllm", dict(num_sinks=1), [3, 1, 2]),
])  # fmt: skip
def test_two_queries_over_three_units_by_hand(name, options, want):
    torch.testing.assert_close(by_hand(name, **options).double(), torch.tensor(want).double(), rtol=1e-6, atol=1e-6)


def test_a_compensation_unit_by_hand():
    """Razor with two units to keep of five, the newest pinned: units 0 .. 3 become their mean at unit 0, which counts
    for four: log 4. Dropping two more gives the mean of six, weighted by what each stands for."""
    razor = get_method("razor")
    k = torch.tensor([[[[2.0], [4.0], [6.0], [8.0], [100.0]]]])
    view = joined_of(ChunkView(0, k, k, k, 0, 1.0), k, k, units=units_of(k, v=10 * k, state=1))
    scores, pins = torch.arange(5.0).view(1, 1, 5), torch.tensor([[[False] * 4 + [True]]])
    keep, merged = razor.reduce(scores, 2, pins, view)
    assert keep.tolist() == [[0, 4]]
    assert (merged.k[0, 0, 0].item(), merged.v[0, 0, 0].item()) == pytest.approx((5, 50))
    assert merged.bias[0, 0].tolist() == pytest.approx([math.log(4), 0, 0, 0, 0])

    k = torch.tensor([[[[5.0], [100.0], [8.0], [7.0]]]])
    units = units_of(k, v=10 * k, state=1)
    units.state[0, 0, 0, 0] = math.log(4)
    view = joined_of(ChunkView(0, k, k, k, 0, 1.0), k, k, units=units)
    keep, merged = razor.reduce(torch.arange(4.0).view(1, 1, 4), 2, torch.tensor([[[False] * 3 + [True]]]), view)
    assert keep.tolist() == [[0, 3]]
    assert merged.k[0, 0, 0].item() == pytest.approx((4 * 5 + 100 + 8) / 6)
    assert merged.bias[0, 0, 0].item() == pytest.approx(math.log(6))


def test_the_two_pyramids_of_the_side_by_side_table():
    """docs/methods.md: *exact pyramid* (here) and *rounded pyramid* (kvpress), for 192 of 768 units and 8 layers."""
    exact_sum = [1 + units for units in get_method("pyramidkv", beta=2).budgets(191, 8)]  # one unit is pinned
    rounded = [round(288 - layer * (288 - 96) / 7) for layer in range(8)]
    assert exact_sum == [288, 260, 233, 206, 178, 151, 124, 96]
    assert rounded == [288, 261, 233, 206, 178, 151, 123, 96]
    assert sum(exact_sum) == sum(rounded) == 8 * 192
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert all(" ".join(map(str, units)) in page for units in (exact_sum, rounded))


def test_csp_shares_by_hand():
    """Five old units, four new, four to keep, one of them pinned: two old at most, then the chunk's."""
    scores = torch.tensor([[[9.0, 8, 7, 6, 5, 4, 3, 2, 1]]])
    pins = torch.tensor([[[False] * 8 + [True]]])
    view = ChunkView(0, torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), 5, 1.0)

    def keep(share, budget=4):
        return get_method("csp", cross_share=share).select(scores, budget, pins, view)[0, 0].tolist()

    assert keep(0.5) == [0, 5, 6, 8]  # floor(3 * 0.5) = 1 old, 2 new
    assert keep(0.0) == [5, 6, 7, 8]
    assert keep(1.0) == [0, 1, 2, 8]
    assert keep(0.0, budget=6) == [0, 1, 5, 6, 7, 8]  # there are three new ones only: the best of all fill up


# ---------------------------------------------------------------------- bad options


@pytest.mark.parametrize(("name", "options", "cache", "message"), [
    ("snapkv", dict(window=64), dict(budget=60, chunk_size=16), r"window 64 .*allowed are 1 to 16"),
    ("pyramidkv", {}, dict(budget=60, chunk_size=16), r"window 32 is larger than the chunk"),
    ("csp", dict(window=17), dict(budget=60, chunk_size=16), r"allowed are 1 to 16"),
    ("streamingllm", dict(num_sinks=50), dict(budget=60), r"num_sinks 50 does not fit.*allowed are 1 to \d+"),
    ("cascading", dict(cascades=60), dict(budget=60), r"60 cascades do not fit.*allowed are 1 to \d+"),
    ("lagkv", {}, dict(budget=60), r"lag 128 keeps up to 256 units waiting.*allowed are 1 to \d+"),
    ("prefixkv", dict(profile=(1, 2, 3)), dict(budget=60), r"profile has 3 numbers; this model has 2 layers"),
    ("h2o", {}, dict(budget=8, num_sinks=9), r"budget 8 cannot hold its pinned units.*num_sinks 9"),
])  # fmt: skip
def test_options_that_do_not_go_with_the_cache_say_what_would(exact, name, options, cache, message):
    with pytest.raises(ConfigError, match=message):
        reader_of(exact, get_method(name, **options), 100, **cache)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("snapkv", dict(pooling="mean"), r"unknown snapkv: pooling 'mean'; valid: avg, max"),
    ("snapkv", dict(kernel_size=4), r"must be odd"),
    ("snapkv", dict(window=0), r"window is 0; it must be a whole number >= 1"),
    ("pyramidkv", dict(beta=0), r"beta is 0"),
    ("pyramidkv", dict(base="ful"), r"unknown method 'ful'.*did you mean 'full'"),
    ("pyramidkv", dict(base="full"), r"'full' does not score units by itself"),
    ("adakv", dict(base="keydiff"), r"'keydiff' cannot be shared among heads; valid: h2o"),
    ("adakv", dict(floor=1.5), r"floor is 1.5; it must be a number from 0 to 1"),
    ("nacl", dict(random_share=-0.1), r"random_share is -0.1"),
    ("sirllm", dict(decay=2), r"decay is 2"),
    ("corm", dict(window=2.5), r"window is 2.5"),
    ("cascading", dict(cascades=0), r"cascades is 0"),
    ("prefixkv", dict(profile=(0, 0)), r"not all 0"),
    ("lagkv", dict(lag=-1), r"lag is -1"),
    ("csp", dict(cross_share="half"), r"must be a number from 0 to 1"),
    ("expected_attention", dict(num_future=0), r"num_future is 0"),
    ("streamingllm", dict(num_sinks=0), r"num_sinks is 0"),
])  # fmt: skip
def test_bad_options_name_what_is_allowed(name, options, message):
    with pytest.raises(ConfigError, match=message):
        get_method(name, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_future", [16, 512])
def test_expected_attention_counts_its_temporaries(monkeypatch, dtype, num_future):
    """What `peak_kv_bytes` gets told is what torch allocates while it scores, within a factor of two."""
    backbone, seen = Backbone(build_tiny_model("llama-plain", dtype=dtype, head_dim=64)), []
    score = ExpectedAttention.score

    def metered(self, view):
        with Meter() as meter:
            out = score(self, view)
        seen.append((meter.peak, view.all.attention.scratch_bytes))
        return out

    monkeypatch.setattr(ExpectedAttention, "score", metered)
    method = ExpectedAttention(num_future=num_future)
    with torch.inference_mode():
        reader = reader_of(backbone, method, 900, budget=400, chunk_size=128)
        reader.read(tokens(900))
    assert len(seen) > 6
    for real, told in seen:
        assert real / 2 < told < 2 * real
    assert reader.cache.peak_bytes > reader.cache.nbytes + reader.cache.workspace_bytes + max(t for _, t in seen)
