"""The cache: units stay rows of the originals, lengths stay in the budget, bytes are what the formula says."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from conftest import build_tiny_model
from oracles import Meter, llm_of, method_of, reader_of, spy_lengths, tokens

from locret.backbone import Backbone
from locret.cache import NAMES, KVCache, Units, unit_bytes
from locret.config import CacheConfig
from locret.errors import CapacityError, NumericsError
from locret.methods.base import Method
from locret.prefill import Reader


@dataclasses.dataclass(frozen=True)
class Diary(Method):
    """Asks another method and writes down every q, k, v and score that passes."""

    name: ClassVar[str] = "diary"
    inner: Method
    pages: dict = dataclasses.field(default_factory=dict)

    def score(self, view):
        scores = self.inner.score(view)
        self.pages.setdefault(view.layer, []).append((view.k.clone(), view.v.clone(), scores.clone()))
        return scores

    def originals(self, layer):
        return [torch.cat(parts, 2) for parts in zip(*self.pages[layer], strict=True)]


@pytest.fixture(scope="module")
def backbone():
    return Backbone(build_tiny_model("llama"))


def new_units(count, start=0, batch=1, heads=2, dim=4, seed=0):
    g = torch.Generator().manual_seed(seed + start)
    return Units(
        torch.randn(batch, heads, count, dim, generator=g), torch.randn(batch, heads, count, dim, generator=g),
        torch.randn(batch, heads, count, generator=g), torch.arange(start, start + count).expand(batch, heads, count),
        torch.rand(batch, heads, count, generator=g) < 0.3, torch.rand(batch, heads, count, 2, generator=g),
    )  # fmt: skip


def small_cache(capacity=10, chunk=6, windows=(None,), **options):
    return KVCache(
        windows=list(windows), batch=options.get("batch", 1), num_kv_heads=2, head_dim=4, capacity=capacity,
        chunk_size=chunk, dtype=torch.float32, device=torch.device("cpu"), initial=options.get("initial", 0), state=2,
        ragged=options.get("ragged", False),
    )  # fmt: skip


# ---------------------------------------------------------------------- append, keep, settle


@pytest.mark.parametrize("capacity", [10, None])
def test_appended_units_lie_behind_the_held_ones(capacity):
    cache = small_cache(capacity)
    first, second = new_units(6), new_units(4, start=6)
    cache.append(0, first)
    cache.layers[0].settle()
    joined = cache.append(0, second)
    for name in NAMES:
        assert torch.equal(getattr(joined, name), torch.cat((getattr(first, name), getattr(second, name)), 2))


def test_keep_moves_every_field_of_a_unit_together():
    cache = small_cache()
    parts = [new_units(6), new_units(6, start=6)]
    cache.append(0, parts[0])
    cache.layers[0].settle()
    cache.append(0, parts[1])
    keep = torch.tensor([[[0, 2, 3, 5, 7, 11], [1, 2, 6, 8, 9, 10]]])
    cache.layers[0].keep(keep)
    units = cache.layers[0].units()
    assert len(units) == 6
    for name in NAMES:
        whole = torch.cat([getattr(p, name) for p in parts], 2)
        for head in range(2):
            assert torch.equal(getattr(units, name)[0, head], whole[0, head, keep[0, head]]), name


def test_keep_is_right_where_source_and_target_overlap():
    """No overflow, so the joined units lie in the slab that they are compacted into."""
    cache = small_cache(capacity=12)
    units = new_units(6), new_units(6, start=6)
    for part in units:
        joined = cache.append(0, part)
        if part is units[0]:
            cache.layers[0].settle()
    before = joined.k.clone()
    cache.layers[0].keep(torch.tensor([[[3, 4, 5, 11], [0, 5, 6, 7]]]))
    assert torch.equal(cache.layers[0].units().k[0, 0], before[0, 0, [3, 4, 5, 11]])
    assert torch.equal(cache.layers[0].units().k[0, 1], before[0, 1, [0, 5, 6, 7]])


def test_keep_last_keeps_the_newest():
    cache = small_cache(windows=(5,))
    cache.append(0, new_units(3))
    cache.layers[0].settle()
    joined = cache.append(0, new_units(6, start=3))
    assert joined.position[0, 0].tolist() == list(range(9))
    cache.layers[0].keep_last(4)
    assert cache.layers[0].units().position[0, 0].tolist() == [5, 6, 7, 8]


def test_a_copy_is_independent_both_ways():
    cache = small_cache()
    cache.append(0, new_units(6))
    cache.layers[0].settle()
    twin = cache.copy()
    before = cache.layers[0].units().k.clone()
    twin.append(0, new_units(4, start=6))
    twin.layers[0].keep(torch.tensor([[[1, 2], [3, 4]]]))
    assert torch.equal(cache.layers[0].units().k, before)
    assert (cache.held, twin.held) == (6, 2)
    cache.append(0, new_units(6, start=50))
    cache.layers[0].keep(torch.tensor([[[7, 8], [9, 10]]]))
    assert torch.equal(twin.layers[0].units().k[0, 0], before[0, 0, [1, 2]])


def test_rows_takes_some_sequences():
    cache = small_cache(batch=3)
    units = new_units(6, batch=3)
    cache.append(0, units)
    cache.layers[0].settle()
    some = cache.rows(torch.tensor([2, 0]))
    assert some.batch == 2
    assert torch.equal(some.layers[0].units().k, units.k[[2, 0]])
    some.append(0, new_units(6, start=6, batch=2))  # its workspace has the right number of rows
    some.layers[0].keep(torch.arange(10).expand(2, 2, 10))


# ---------------------------------------------------------------------- layers and heads with budgets of their own


def test_layers_of_different_capacity_take_different_bytes():
    cache = small_cache((10, 4, 7), windows=(None, None, 5))
    assert [len(layer.slab) for layer in cache.layers] == [10, 4, 4]
    assert cache.nbytes == 2 * 18 * unit_bytes(4, torch.float32, 2)
    assert len(cache.workspace) == 10 + 6


def ragged(batch=2):
    """Two heads, 6 units a head on average; after the first eviction heads hold 5 + 3 and 2 + 6."""
    cache = small_cache(6, batch=batch, ragged=True)
    units = new_units(6, batch=batch)
    cache.append(0, units)
    cache.layers[0].settle()
    more = new_units(4, start=6, batch=batch)
    cache.append(0, more)
    keep = [[0, 1, 4, 8, 9, 11, 13, 15], [3, 7, 10, 12, 13, 14, 18, 19]][:batch]  # head * 10 + unit
    cache.layers[0].keep(torch.tensor(keep))
    whole = [torch.cat(pair, 2) for pair in zip(units, more, strict=True)]
    return cache, whole, [[[0, 1, 4, 8, 9], [1, 3, 5]], [[3, 7], [0, 2, 3, 4, 8, 9]]]


def check_ragged(layer, whole, want):
    units = layer.units()
    for row, heads in enumerate(want):
        for head, at in enumerate(heads):
            for got, all_units in zip(units, whole, strict=True):
                assert torch.equal(got[row, head, len(units) - len(at) :], all_units[row, head, at])
            assert layer.positions()[row, head].tolist() == [-1] * (len(units) - len(at)) + at


def test_ragged_heads_keep_every_field_of_their_own_units():
    cache, whole, want = ragged()
    layer = cache.layers[0]
    assert (layer.held, layer.width, layer.lengths.tolist()) == (4, 6, [[5, 3], [2, 6]])
    check_ragged(layer, whole, want)
    new = new_units(2, start=10, batch=2)
    joined = cache.append(0, new)
    assert len(joined) == 8
    assert layer.padding.tolist() == [[1, 3], [4, 0]]
    layer.settle()
    whole = [torch.cat(pair, 2) for pair in zip(whole, new, strict=True)]
    check_ragged(layer, whole, [[[*at, 10, 11] for at in heads] for heads in want])
    assert layer.held == 6


def test_a_ragged_layer_takes_the_bytes_of_an_even_one():
    cache, _, _ = ragged()
    assert cache.nbytes == small_cache(6, batch=2).nbytes + 4 * 8  # four lengths
    assert cache.workspace is None


def test_ragged_layers_are_copied_saved_and_split_into_rows():
    cache, whole, want = ragged()
    twin, rows, again = cache.copy(), cache.rows(torch.tensor([1])), small_cache(6, batch=2, ragged=True)
    again.layers[0].restore(cache.layers[0].tensors(), evicted=True)
    cache.append(0, new_units(2, start=10, batch=2))
    cache.layers[0].keep(torch.tensor([[0, 12], [5, 15]]))
    check_ragged(twin.layers[0], whole, want)
    check_ragged(again.layers[0], whole, want)
    check_ragged(rows.layers[0], [tensor[1:] for tensor in whole], want[1:])
    assert (again.layers[0].held, again.layers[0].evicted) == (4, True)


# ---------------------------------------------------------------------- what stays are rows of the originals


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("name", ["knorm", "locret"])
def test_kept_keys_and_values_are_rows_of_the_originals_in_position_order(backbone, name, positions):
    diary = Diary(method_of(name, backbone))
    ids = tokens(150)
    with torch.inference_mode():
        reader = reader_of(backbone, diary, 150, budget=40, chunk_size=24, positions=positions)
        reader.read(ids)
        for i in range(20):
            reader.step(torch.tensor([9 + i]))
    for i, layer in enumerate(reader.cache.layers):
        k, v, scores = diary.originals(i)
        units = layer.units()
        assert (units.position.diff(dim=-1) > 0).all()
        for head in range(backbone.num_kv_heads):
            at = units.position[0, head]
            assert torch.equal(units.k[0, head], k[0, head, at])
            assert torch.equal(units.v[0, head], v[0, head, at])
            assert torch.equal(units.score[0, head], scores[0, head, at].float())


def test_the_marks_of_protected_units_move_with_them(backbone):
    mask = torch.zeros(120, dtype=torch.bool)
    mask[[3, 17, 18, 60, 99]] = True
    with torch.inference_mode():
        reader = Reader.start(
            backbone, method_of("random", backbone), CacheConfig(budget=40, chunk_size=16), batch=1, prompt_len=120,
            num_protected=5,
        )  # fmt: skip
        reader.read(tokens(120), protected=mask)
        for i in range(30):
            reader.step(torch.tensor([9 + i]))
    for layer in reader.cache.layers:
        units = layer.units()
        for head in range(2):
            assert units.position[0, head][units.protected[0, head]].tolist() == [3, 17, 18, 60, 99]


# ---------------------------------------------------------------------- lengths


@pytest.mark.parametrize("name", ["knorm", "locret", "snapkv", "recency"])
@pytest.mark.parametrize("options", [
    dict(budget=40, chunk_size=24), dict(budget=40, chunk_size=100), dict(budget=40, chunk_size=1),
    dict(budget=33, chunk_size=7, local_window=20, num_stabilizers=3, decode_interval=1, positions="original"),
    dict(budget="30%", chunk_size=16), dict(budget=40, chunk_size=24, local_window=0, num_stabilizers=0, num_sinks=0),
], ids=str)  # fmt: skip
def test_no_layer_ever_holds_more_than_the_budget_and_the_chunk(backbone, monkeypatch, name, options):
    """After every chunk and every step; while a layer works, at most budget + chunk."""
    length = 101
    with torch.inference_mode(), spy_lengths(monkeypatch) as seen:
        method = method_of(name, backbone, **(dict(window=1) if name == "snapkv" else {}))
        reader = reader_of(backbone, method, length, **options)
        reader.read(tokens(length))
        for i in range(25):
            reader.step(torch.tensor([9 + i]))
    budget, chunk = reader.plan.budget, reader.plan.chunk_size
    assert max(seen.held) == budget
    assert max(seen.joined) <= budget + chunk
    assert seen.held[-1] <= budget


def test_no_turn_of_a_conversation_leaves_the_budget(monkeypatch):
    llm = llm_of(method="locret", budget=64, chunk_size=24)
    with spy_lengths(monkeypatch) as seen:
        context = llm.compress("x" * 150)
        assert context.held <= 64
        for i in range(4):
            context.chat(f"and what is {i}?" * (i + 1), max_new_tokens=20)
            assert context.held <= 64
            context.append("more text " * 12)
            assert context.held <= 64
            context.ask("?", max_new_tokens=30)
            assert context.held <= 64
    assert max(seen.held) <= 64
    assert max(seen.joined) <= 64 + 24


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layer", [0, 1])
def test_scores_that_are_no_numbers_raise_instead_of_keeping_anything(backbone, bad, layer):
    class Broken(Method):
        name = "broken"

        def score(self, view):
            scores = view.k.float().norm(dim=-1)
            if view.layer == layer and view.start >= 32:
                scores[0, 0, 3] = bad
            return scores

    with torch.inference_mode():
        reader = reader_of(backbone, Broken(), 100, budget=48, chunk_size=16)
        with pytest.raises(NumericsError, match=r"'broken' gave NaN or infinite scores between tokens 32 and 48"):
            reader.read(tokens(100))


def test_weights_that_are_no_numbers_raise(tiny_model):
    model = tiny_model("llama")
    model.model.layers[0].self_attn.k_proj.weight[3, 5] = float("nan")
    with torch.inference_mode():
        reader = reader_of(Backbone(model), "knorm", 30, budget=48, chunk_size=16)
        with pytest.raises(NumericsError):
            reader.read(tokens(30))


# ---------------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["knorm", "recency"])
def test_stored_bytes_equal_the_formula(tiny_model, name, dtype, batch):
    """recency looks at all units at once: they are joined in a workspace. knorm's chunks stay beside the old units."""
    backbone = Backbone(tiny_model("llama", dtype=dtype))
    reader = reader_of(backbone, name, 500, batch=batch, budget=48, chunk_size=16)
    one = 2 * 8 * dtype.itemsize + 4 + 4 + 1  # K, V; fp32 score, int32 position, flag
    assert unit_bytes(8, dtype) == one
    slab = 49 if name == "knorm" else 48  # one to spare for a replayed step
    assert reader.cache.nbytes == batch * 2 * 2 * slab * one
    assert reader.cache.workspace_bytes == (batch * 2 * (48 + 16) * one if name == "recency" else 0)
    with torch.inference_mode():
        reader.read(tokens(500, batch=batch))
    assert reader.cache.nbytes == batch * 2 * 2 * slab * one
    units = 48 + 16  # one layer's keys at their angles
    if name == "knorm":
        units += 48  # one layer's keys in one piece, and those that stay, while they are moved without Triton
    scratch = batch * 2 * units * 8 * dtype.itemsize
    if name == "knorm":
        assert reader.cache.peak_bytes == reader.cache.nbytes + scratch
    else:
        assert reader.cache.peak_bytes >= reader.cache.nbytes + reader.cache.workspace_bytes + scratch


