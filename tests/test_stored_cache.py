"""A cache whose slabs hold codes: each unit is quantised once, bytes are honest, and everything else is as it was."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import build_tiny_model
from oracles import Recorder, kept, llm_of, method_of, reader_of, relative, tokens

from locret.backbone import Backbone
from locret.cache import KVCache, unit_bytes
from locret.config import STORAGE, CacheConfig
from locret.context import Context
from locret.errors import BackboneError, ConfigError
from locret.plan import Shape, footprint
from locret.prefill import ChunkPass
from locret.storage import Affine, get_codec
from locret.stores import STORES, fixed_bytes, layer_stores

BITS = ["int8", "int4", "int2"]
TAILED = ["kivi4", "kivi2", "minikv", "think", "think-int4"]  # the newest units stay as they are
OTHERS = [name for name in STORES if name not in ("dense", *BITS)]
KINDS = ["knorm", "snapkv", "adakv", "pyramidkv", "sirllm", "locret", "full", "razor", "kvmerger"]
# once, again, ragged, late, growing, merging


def test_the_option_names_the_codecs():
    assert STORAGE == STORES
    with pytest.raises(
        ConfigError, match=r"unknown storage 'int5'; valid: dense, hqq2, .*int2, int4, int8, kivi2.*did you mean 'int8'"
    ):
        CacheConfig(storage="int5")


@pytest.mark.parametrize("storage", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["knorm", "adakv", "razor"])
def test_units_are_quantised_once_however_often_others_are_evicted(monkeypatch, method, storage, dtype):
    """After ten evictions and 40 steps a unit is, bit for bit, what it was when it came in; merged ones are not."""
    came: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {0: [], 1: []}
    new_units = ChunkPass._new_units

    def spy(self, k, v, scores):
        index = sum(map(len, came.values())) % 2  # one layer after the other
        came[index].append((k, v))
        return new_units(self, k, v, scores)

    monkeypatch.setattr(ChunkPass, "_new_units", spy)
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


@pytest.mark.parametrize(("method", "storage"), [
    *((method, storage) for method in KINDS for storage in BITS), *(("knorm", storage) for storage in OTHERS),
    ("adakv", "kivi2"), ("razor", "think"), ("kvmerger", "kivi2"),
])  # fmt: skip
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


@pytest.mark.parametrize(("method", "storage"), [
    *((method, "int4") for method in KINDS), *(("snapkv", storage) for storage in OTHERS),
    ("adakv", "kivi2"), ("razor", "think-int4"), ("sirllm", "kivi2"),
])  # fmt: skip
def test_a_row_of_a_batch_is_the_row_alone(method, storage):
    backbone = Backbone(build_tiny_model("llama", dtype=torch.float64))
    length, budget = (240, 160) if storage in TAILED else (80, 40)  # some have aged, some are evicted
    ids = tokens(length, batch=2)
    options = dict(budget=budget, chunk_size=16, storage=storage)
    with torch.inference_mode():
        both = reader_of(backbone, method_of(method, backbone), length, batch=2, **options)
        alone = reader_of(backbone, method_of(method, backbone), length, **options)
        got, want = both.read(ids), alone.read(ids[1:])
        for step in tokens(6, seed=2)[0]:
            got, want = both.step(step.expand(2)), alone.step(step.expand(1))
    assert kept(both, 1) == kept(alone)
    assert relative(got[1], want[0]) < 1e-12


@pytest.mark.parametrize(("family", "storage"), [
    *((family, "int8") for family in ("gemma3", "mistral-window", "phi3", "qwen3")), ("gemma3", "kivi4"),
    ("mistral-window", "think"),
])  # fmt: skip
def test_other_families_and_sliding_windows_run(family, storage):
    backbone = Backbone(build_tiny_model(family))
    with torch.inference_mode():
        reader = reader_of(backbone, "knorm", 90, budget=40, chunk_size=16, storage=storage)
        dense = reader_of(backbone, "knorm", 90, budget=40, chunk_size=16)
        got, want = reader.read(tokens(90)), dense.read(tokens(90))
    assert got.isfinite().all()
    assert storage != "int8" or reader.cache.nbytes < dense.cache.nbytes
    assert storage == "think" or relative(got, want) < 0.5  # other units may be kept
    assert (reader.cache.held, dense.cache.held) == (40, 40) or family == "mistral-window"


@pytest.mark.parametrize("storage", ["dense", *BITS])
@pytest.mark.parametrize("method", ["knorm", "adakv"])
def test_bytes_are_those_of_the_slabs_and_equal_the_plans(storage, method):
    backbone = Backbone(build_tiny_model("llama", dtype=torch.bfloat16))
    with torch.inference_mode():
        reader = reader_of(backbone, method, 90, budget=40, chunk_size=16, storage=storage)
        reader.read(tokens(90))
    lengths = 2 * 2 * 8 if method == "adakv" else 0
    each = unit_bytes(8, torch.bfloat16, len(reader.method.state), storage)
    slab = 40 if method == "adakv" else 41  # one to spare for a replayed step
    assert reader.cache.nbytes == 2 * 2 * slab * each + lengths
    assert each == 2 * (16 if storage == "dense" else get_codec(storage).bits + 4) + 9 + 4 * len(reader.method.state)
    found = sum(x.nbytes for layer in reader.cache.layers for x in layer.slab)
    assert reader.cache.nbytes == found + lengths
    assert reader.cache.peak_bytes > reader.cache.nbytes


@pytest.mark.parametrize(("method", "storage"), [
    *(("knorm", storage) for storage in OTHERS),
    *((method, storage) for method in ("adakv", "full") for storage in ("quanto4", "kivi2", "think", "lorc")),
])  # fmt: skip
def test_bytes_of_every_store_are_counted_and_stay_under_what_a_plan_counts(method, storage):
    """Slabs, scales, row numbers, tables of groups, dense newest units."""
    backbone = Backbone(build_tiny_model("llama", dtype=torch.bfloat16, head_dim=64))
    with torch.inference_mode():
        reader = reader_of(backbone, method, 400, budget=240, chunk_size=64, storage=storage)
        reader.read(tokens(256).repeat(1, 2)[:, :400])
    found = sum(x.nbytes for layer in reader.cache.layers for x in layer.slab)
    tables = sum(x.nbytes for layer in reader.cache.layers for x in layer.slab.tables().values())
    lengths = 2 * 2 * 8 if method == "adakv" else 0
    assert reader.cache.nbytes == found + tables + lengths
    assert (tables > 0) == (storage in TAILED)
    most = sum(
        layer.slab.tensors()["score"].numel() * unit_bytes(64, torch.bfloat16, 0, store)
        + 2 * fixed_bytes(store, 64, torch.bfloat16)
        for layer, store in zip(reader.cache.layers, layer_stores(storage, backbone), strict=True)
    )
    assert reader.cache.nbytes <= most + lengths
    assert storage in TAILED or reader.cache.nbytes == most + lengths
    shape, given = Shape.of_backbone(backbone), CacheConfig(budget=240, chunk_size=64, storage=storage)
    planned = footprint(
        shape, method_of(method, backbone), given, prompt_len=400, new_tokens=None, dtype=torch.bfloat16
    )
    assert planned.slabs >= reader.cache.nbytes or storage == "lorc"  # a plan has no weights to rank layers by
    assert planned.peak >= 0.95 * reader.cache.peak_bytes or method != "knorm"  # full doubles a slab that grows


@pytest.mark.parametrize("storage", ["hqq4", "kivi2", "think-int4", "lorc"])
def test_a_budget_in_bytes_is_kept_by_every_store(storage):
    backbone = Backbone(build_tiny_model("llama", dtype=torch.bfloat16, head_dim=64))
    with torch.inference_mode():
        for method in ("knorm", "adakv", "sirllm"):
            reader = reader_of(backbone, method, 10_000, budget="400KB", chunk_size=32, storage=storage)
            reader.read(tokens(256).repeat(1, 2))
            assert 40 < reader.cache.held <= reader.plan.budget
            assert reader.cache.nbytes <= 400_000


# ---------------------------------------------------------------------- stores that leave the newest as they are


def stored_by_hand(came, storage, seen):
    """Keys or values [n, D] of one head with nothing evicted, as they are read back after `seen` tokens."""
    name, x = came
    x = x.clone()
    if storage.startswith("kivi") and name == "k":
        bits, whole = int(storage[4:]), seen // 128 * 128
        for start in range(0, whole, 32):
            for channel in range(x.shape[1]):
                part = x[start : start + 32, channel]
                step = (part.max() - part.min()) / (2**bits - 1)
                x[start : start + 32, channel] = part.min() + ((part - part.min()) / step).round() * step
    elif storage.startswith("kivi"):
        codec = Affine(int(storage[4:]))
        x[: seen - 128] = codec.decode(codec.encode(x[: seen - 128]))
    elif name == "v":
        x = Affine(4).decode(Affine(4).encode(x)) if storage == "think-int4" else x
    return x


@pytest.mark.parametrize("chunk", [64, 300])
@pytest.mark.parametrize("storage", ["kivi2", "think-int4"])
def test_chunks_and_steps_store_what_one_pass_over_all_units_stores(storage, chunk):
    """Nothing evicted, float64: KIVI's groups whole residuals at a time, values as they age; ThinK's channels are one
    set of pairs a head for every unit but the newest 32."""
    backbone = Backbone(build_tiny_model("llama", dtype=torch.float64, head_dim=16))
    ids, n = tokens(256).repeat(1, 2)[:, :330], 300
    came, append = {0: [], 1: []}, KVCache.append

    def spy(self, index, new):
        came[index].append((new.k, new.v))
        return append(self, index, new)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(KVCache, "append", spy)
        reader = reader_of(backbone, "recency", n, budget=400, chunk_size=chunk, storage=storage)
        reader.read(ids[:, :n])
        for i in range(n, 330):
            reader.step(ids[:, i])
    for index, layer in enumerate(reader.cache.layers):
        units = layer.units()
        k, v = (torch.cat([piece[j] for piece in came[index]], 2)[0] for j in (0, 1))
        for head in range(2):
            want = stored_by_hand(("v", v[head]), storage, 330)
            torch.testing.assert_close(units.v[0, head], want, rtol=1e-9, atol=1e-9)
            got = units.k[0, head]
            if storage.startswith("kivi"):
                torch.testing.assert_close(got, stored_by_hand(("k", k[head]), storage, 330), rtol=1e-9, atol=1e-9)
                continue
            assert torch.equal(got[-32:], k[head][-32:])
            gone = (got[:-32] == 0).all(0).nonzero()[:, 0].tolist()
            assert len(gone) == 2 * int(8 * 0.4)
            assert {(j + 8) % 16 for j in gone} == set(gone)
            left = [j for j in range(16) if j not in gone]
            exact = (
                Affine(4).decode(Affine(4).encode(k[head][:, left])) if storage == "think-int4" else k[head][:, left]
            )
            torch.testing.assert_close(got[:-32][:, left], exact[:-32], rtol=1e-9, atol=1e-9)


def test_think_drops_the_pairs_that_the_first_aged_keys_and_their_chunks_queries_use_least():
    """Energies in plain loops: the last 32 queries of the first chunk, the keys behind which 32 tokens have come."""
    backbone = Backbone(build_tiny_model("llama", dtype=torch.float64, head_dim=16))
    ids = tokens(200)
    recorder = Recorder(backbone, 64)
    with torch.inference_mode():
        backbone.run(ids[:, :64], recorder, logits=0)  # the first chunk sees itself only
        reader = reader_of(backbone, "recency", 200, budget=256, chunk_size=64, storage="think")
        reader.read(ids)
    for layer in range(2):
        got = reader.cache.layers[layer].units().k[0]
        for head in range(2):
            q = recorder.q[layer][0, 4 * head : 4 * head + 4, -32:]
            k = recorder.k[layer][0, head, :32]
            energy = [
                sum(float(q[..., c].pow(2).mean()) for c in (j, j + 8))
                * sum(float(k[:, c].pow(2).mean()) for c in (j, j + 8))
                for j in range(8)
            ]
            lost = sorted(range(8), key=lambda j: energy[j])[:3]
            gone = (got[head, :-32] == 0).all(0).nonzero()[:, 0].tolist()
            assert gone == sorted(lost) + [j + 8 for j in sorted(lost)]


@pytest.mark.parametrize(("method", "storage"), [
    *(("knorm", storage) for storage in ("kivi4", "minikv", "think-int4")), ("adakv", "kivi2"), ("adakv", "think"),
    ("razor", "minikv"), ("sirllm", "kivi2"), ("snapkv", "think"),
])  # fmt: skip
def test_evicting_changes_no_unit_that_is_encoded(method, storage):
    """Chunk after chunk: what a unit decodes to, once it is encoded, it decodes to until it goes."""
    backbone = Backbone(build_tiny_model("llama", head_dim=16))
    ids = tokens(256).repeat(1, 3)
    with torch.inference_mode():
        reader = reader_of(backbone, method, 700, budget=200, chunk_size=48, storage=storage, num_stabilizers=20)
        known: dict[tuple[int, int, int], torch.Tensor] = {}
        changed = encoded = 0
        for start in range(0, 700, 48):
            reader.read(ids[:, start : start + 48], local_window=0, more=True)
            now = {}
            for index, layer in enumerate(reader.cache.layers):
                units, at = layer.units(), layer.positions()[0]
                source = layer._padded() if hasattr(layer, "_padded") else layer.slab[slice(0, layer.held)]
                codes = source.k.row[0] >= 0
                merged = units.state[0, ..., 0] > 0 if method == "razor" else torch.zeros_like(codes)
                for head in range(2):
                    for slot in (codes[head] & ~merged[head] & (at[head] >= 0)).nonzero()[:, 0].tolist():
                        now[index, head, int(at[head, slot])] = units.k[0, head, slot]
            for key, value in now.items():
                if key in known:
                    changed += not torch.equal(value, known[key])
                    encoded += 1
            known = now
    assert changed == 0
    assert encoded > 500


@pytest.mark.parametrize("storage", ["kivi2", "minikv"])
def test_groups_that_nobody_needs_are_dropped_and_scales_outlive_their_units(storage):
    """Heads' groups of g units each; with most of the units evicted nearly every group is in use: docs/storage.md."""
    backbone = Backbone(build_tiny_model("llama", head_dim=16))
    with torch.inference_mode():
        reader = reader_of(backbone, "random", 1500, budget=160, chunk_size=128, storage=storage, num_stabilizers=16)
        reader.read(tokens(256).repeat(1, 6)[:, :1500])
    group = 32 if storage == "kivi2" else 16
    for layer in reader.cache.layers:
        row = layer.slab[slice(0, layer.held)].k.row
        used = row[row >= 0].unique()
        scale, tail = (layer.slab.k.tables[name] for name in ("scale", "tail"))
        assert used.tolist() == list(range(len(scale)))  # no row is left over, none is missing
        assert len(tail) == int((row < 0).sum())
        assert len(scale) > (row >= 0).sum() // group  # groups are not full any more


