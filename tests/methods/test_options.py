"""Options of methods: as texts, through wrapped methods, in saved contexts."""

from __future__ import annotations

import pytest
from oracles import PEERS, kept, llm_of, random_heads, reader_of, tokens
from peer_files import kvzap_tensors

from locret.config import CacheConfig
from locret.context import Context
from locret.engine import LLM
from locret.errors import ConfigError, ContextError
from locret.methods import get_method, parse_options, wants_heads
from locret.methods.snapkv import SnapKV


@pytest.mark.parametrize(("method", "texts", "want"), [
    ("snapkv", ["window=64", "pooling=avg"], {"window": 64, "pooling": "avg"}),
    ("adakv", ["base=locret", "floor=0.5"], {"base": "locret", "floor": 0.5}),
    ("adakv", ["base.window=8"], {"base.window": 8}),  # of the default base, snapkv
    ("pyramidkv", ["base=kvzap", "base.path=a=b"], {"base": "kvzap", "base.path": "a=b"}),
    ("prefixkv", ["profile=3,2,1"], {"profile": (3, 2, 1)}),
    ("expected_attention", ["covariance=False", "num_future=9"], {"covariance": False, "num_future": 9}),
    ("knorm", [], {}),
])  # fmt: skip
def test_texts_become_values_of_the_fields_types(method, texts, want):
    got = parse_options(method, texts)
    assert got == want
    assert [type(value) for value in got.values()] == [type(value) for value in want.values()]


@pytest.mark.parametrize(("method", "texts", "message"), [
    ("snapkv", ["windows=64"], r"option of method snapkv 'windows'; valid: .*did you mean 'window'"),
    ("adakv", ["base.windw=8"], r"option of method adakv 'base.windw'.*did you mean 'base.window'"),
    ("adakv", ["base=locret", "base.window=8"], r"'base.window'; valid: base, floor"),
    ("locret", ["window=8"], r"unknown option of method locret 'window'; it has none$"),
    ("adakv", ["base=snapvk"], r"unknown method 'snapvk'.*did you mean 'snapkv'"),
    ("snapkv", ["base=locret"], r"option of method snapkv 'base'"),
    ("snapkv", ["window=ten"], r"window=ten: snapkv wants a whole number"),
    ("adakv", ["floor=x"], r"floor=x: adakv wants a number"),
    ("expected_attention", ["covariance=2"], r"covariance=2: expected_attention wants true or false"),
    ("prefixkv", ["profile=3,x"], r"profile=3,x: prefixkv wants whole numbers with commas"),
    ("snapkv", ["window"], r"'window' is not understood; write key=value"),
    ("snapkv", ["window=8", "window=9"], r"'window' is given twice: '8' and '9'"),
    ("locret", ["heads=folder"], r"option of method locret 'heads'"),
])  # fmt: skip
def test_texts_that_mean_nothing_are_refused(method, texts, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(method, texts)


def build(llm: LLM, method: str, heads=None, **options) -> LLM:
    config = CacheConfig(budget=40, chunk_size=16)
    return LLM.build(llm.backbone, heads=heads, method=method, method_options=options, config=config)


@pytest.mark.parametrize("method", ["adakv", "pyramidkv"])
def test_heads_reach_the_method_that_another_one_scores_as(method):
    base = llm_of()
    heads = random_heads(base.backbone)
    ids = tokens(101)
    want = reader_of(base.backbone, get_method(method, base=get_method("locret", heads=heads)), 101, budget=40,
                     chunk_size=16)  # fmt: skip
    want.read(ids)
    llm = build(base, method, heads, base="locret")
    assert llm.method.trained
    got = reader_of(base.backbone, llm.method, 101, budget=40, chunk_size=16)
    got.read(ids)
    assert kept(got) == kept(want)
    with pytest.raises(ConfigError, match=r"'locret' needs heads"):
        build(base, method, None, base="locret")


def test_options_of_a_base_reach_it():
    assert get_method("adakv", **{"base.window": 8}).scores == SnapKV(window=8)
    assert get_method("pyramidkv", **{"base": "snapkv", "base.pooling": "avg"}).scores == SnapKV(pooling="avg")
    with pytest.raises(ConfigError, match=r"so base.window belongs to no method"):
        get_method("adakv", **{"base": SnapKV(), "base.window": 8})
    with pytest.raises(ConfigError, match=r"option of method snapkv 'windw'.*did you mean 'window'"):
        get_method("adakv", **{"base.windw": 8})


def test_heads_are_loaded_for_methods_that_read_them_only():
    assert [wants_heads("locret"), wants_heads("snapkv"), wants_heads("adakv")] == [True, False, False]
    assert wants_heads("adakv", "locret")
    assert not wants_heads("adakv", SnapKV())


def refused(path, llm: LLM, *words: str) -> None:
    with pytest.raises(ContextError) as error:
        Context.load(path, llm)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_saved_context_knows_its_methods_options(tmp_path):
    base = llm_of()
    ids = tokens(60)[0].tolist()
    made = build(base, "snapkv", window=8).compress(ids)
    made.save(tmp_path / "c")
    assert Context.load(tmp_path / "c", build(base, "snapkv", window=8)).seen == 60
    refused(
        tmp_path / "c", build(base, "snapkv", window=9), "other options of the method", "'window': 8", "'window': 9"
    )

    heads = random_heads(base.backbone)
    build(base, "adakv", heads, base="locret").compress(ids).save(tmp_path / "d")
    assert Context.load(tmp_path / "d", build(base, "adakv", heads, base="locret")).seen == 60
    refused(tmp_path / "d", build(base, "adakv", heads, base="locret", floor=0.3), "other options", "0.3")
    refused(tmp_path / "d", build(base, "adakv", base="knorm"), "other options", "'method': 'knorm'")
    other = random_heads(base.backbone, seed=1)
    refused(tmp_path / "d", build(base, "adakv", other, base="locret"), "another model or other heads")


def test_weights_may_lie_elsewhere_but_not_be_others(tmp_path):
    """What is compared of a scorer from a file is its weights, not the file's name."""
    base = llm_of()
    sizes = dict(layers=2, hidden=64, heads=2)
    first, same, other = (str(PEERS["kvzap"](tmp_path / name, tensors=kvzap_tensors(2, 64, 2, None, seed), **sizes))
                          for name, seed in (("a", 0), ("b", 0), ("c", 1)))  # fmt: skip
    build(base, "pyramidkv", base="kvzap", **{"base.path": first}).compress(tokens(60)[0].tolist()).save(tmp_path / "x")
    Context.load(tmp_path / "x", build(base, "pyramidkv", base="kvzap", **{"base.path": same}))
    refused(tmp_path / "x", build(base, "pyramidkv", base="kvzap", **{"base.path": other}), "other heads")