def test_bytes_of_windowed_layers_equal_the_formula(tiny_model):
    backbone = Backbone(tiny_model("gemma3"))  # a layer with a window of 24, one with a budget; head dim 16
    reader = reader_of(backbone, "knorm", 500, budget=48, chunk_size=16)
    assert reader.cache.nbytes == 2 * (23 + 49) * unit_bytes(16, torch.float32)


def test_a_budget_in_bytes_is_what_the_slabs_take_at_most(tiny_model):
    for family in ("llama", "gemma3", "smollm3"):
        backbone = Backbone(tiny_model(family))
        for budget in ("60000", "48KiB", "200KB"):
            text = budget if budget[-1] == "B" else budget + "B"
            reader = reader_of(backbone, "knorm", 10_000, budget=text, chunk_size=16)
            wanted = {"60000B": 60_000, "48KiB": 49_152, "200KB": 200_000}[text]
            each = unit_bytes(backbone.head_dim, torch.float32) * backbone.num_kv_heads
            full_layers = sum(s.window is None for s in backbone.layers)
            assert wanted - full_layers * each < reader.cache.nbytes <= wanted, (family, text)


def test_a_cache_that_can_hold_everything_is_not_made_larger(backbone):
    reader = Reader.start(
        backbone, method_of("knorm", backbone), CacheConfig(budget=100_000), batch=1, prompt_len=20, new_tokens=5
    )
    assert reader.cache.nbytes == 2 * 2 * 25 * unit_bytes(8, torch.float32)