def test_heads_of_different_lengths_do_not_share_groups():
    """They lie one after the other in a flat slab; a group is a head's own, whatever its neighbours leave over."""
    backbone = Backbone(build_tiny_model("llama", head_dim=16))
    ids = tokens(256, batch=2)
    with torch.inference_mode():
        reader = reader_of(backbone, "adakv", 256, batch=2, budget=101, chunk_size=200, storage="minikv")
        reader.read(ids[:, :200], local_window=0)
    for layer in reader.cache.layers:
        row, lengths = layer.slab[slice(0, layer.heads * layer.held)].k.row[:, 0], layer.lengths
        owners: dict[int, list[tuple[int, int]]] = {}
        for b in range(2):
            ends = lengths[b].cumsum(0).tolist()
            for unit, group in enumerate(row[b].tolist()):
                if group >= 0:
                    owners.setdefault(group, []).append((b, sum(unit >= end for end in ends)))
        assert len(owners) > 4
        assert all(len(set(found)) == 1 for found in owners.values())
        assert {len(found) for found in owners.values()} == {16}  # just made
        assert any(int(n) % 16 for n in lengths.flatten())


@pytest.mark.parametrize("method", ["adakv", "razor", "lococo", "pyramidkv"])
def test_rows_of_a_batch_take_their_own_bytes_and_no_more(method):
    """Budgets that differ: every row has lengths of its own, and a batch takes what its rows take alone."""
    backbone = Backbone(build_tiny_model("llama"))
    ids = tokens(101, batch=3)
    with torch.inference_mode():
        made = method_of(method, backbone)
        together = reader_of(backbone, made, 101, batch=3, budget=40, chunk_size=16)
        together.read(ids)
        alone = [reader_of(backbone, made, 101, budget=40, chunk_size=16) for _ in range(3)]
        for row, reader in enumerate(alone):
            reader.read(ids[row : row + 1])
    assert together.cache.nbytes == sum(reader.cache.nbytes for reader in alone)
    lengths = [[[len(head) for head in heads] for heads in kept(together, row)] for row in range(3)]
    assert all(sum(map(sum, row)) == 2 * 2 * 40 for row in lengths)
    if method == "adakv":
        assert lengths[0] != lengths[1] != lengths[2]
        for layer in together.cache.layers:
            assert layer.slab.k.shape == (3, 1, 2 * 40, 8)  # no head has a place for what another one keeps


