"""A cache whose slabs hold codes: each unit is quantised once, bytes are honest, and everything else is as it was."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import build_tiny_model
from oracles import kept, llm_of, method_of, reader_of, relative, tokens

from locret.backbone import Backbone
from locret.cache import KVCache, unit_bytes
from locret.config import STORAGE, CacheConfig
from locret.context import Context
from locret.errors import ConfigError
from locret.storage import CODECS, Affine, get_codec

BITS = ["int8", "int4", "int2"]
KINDS = ["knorm", "snapkv", "adakv", "pyramidkv", "sirllm", "locret", "full", "razor", "kvmerger"]
# once, again, ragged, late, growing, merging


def test_the_option_names_the_codecs():
    assert set(STORAGE) == set(CODECS)
    with pytest.raises(ConfigError, match=r"unknown storage 'int5'; valid: dense, int2, int4, int8"):
        CacheConfig(storage="int5")


@pytest.mark.parametrize("storage", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["knorm", "adakv", "razor"])
def test_units_are_quantised_once_however_often_others_are_evicted(monkeypatch, method, storage, dtype):
    """After ten evictions and 40 steps a unit is, bit for bit, what it was when it came in; merged ones are not."""
    came, append = {0: [], 1: []}, KVCache.append

    def spy(self, index, new):
        came[index].append((new.k, new.v))
        return append(self, index, new)

    monkeypatch.setattr(KVCache, "append", spy)
    backbone = Backbone(build_tiny_model("llama", dtype=dtype))
    ids, codec = tokens(200), get_codec(storage)
    with torch.inference_mode():
        reader = reader_of(backbone, method, 160, budget=40, chunk_size=16, storage=storage)
        reader.read(ids[:, :160])
        for i in range(160, 200):
            reader.step(ids[:, i])
    for index, layer in enumerate(reader.cache.layers):
        units, at = layer.units(), layer.positions()
        if method == "razor":
            assert ((units.state[..., 0] > 0) & (at >= 0)).sum() == 2  # one compensation unit a head
            at = at.masked_fill(units.state[..., 0] > 0, -1)
        rows = at.clamp(min=0)[..., None].expand_as(units.k)
        for got, pieces in zip((units.k, units.v), zip(*came[index], strict=True), strict=True):
            whole = torch.cat(pieces, 2)
            assert torch.equal(got[at >= 0], codec.decode(codec.encode(whole)).gather(2, rows)[at >= 0])
        assert (at < 40).any()  # some have been there through all of it
    assert reader.cache.held <= 40


@pytest.mark.parametrize("storage", BITS)
def test_later_tokens_see_the_prompt_as_stored_and_themselves_as_they_are(storage):
    """One chunk, then another, nothing evicted: against attention over numbers that were quantised by hand."""
    backbone = Backbone(build_tiny_model("llama", dtype=torch.float64))
    ids, n = tokens(60), 40
    codec = get_codec(storage)

    class ByHand:
        def __init__(self):
            self.kv = {}

        def attend(self, layer, q, k, v, call):
            if layer not in self.kv:
                self.kv[layer] = tuple(codec.decode(codec.encode(x)) for x in (k, v))
                old = (k[:, :, :0], v[:, :, :0])
            else:
                old = self.kv[layer]
            k, v = (torch.cat(pair, 2) for pair in zip(old, (k, v), strict=True))
            t, s = q.shape[2], k.shape[2]
            rope, at = backbone.rope(60, 60), torch.arange(s)
            q, k = rope.rotate(layer, q, at[s - t :]), rope.rotate(layer, k, at)
            k, v = (x.repeat_interleave(4, 1) for x in (k, v))
            mask = torch.ones(t, s, dtype=torch.bool).tril(s - t)
            return (q @ k.mT * call.scale).masked_fill(~mask, float("-inf")).softmax(-1) @ v

    hand = ByHand()
    with torch.inference_mode():
        reader = reader_of(backbone, "knorm", n, budget=80, chunk_size=64, storage=storage, local_window=0)
        first = reader.read(ids[:, :n])
        second = reader.read(ids[:, n:], local_window=0)
        assert relative(first[0], backbone.run(ids[:, :n], hand)[0, -1]) < 1e-12
        assert relative(second[0], backbone.run(ids[:, n:], hand)[0, -1]) < 1e-12


def test_more_bits_are_closer_to_dense():
    backbone = Backbone(build_tiny_model("llama"))
    ids = tokens(120)
    with torch.inference_mode():
        logits = {
            storage: reader_of(backbone, "recency", 120, budget=128, chunk_size=16, storage=storage).read(ids)
            for storage in ("dense", *BITS)
        }
    errors = [relative(logits[storage], logits["dense"]) for storage in BITS]
    assert errors == sorted(errors)
    assert 0 < errors[0] < 0.1


@pytest.mark.parametrize("storage", BITS)
@pytest.mark.parametrize("method", KINDS)
def test_forks_and_files_go_on_as_the_original(tmp_path, method, storage):
    llm = llm_of(method=method, budget=40, chunk_size=16, storage=storage)
    context = llm.compress(tokens(101)[0].tolist())
    context.save(tmp_path / "c")
    twins = [context.fork(), Context.load(tmp_path / "c", llm)]
    for twin in twins:
        assert kept(twin._reader) == kept(context._reader)
        assert twin.kv_bytes <= context.kv_bytes  # a file has no room to grow in
        for mine, theirs in zip(twin._reader.cache.layers, context._reader.cache.layers, strict=True):
            assert torch.equal(mine.units().k, theirs.units().k)
    question = tokens(9, seed=1)[0].tolist()
    want = context.ask(question, max_new_tokens=8).tokens
    assert all(twin.ask(question, max_new_tokens=8).tokens == want for twin in twins[: 1 if method == "sirllm" else 2])
    if method != "full":
        assert context.held <= 40


@pytest.mark.parametrize("method", KINDS)
def test_a_row_of_a_batch_is_the_row_alone(method):
    backbone = Backbone(build_tiny_model("llama", dtype=torch.float64))
    ids = tokens(80, batch=2)
    options = dict(budget=40, chunk_size=16, storage="int4")
    with torch.inference_mode():
        both = reader_of(backbone, method_of(method, backbone), 80, batch=2, **options)
        alone = reader_of(backbone, method_of(method, backbone), 80, **options)
        got, want = both.read(ids), alone.read(ids[1:])
        for step in tokens(6, seed=2)[0]:
            got, want = both.step(step.expand(2)), alone.step(step.expand(1))
    assert kept(both, 1) == kept(alone)
    assert relative(got[1], want[0]) < 1e-12


@pytest.mark.parametrize("family", ["gemma3", "mistral-window", "phi3", "qwen3"])
def test_other_families_and_sliding_windows_run(family):
    backbone = Backbone(build_tiny_model(family))
    with torch.inference_mode():
        reader = reader_of(backbone, "knorm", 90, budget=40, chunk_size=16, storage="int8")
        dense = reader_of(backbone, "knorm", 90, budget=40, chunk_size=16)
        got, want = reader.read(tokens(90)), dense.read(tokens(90))
    assert got.isfinite().all()
    assert reader.cache.nbytes < dense.cache.nbytes
    assert relative(got, want) < 0.5  # other units may be kept
    assert (reader.cache.held, dense.cache.held) == (40, 40) or family == "mistral-window"


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("method", ["knorm", "adakv"])
def test_bytes_are_those_of_the_slabs_and_equal_the_plans(storage, method):
    backbone = Backbone(build_tiny_model("llama", dtype=torch.bfloat16))
    with torch.inference_mode():
        reader = reader_of(backbone, method, 90, budget=40, chunk_size=16, storage=storage)
        reader.read(tokens(90))
    lengths = 2 * 2 * 8 if method == "adakv" else 0
    each = unit_bytes(8, torch.bfloat16, len(reader.method.state), storage)
    assert reader.cache.nbytes == 2 * 2 * 40 * each + lengths
    assert each == 2 * (16 if storage == "dense" else get_codec(storage).bits + 4) + 13 + 4 * len(reader.method.state)
    found = sum(x.nbytes for layer in reader.cache.layers for x in layer.slab)
    assert reader.cache.nbytes == found + lengths
    assert reader.cache.peak_bytes > reader.cache.nbytes


def test_a_budget_in_bytes_holds_more_units_of_fewer_bits():
    model = build_tiny_model("llama", head_dim=64)
    held = {}
    for storage in ("dense", *BITS):
        llm = llm_of(model, "knorm", budget="64KiB", chunk_size=16, storage=storage)
        context = llm.compress(tokens(250)[0].tolist())
        assert context.kv_bytes <= 64 * 1024
        held[storage] = context.plan.budget
    assert held["dense"] * 3 < held["int8"] < held["int4"] < held["int2"]  # float32: 512 bytes against 160, 96, 64


def test_what_a_layer_decodes_for_its_turn_is_counted_as_peak():
    backbone = Backbone(build_tiny_model("llama"))
    with torch.inference_mode():
        reader = reader_of(backbone, "knorm", 90, budget=40, chunk_size=16, storage="int4")
        reader.read(tokens(90))
    assert reader.cache.workspace is None
    dense = 3 * 2 * 56 * 8 * 4  # decoded K and V, and rotated K, of 56 units in two heads
    coded = 2 * 56 * unit_bytes(8, torch.float32, 0, "int4")
    assert reader.cache.peak_bytes == reader.cache.nbytes + dense + coded


def test_the_file_holds_codes_and_its_plan(tmp_path):
    from safetensors import safe_open

    llm = llm_of(method="knorm", budget=40, chunk_size=16, storage="int4")
    llm.compress(tokens(101)[0].tolist()).save(tmp_path / "c")
    with safe_open(tmp_path / "c", framework="pt") as file:
        assert {"0.k.codes", "1.v.scale", "1.v.zero", "0.score"} <= set(file.keys())
        assert json.loads(file.metadata()["locret"])["plan"]["storage"] == "int4"
    other = llm_of(method="knorm", budget=40, chunk_size=16)  # dense; a file brings its own plan
    assert Context.load(tmp_path / "c", other).plan.storage == "int4"


def test_rescored_units_keep_their_new_scores():
    """Scores are written into the joined units and must reach the slab through the codes."""
    backbone = Backbone(build_tiny_model("llama", dtype=torch.float64))
    with torch.inference_mode():
        reader = reader_of(backbone, method_of("snapkv", backbone), 90, budget=40, chunk_size=16, storage="int8")
        reader.read(tokens(90))
    score = reader.cache.layers[0].slab.tensors()["score"]
    assert (score[..., :40] > 0).all()
    assert isinstance(get_codec("int8"), Affine)