@pytest.fixture(scope="module")
def tiniest():
    """One layer, hidden size 16: a quarter of a million tokens in seconds."""
    model = build_tiny_model(
        "llama-plain", num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32,
    )  # fmt: skip
    return Backbone(model)


def read_long(backbone, length, *, method="knorm", **options):
    """(bytes that everything alive took at most, bytes still alive at the end, the reader) for a whole prefill.

    Counted are all tensors that torch creates from the cache's own allocation to the last chunk, temporary ones
    included; the prompt's ids exist before.
    """
    ids = torch.randint(0, 32, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), Meter() as meter:
        reader = reader_of(backbone, method, length, chunk_size=2048, **options)
        reader.read(ids)
    return meter.peak, meter.live, reader


def test_allocated_bytes_are_the_same_for_16k_64k_and_256k_tokens(tiniest):
    """Real prefills, every allocation counted: a cache, score list or table that grew by a byte a token is red."""
    runs = [read_long(Backbone(tiniest.model), length, budget=1024) for length in (16_384, 65_536, 262_144)]
    peaks, alive, readers = zip(*runs, strict=True)
    assert len(set(peaks)) == 1, peaks
    assert len(set(alive)) == 1, alive
    assert len({(r.cache.nbytes, r.cache.workspace_bytes, r.cache.peak_bytes) for r in readers}) == 1
    assert [r.cache.seen for r in readers] == [16_384, 65_536, 262_144]
    assert readers[0].cache.nbytes + readers[0].cache.workspace_bytes < alive[0] < peaks[0]  # they are in the count