def test_a_prompt_that_fits_stays_as_it_is_in_what_has_not_aged():
    """Fewer tokens than a residual: nothing is encoded, and logits are the dense cache's."""
    backbone = Backbone(build_tiny_model("llama", dtype=torch.float64))
    with torch.inference_mode():
        readers = [reader_of(backbone, "recency", 100, budget=128, chunk_size=32, storage=storage)
                   for storage in ("dense", "kivi2")]  # fmt: skip
        dense, stored = (reader.read(tokens(100)) for reader in readers)
    assert torch.equal(dense, stored)


def test_think_with_a_dead_channel_loses_nothing():
    """Keys whose pair is zero in every head: pruning it is exact."""
    model = build_tiny_model("llama", dtype=torch.float64)
    for layer in model.model.layers:  # pair 1 of D = 8 is channels 1 and 5; int(4 * 0.4) = 1 pair goes
        layer.self_attn.k_proj.weight.view(2, 8, -1)[:, [1, 5]] = 0.0
    backbone = Backbone(model)
    with torch.inference_mode():
        readers = [reader_of(backbone, "recency", 200, budget=256, chunk_size=64, storage=storage)
                   for storage in ("dense", "think")]  # fmt: skip
        dense, stored = (reader.read(tokens(200)) for reader in readers)
    assert relative(stored, dense) < 1e-12