def test_the_count_above_grows_with_a_full_cache(tiniest):
    """The same measurement of a method that evicts nothing: it would have gone red."""
    short, long = (read_long(tiniest, length, method="full", budget=1024)[1] for length in (8_192, 16_384))
    assert long - short >= 8_192 * unit_bytes(8, torch.float32)


@pytest.mark.parametrize("storage", ["dense", "int4"])
@pytest.mark.parametrize("units", [10**12, 10**17, 10**20])
def test_a_cache_that_does_not_fit_is_refused_with_the_arithmetic(units, storage):
    """Torch's own errors on a CPU are a RuntimeError and, beyond what a size can be, a TypeError."""
    with pytest.raises(
        CapacityError, match=r"no memory on cpu for the cache: [\d,]+ units .* x \d+ B = [\d,]+ B; lower"
    ):
        KVCache(windows=[None, None], batch=1, num_kv_heads=2, head_dim=64, capacity=units, chunk_size=8,
                dtype=torch.float32, device=torch.device("cpu"), storage=storage)  # fmt: skip


def test_out_of_gpu_memory_while_a_cache_is_made_is_refused_too(monkeypatch):
    def no_memory(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Units, "empty", no_memory)
    with pytest.raises(CapacityError, match="units of single KV heads x") as error:
        KVCache(windows=[None], batch=1, num_kv_heads=2, head_dim=4, capacity=8, chunk_size=8, dtype=torch.float32,
                device=torch.device("cpu"))  # fmt: skip
    assert error.value.__cause__.__traceback__ is None  # its frames would keep tensors alive


def test_other_errors_of_an_allocation_are_what_they_were():
    with pytest.raises(RuntimeError, match="negative dimension"):
        KVCache(windows=[None], batch=1, num_kv_heads=2, head_dim=4, capacity=-8, chunk_size=8, dtype=torch.float32,
                device=torch.device("cpu"))  # fmt: skip