def test_lorc_reads_back_the_units_projected_on_their_heads_bases():
    """By a singular value decomposition of the test's own; the chunk itself saw them exactly."""
    model = build_tiny_model("qwen2", dtype=torch.float64)  # with biases
    backbone = Backbone(model)
    with torch.inference_mode():
        dense, stored = (reader_of(backbone, "recency", 60, budget=128, chunk_size=64, local_window=0, storage=storage)
                         for storage in ("dense", "lorc"))  # fmt: skip
        assert torch.equal(dense.read(tokens(60)), stored.read(tokens(60)))  # one chunk
    ranks = [store.k.basis.shape[-1] for store in layer_stores("lorc", backbone)]
    assert ranks[0] == 8
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == 4
    for layer, (mine, whole) in enumerate(zip(stored.cache.layers, dense.cache.layers, strict=True)):
        attention = model.model.layers[layer].self_attn
        for name, projection in (("k", attention.k_proj), ("v", attention.v_proj)):
            got, want = getattr(mine.units(), name)[0], getattr(whole.units(), name)[0]
            for head in range(2):
                rows = slice(8 * head, 8 * head + 8)
                u = torch.linalg.svd(projection.weight[rows]).U[:, : ranks[layer]]
                offset = projection.bias[rows]
                torch.testing.assert_close(got[head], (want[head] - offset) @ u @ u.T + offset, rtol=1e-7, atol=1e-9)


def test_lorc_says_which_families_it_cannot_store():
    for family, reason in (("phi3", "no linear k_proj"), ("qwen3", "normalises keys")):
        with pytest.raises(BackboneError, match=reason):
            reader_of(Backbone(build_tiny_model(family)), "knorm", 40, budget=32, storage="lorc")


@pytest.mark.parametrize("storage", ["kivi2", "think"])
def test_copies_of_one_row_share_tables_and_go_on_as_the_row(storage):
    backbone = Backbone(build_tiny_model("llama", dtype=torch.float64))
    ids = tokens(256)
    with torch.inference_mode():
        one = reader_of(backbone, "knorm", 220, budget=150, chunk_size=32, storage=storage, num_stabilizers=10)
        one.read(ids[:, :220])
        many = one.copy()
        many.cache = one.cache.rows(torch.tensor([0, 0, 0]))
        for i in range(220, 256):
            want, got = one.step(ids[:, i]), many.step(ids[:, i].expand(3))
            assert relative(got, want.expand(3, -1)) < 1e-12
    assert kept(many, 2) == kept(one)


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
    # a chunk of 16 that the slab has room for, behind 16: decoded K and V, rotated K, and all of it as stored
    joined = 2 * 32 * (3 * 8 * 4 + unit_bytes(8, torch.float32, 0, "int4"))
    # a chunk of 16 beside 40: these decoded, their keys rotated, and the chunk's codes
    beside = 2 * (40 * 3 * 8 * 4 + 16 * (unit_bytes(8, torch.float32, 0, "int4") - 9))
    assert reader.cache.peak_bytes == reader.cache.nbytes + max(joined, beside)


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
