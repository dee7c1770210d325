"""Replayed decode steps: the same tokens, the same logits and the same cache as ordinary ones.

Here the step runs kernel by kernel (`capture=False`), so that everything but the capture itself is tested on a CPU; the
tests marked gpu run the captured graph.
"""

import gc
import math
import weakref

import pytest
import torch
from conftest import build_tiny_model
from triton_programs import interpret

import locret
from locret.backbone import Backbone
from locret.cache import KVCache, Packed
from locret.config import CacheConfig
from locret.graph import StepGraph
from locret.heads import HeadsConfig, RetainingHeads
from locret.methods import get_method
from locret.prefill import ChunkPass, Reader
from locret.step import Step, take

FAMILIES = ["llama", "qwen2", "qwen3", "phi3", "phi3-longrope", "gemma", "glm", "cohere", "smollm3", "yarn"]


def method_of(name, backbone, **options):
    heads = (
        RetainingHeads(HeadsConfig.of(backbone), generator=torch.Generator().manual_seed(1))
        if name == "locret"
        else None
    )
    if heads is not None:
        heads = heads.to(backbone.device, backbone.dtype).join_layers()
    return get_method(name, heads=heads, **options)


def words(rows, length, device="cpu"):
    """Tokens of which none occurs twice in a row: equal ones tie in the first layer, and rounding then decides."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(250, generator=generator)[:length] + 3 for _ in range(rows)]).to(device)


def decode(backbone, method, config, prompt, text, graph, capture=False):
    """Logits and the cache after reading `text` [B, T] step by step behind the prompt."""
    reader = Reader.start(backbone, method, config, batch=prompt.shape[0], prompt_len=prompt.shape[1])
    with torch.inference_mode():
        reader.read(prompt)
        reader._graph = (StepGraph.of(reader, capture=capture) or False) if graph else False
        assert bool(reader._graph) == graph
        logits = [reader.step(tokens) for tokens in text.T]
        reader.settle()
    return torch.stack(logits), reader.cache


def compare(backbone, name, config, text, prompt_len, capture=False, rtol=1e-4, options=None):
    method, prompt, rest = method_of(name, backbone, **(options or {})), text[:, :prompt_len], text[:, prompt_len:]
    logits, cache = decode(backbone, method, config, prompt, rest, graph=False)
    mine, mine_cache = decode(backbone, method, config, prompt, rest, graph=True, capture=capture)
    assert (mine - logits).float().norm() <= rtol * logits.float().norm()
    assert mine_cache.seen == cache.seen
    for one, other in zip(cache.layers, mine_cache.layers, strict=True):
        assert one.held == other.held
        want, got = one.units().tensors(), other.units().tensors()
        for column in ("position", "protected"):
            assert torch.equal(want[column], got[column]), column
        for column in ("k", "v", "score"):
            assert (got[column] - want[column]).float().norm() <= rtol * want[column].float().norm(), column
    return mine_cache


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_with_evictions_equal_ordinary_ones(family):
    """40 steps through a budget of 30 with an eviction every 6: prompt longer than the budget, two rows."""
    backbone = Backbone(build_tiny_model(family))
    config = CacheConfig(budget=30, chunk_size=16, num_stabilizers=4, local_window=4, decode_interval=6)
    compare(backbone, "locret", config, words(2, 97), 57)


@pytest.mark.parametrize("name", ["full", "knorm", "random"])
def test_other_methods_whose_units_are_scored_alone(name):
    backbone = Backbone(build_tiny_model("llama"))
    config = CacheConfig(budget=40, chunk_size=16, num_stabilizers=4, local_window=4, decode_interval=5)
    compare(backbone, name, config, words(1, 80), 20)


@pytest.mark.parametrize("name", ["snapkv", "recency", "tova", "keydiff", "expected_attention", "nacl"])
def test_methods_that_score_when_they_evict_are_replayed_between_evictions(name):
    backbone = Backbone(build_tiny_model("llama"))
    config = CacheConfig(budget=40, chunk_size=16, num_stabilizers=4, local_window=4, decode_interval=5)
    compare(backbone, name, config, words(2, 80), 50, options={"window": 8} if name == "snapkv" else {})


def test_a_stash_that_is_full_is_scored_and_emptied():
    """A prompt far below the budget: many more steps than the stash holds before the first eviction."""
    backbone = Backbone(build_tiny_model("llama"))
    config = CacheConfig(budget=50, chunk_size=16, num_stabilizers=4, local_window=4, decode_interval=3)
    compare(backbone, "locret", config, words(1, 95), 5)


@pytest.mark.parametrize("storage", ["dense", "int8"])
def test_stashed_steps_are_scored_for_all_layers_at_once(storage, monkeypatch):
    """Layer by layer only where their slabs, or the heads' weights, do not lie together."""
    backbone = Backbone(build_tiny_model("llama"))
    config = CacheConfig(budget=30, chunk_size=16, decode_interval=6, storage=storage)
    text, ends, single = words(2, 60), [], []
    score = RetainingHeads.score
    monkeypatch.setattr(RetainingHeads, "score", lambda heads, *args: (single.append(1), score(heads, *args))[1])
    for joined in (False, True):
        method = method_of("locret", backbone)
        if not joined:
            method.heads.load_state_dict({k: v.clone() for k, v in method.heads.state_dict().items()}, assign=True)
        single.clear()
        ends.append((*decode(backbone, method, config, text[:, :40], text[:, 40:], graph=True), len(single)))
    layers = backbone.num_layers
    assert ends[0][2] - ends[1][2] == 5 * layers  # before each of four evictions, and at the end
    torch.testing.assert_close(ends[0][0], ends[1][0])
    for one, other in zip(ends[0][1].layers, ends[1][1].layers, strict=True):
        mine, theirs = one.units().tensors(), other.units().tensors()
        assert all(torch.allclose(mine[name].float(), theirs[name].float(), atol=1e-5) for name in mine)


@pytest.mark.parametrize("storage", ["dense", "int8", "int4"])
def test_all_layers_cut_back_at_once_are_left_as_one_after_the_other(tiny_model, storage, monkeypatch):
    """On a GPU an eviction between steps is two launches for all layers; here it goes by the torch paths."""
    backbone = Backbone(tiny_model("llama"))
    config = CacheConfig(budget=30, chunk_size=16, decode_interval=6, storage=storage)
    text, ends, cuts = words(2, 60), [], []
    cut = KVCache.cut
    monkeypatch.setattr(KVCache, "cut", lambda cache, held: (cuts.append(held), cut(cache, held)))
    for together in (False, True):
        monkeypatch.setattr("locret.prefill.use_triton", lambda kernel, x, together=together: together)
        ends.append(decode(backbone, method_of("locret", backbone), config, text[:, :40], text[:, 40:], graph=True))
    assert cuts == [25] * 4
    assert torch.equal(ends[0][0], ends[1][0])
    for one, other in zip(ends[0][1].layers, ends[1][1].layers, strict=True):
        assert one.held == other.held
        mine, theirs = one.units().tensors(), other.units().tensors()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("rows", [None, [2, 0, 2, 1]])
def test_copies_of_a_cache_lie_in_one_piece_too(tiny_model, rows):
    backbone = Backbone(tiny_model("llama"))
    config = CacheConfig(budget=30, chunk_size=16)
    reader = Reader.start(backbone, method_of("locret", backbone), config, batch=3, prompt_len=50)
    with torch.inference_mode():
        reader.read(words(3, 50))
    before = [layer.positions() for layer in reader.cache.layers]
    twin = reader.cache.copy() if rows is None else reader.cache.rows(torch.tensor(rows))
    whole, want = twin.whole(), before if rows is None else [positions[rows] for positions in before]
    assert torch.equal(whole.positions(), torch.cat(want))
    whole.slab.score.fill_(7.0)
    assert all((layer.units().score == 7.0).all() for layer in twin.layers)
    assert not any((layer.units().score == 7.0).any() for layer in reader.cache.layers)
    assert twin.nbytes == reader.cache.nbytes * twin.batch // 3


def test_no_step_is_an_ordinary_one_not_even_where_it_evicts(monkeypatch):
    backbone = Backbone(build_tiny_model("llama"))
    config = CacheConfig(budget=30, chunk_size=16, num_stabilizers=4, local_window=4, decode_interval=6)
    reader = Reader.start(backbone, method_of("locret", backbone), config, batch=2, prompt_len=57)
    evictions, may_be_unread = [], []
    evict = Reader.evict
    monkeypatch.setattr(Reader, "evict", lambda reader: (evictions.append(reader.cache.held), evict(reader)))
    with torch.inference_mode():
        reader.read(words(2, 57))
        reader._graph = StepGraph.of(reader, capture=False)
        monkeypatch.setattr(ChunkPass, "attend", None)
        for token in range(25):
            may_be_unread.append(reader.can_unread)
            reader.step(torch.full((2,), 60 + token))
            assert reader.cache.held <= 30
    assert evictions == [31] * 5  # the first one at the first step, then every sixth
    assert may_be_unread == [token % 6 != 0 for token in range(25)]


def test_a_step_waits_for_the_next_reader_and_keeps_nobody_alive():
    class Owner:
        """Has a step until it is gone."""

    backbone = Backbone(build_tiny_model("llama"))
    first = Owner()
    step = take(backbone, (1, 4, None), owner=first)
    second = Owner()
    assert take(backbone, (1, 4, None), owner=second) is not step  # it is taken
    gone = weakref.ref(backbone)
    gc.disable()
    try:
        del first
        assert take(backbone, (1, 3, None), owner=second) is not step
        third = Owner()
        assert take(backbone, (1, 4, None), owner=third) is step
        del second, third, step, backbone
        assert gone() is None
    finally:
        gc.enable()


def test_a_step_over_codes_is_captured_anew_for_slabs_of_another_size(monkeypatch):
    """Also where they begin at the addresses of the last reader's, which an allocator may well give again."""
    backbone = Backbone(build_tiny_model("llama"))
    captures, rope = [], backbone.rope(200, 60)
    monkeypatch.setattr(Step, "_record", lambda step: captures.append(step))
    monkeypatch.setattr(Backbone, "rope", lambda backbone, length, prompt_len: rope)
    monkeypatch.setattr("locret.graph._numbers", lambda slab: [])  # every slab at the same addresses
    for budget in (40, 40, 48):
        config = CacheConfig(budget=budget, chunk_size=16, num_stabilizers=4, local_window=4, decode_interval=5,
                             storage="int8")  # fmt: skip
        reader = Reader.start(backbone, method_of("knorm", backbone), config, batch=1, prompt_len=60)
        with torch.inference_mode():
            reader.read(words(1, 60))
            StepGraph(reader, capture=True)._refresh()  # and it is given back
    assert len(captures) == 2
    assert captures[0] is captures[1]


@pytest.mark.gpu
@pytest.mark.parametrize(("storage", "dtype"), [
    ("dense", torch.float32), ("int8", torch.float32), ("int4", torch.bfloat16),
])  # fmt: skip
def test_the_next_reader_replays_what_was_captured_for_the_last(monkeypatch, newest_as_stored, storage, dtype):
    """Its slabs lie elsewhere: the graph finds them in a table."""
    captures, record = [], Step._record
    monkeypatch.setattr(Step, "_record", lambda step: (captures.append(step), record(step)))
    backbone = Backbone(build_tiny_model("llama", head_dim=64).to("cuda", dtype))
    budget = 30 if dtype == torch.float32 else 200  # rounding in bfloat16 would choose other units
    config = CacheConfig(
        budget=budget, chunk_size=16, num_stabilizers=4, local_window=4, decode_interval=6, storage=storage
    )
    method, text, others = method_of("locret", backbone), words(1, 97, "cuda"), []
    want, _ = decode(backbone, method, config, text[:, :57], text[:, 57:], graph=False)
    for _ in range(3):
        got, cache = decode(backbone, method, config, text[:, :57], text[:, 57:], graph=True, capture=True)
        others.append(cache)  # so that the next one lies elsewhere
        rtol = {"dense": 1e-3, "int8": 3e-2, "int4": 1e-1}[storage]  # int4 in bfloat16: as in the test of codes below
        assert (got - want).float().norm() <= rtol * want.float().norm()
    assert len(captures) == 1


# ---------------------------------------------------------------------- units in codes

CODED = [
    ("int8", "llama", "locret"),
    ("int4", "qwen3", "locret"),
    ("quanto4", "glm", "knorm"),
    ("int4", "llama", "full"),
]


@pytest.fixture
def newest_as_stored(monkeypatch):
    """Ordinary steps that see their own unit as it is stored, which is what replayed ones do."""
    join = Packed.join

    def joined(self, new):
        packed, dense = join(self, new)
        return packed, (packed.units() if len(new) == 1 else dense)

    monkeypatch.setattr(Packed, "join", joined)


@pytest.mark.parametrize(("storage", "family", "name"), CODED)
def test_steps_over_codes_equal_ordinary_ones(newest_as_stored, storage, family, name):
    """Evictions in between, a stash that is emptied early, two rows: scores of exact keys and values, too.

    In float64: in float32 now and then a number lies so near the middle of two codes that rounding decides.
    """
    backbone = Backbone(build_tiny_model(family).double())
    config = CacheConfig(
        budget=30, chunk_size=16, num_stabilizers=4, local_window=4, decode_interval=6, storage=storage
    )
    compare(backbone, name, config, words(2, 97), 57)
    cache = compare(
        backbone, name, CacheConfig(**{**vars(config), "budget": 60, "decode_interval": 3}), words(2, 70), 9
    )
    assert all(isinstance(held.slab, Packed) for held in cache.layers)


def test_a_step_over_codes_is_near_one_that_sees_its_unit_as_it_came():
    """The one difference between the two kinds of steps is one unit's rounding."""
    backbone = Backbone(build_tiny_model("llama"))
    config = CacheConfig(budget=90, chunk_size=16, num_stabilizers=4, local_window=4, storage="int8")
    method, text = method_of("knorm", backbone), words(1, 80)
    logits, _ = decode(backbone, method, config, text[:, :60], text[:, 60:], graph=False)
    mine, _ = decode(backbone, method, config, text[:, :60], text[:, 60:], graph=True)
    assert 0 < (mine - logits).norm() <= 2e-2 * logits.norm()


def test_a_step_over_codes_changes_no_other_unit_and_is_taken_back():
    """Codes, scales and zeros of the units before it stay bit by bit; the slabs keep their bytes and addresses."""
    backbone = Backbone(build_tiny_model("llama"))
    config = CacheConfig(budget=40, chunk_size=16, num_stabilizers=4, local_window=4, storage="int4")
    reader = Reader.start(backbone, method_of("locret", backbone), config, batch=1, prompt_len=30)
    with torch.inference_mode():
        logits = reader.read(words(1, 30))
        before = [{name: x.clone() for name, x in held.tensors().items()} for held in reader.cache.layers]
        places = [[x.data_ptr() for x in held.slab] for held in reader.cache.layers]
        kv_bytes, held = reader.cache.nbytes, reader.cache.held
        reader._graph = StepGraph.of(reader, capture=False)
        stash = reader._graph._step.stash
        shape = (
            backbone.num_layers,
            1,
            backbone.num_q_heads + 2 * backbone.num_kv_heads,
            len(stash),
            backbone.head_dim,
        )
        assert stash.nbytes == 4 * math.prod(shape)
        assert reader.cache.peak_bytes >= kv_bytes + stash.nbytes
        for token in (5, 6, 7):
            logits = reader.step(torch.tensor([token]))
        reader.unread()
        again = reader.step(torch.tensor([7]))
        assert torch.equal(again, logits)
        twin = reader.copy()  # settles
    assert (reader.cache.nbytes, reader.cache.held) == (kv_bytes, held + 3)
    assert places == [[x.data_ptr() for x in held.slab] for held in reader.cache.layers]
    for cache in (reader.cache, twin.cache):
        for old, layer in zip(before, cache.layers, strict=True):
            assert all(torch.equal(x, layer.tensors()[name][:, :, :held]) for name, x in old.items())
            assert layer.positions()[0, 0, -3:].tolist() == [30, 31, 32]


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        ("llama", "h2o", {}),  # every step adds to the scores of all units
        ("llama", "corm", {}),
        ("llama", "adakv", {}),  # heads of different lengths
        ("mistral-window", "locret", {}),
        ("llama", "locret", {"storage": "int2"}),
        ("llama", "locret", {"storage": "hqq4"}),
        ("llama", "locret", {"storage": "kivi4"}),
        ("llama", "locret", {"storage": "think-int4"}),  # keys and values are not stored alike
        ("llama", "locret", {"positions": "original"}),
    ],
)
def test_what_a_graph_cannot_do_takes_ordinary_steps(family, name, options):
    backbone = Backbone(build_tiny_model(family))
    config = CacheConfig(budget=40, chunk_size=32, num_stabilizers=4, local_window=4, **options)
    reader = Reader.start(backbone, method_of(name, backbone), config, batch=1, prompt_len=60)
    assert StepGraph.of(reader, capture=False) is None


def test_nan_scores_are_reported_when_the_cache_is_made_whole():
    backbone = Backbone(build_tiny_model("llama"))
    method = method_of("locret", backbone)
    config = CacheConfig(budget=40, chunk_size=16, num_stabilizers=4, local_window=4)
    reader = Reader.start(backbone, method, config, batch=1, prompt_len=10)
    with torch.inference_mode():
        logits = reader.read(torch.arange(5, 15)[None])
        reader._graph = StepGraph.of(reader, capture=False)
        method.heads.layers[0].fc2.weight.fill_(float("nan"))
        reader.step(logits.argmax(-1))
        with pytest.raises(Exception, match="NaN or infinite scores"):
            reader.settle()


def test_nan_scores_are_reported_even_if_the_stash_was_emptied_since():
    """What an earlier write of the stash found was once thrown away, and only the last one's was looked at."""
    backbone = Backbone(build_tiny_model("llama"))
    method = method_of("locret", backbone)
    config = CacheConfig(budget=60, chunk_size=16, num_stabilizers=4, local_window=4, decode_interval=3)
    reader = Reader.start(backbone, method, config, batch=1, prompt_len=10)
    with torch.inference_mode():
        reader.read(torch.arange(5, 15)[None])
        reader._graph = StepGraph.of(reader, capture=False)
        weight = method.heads.layers[0].fc2.weight
        whole = weight.clone()
        weight.fill_(float("nan"))
        for token in range(4):  # the fourth step empties the stash of three
            reader.step(torch.tensor([20 + token]))
        weight.copy_(whole)
        with pytest.raises(Exception, match="NaN or infinite scores"):
            reader.settle()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("storage", "name", "budget"), [("int8", "locret", 30), ("int4", "locret", 100), ("quanto4", "knorm", 100)]
)
def test_a_captured_graph_over_codes_equals_ordinary_steps(newest_as_stored, storage, name, budget):
    """A number between two codes may fall to either side. At 4 bits nothing is evicted, so that it chooses no units."""
    backbone = Backbone(build_tiny_model("llama", head_dim=64).to("cuda", torch.float32))
    assert backbone.fused is not None
    config = CacheConfig(
        budget=budget, chunk_size=16, num_stabilizers=4, local_window=4, decode_interval=6, storage=storage
    )
    compare(backbone, name, config, words(2, 97, "cuda"), 57, capture=True, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_captured_graph_over_codes_in_bf16(newest_as_stored, storage):
    """Head dim 128: the kernel of codes. Nothing is evicted, so that rounding cannot choose other units."""
    backbone = Backbone(build_tiny_model("llama", head_dim=128).to("cuda", torch.bfloat16))
    config = CacheConfig(budget=100, chunk_size=16, num_stabilizers=4, local_window=4, storage=storage)
    compare(backbone, "full", config, words(2, 97, "cuda"), 57, capture=True, rtol=1e-1)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), [("locret", torch.float32), ("full", torch.bfloat16)])
def test_a_captured_graph_equals_ordinary_steps(name, dtype):
    """In bf16 scores of near ties differ by rounding, and other units stay: there only what evicts nothing compares."""
    model = build_tiny_model("llama", head_dim=64).to("cuda", dtype)
    backbone = Backbone(model)
    assert backbone.fused is not None
    config = CacheConfig(budget=30, chunk_size=16, num_stabilizers=4, local_window=4, decode_interval=6)
    compare(
        backbone, name, config, words(2, 97, "cuda"), 57, capture=True, rtol=1e-3 if dtype == torch.float32 else 3e-2
    )


def test_a_reader_that_is_dropped_frees_its_cache_at_once():
    """Gigabytes on a GPU must not wait for the garbage collector."""
    backbone = Backbone(build_tiny_model("llama"))
    config = CacheConfig(budget=40, chunk_size=16, num_stabilizers=4, local_window=4)
    reader = Reader.start(backbone, method_of("locret", backbone), config, batch=1, prompt_len=10)
    with torch.inference_mode():
        reader.read(torch.arange(5, 15)[None])
        reader._graph = StepGraph.of(reader, capture=False)
        reader.step(torch.tensor([7]))
    cache = weakref.ref(reader.cache)
    gc.disable()
    try:
        del reader
        assert cache() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------------- the decode loop


@pytest.fixture
def graphs_everywhere(monkeypatch):
    """Readers replay on the CPU too, kernel by kernel."""

    def step_graph(reader):
        if reader._graph is None:
            reader._graph = StepGraph.of(reader, capture=False) or False
        return reader._graph or None

    return lambda: monkeypatch.setattr(Reader, "_step_graph", step_graph)


def conversation(folder, storage="dense", **sampling):
    """Texts of two turns, a question beside them and a forked one, and what the cache holds in the end."""
    llm = locret.load(
        folder, method="knorm", budget=60, chunk_size=32, num_stabilizers=8, local_window=8, decode_interval=7,
        storage=storage,
    )  # fmt: skip
    context = llm.compress("a story of 1234 words about the sea and the wind " * 4)
    outputs = [context.ask("who?", max_new_tokens=9, **sampling), context.chat("what?", max_new_tokens=30, **sampling)]
    twin = context.fork()
    outputs += [
        context.chat("where to?", max_new_tokens=25, **sampling),
        twin.chat("when?", max_new_tokens=1, **sampling),
    ]
    outputs += llm.generate([list(range(9, 60)), list(range(60, 111))], max_new_tokens=40, **sampling)
    return [o.tokens for o in outputs], [p.tolist() for p in context.kept()], context.seen


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.3}, {"stop": ["e", "a"]}]
)
def test_conversations_are_the_same_with_replayed_steps(tiny_folder, graphs_everywhere, sampling):
    """The host runs one step behind; what was read too many is taken back before the next turn."""
    want = conversation(tiny_folder("llama"), **sampling)
    graphs_everywhere()
    assert conversation(tiny_folder("llama"), **sampling) == want


def test_conversations_over_codes_are_the_same_with_replayed_steps(tiny_folder, graphs_everywhere, newest_as_stored):
    want = conversation(tiny_folder("llama"), storage="int4")
    graphs_everywhere()
    assert conversation(tiny_folder("llama"), storage="int4") == want


def test_a_stream_that_is_left_early_leaves_a_whole_cache(tiny_folder, graphs_everywhere):
    graphs_everywhere()
    llm = locret.load(tiny_folder("llama"), method="knorm", budget=60, chunk_size=32, num_stabilizers=8, local_window=8)
    context = llm.compress("a story about the sea and the wind " * 4)
    seen = context.seen
    stream = context.reply("who?", max_new_tokens=20)
    for _ in stream:
        break
    stream.close()
    got = len(stream.output.tokens)
    asked = len(context.ids) - seen - (got - 1)
    assert context.seen == seen + asked + got - 1  # the last token is chosen, but not read
    assert all(positions.max() == context.seen - 1 for positions in context.kept())


# ---------------------------------------------------------------------- every kernel at once

# The whole engine on Triton's interpreter: chunks beside their slabs, units in the slots of others, replayed steps.
INTERPRETED = """
import json, torch
import locret.kernels.append, locret.kernels.attention, locret.kernels.compact, locret.kernels.decode_attention
import locret.kernels.fill, locret.kernels.linear, locret.kernels.rotate
from locret import kernels, prefill
from locret.backbone import Rope
from locret.cache import LayerCache
operators = [getattr(kernels, name) for name in
             ("append", "attention", "compact", "decode_attention", "fill", "linear", "rotate")] + [prefill]
def plain():
    for operator in operators:
        operator.use_triton = lambda kernel, x: False
def interpreted():
    for operator in operators:
        operator.use_triton = lambda kernel, x: True
    Rope.kernel_angles = lambda self, layer, x: self.angles(layer)
filled, fill = [], LayerCache.fill
LayerCache.fill = lambda held, choice: (filled.append(held), fill(held, choice))
from test_graph import *
from locret.fused import recognise
plain()
backbone = Backbone(build_tiny_model("llama", head_dim=64, num_attention_heads=4))
config = CacheConfig(budget=22, chunk_size=12, num_sinks=2, num_stabilizers=3, local_window=3, decode_interval=4)
method, text = method_of("locret", backbone), words(2, 44)
want, cache = decode(backbone, method, config, text[:, :31], text[:, 31:], graph=False)
interpreted()
backbone.fused = recognise(backbone)
got, mine = decode(backbone, method, config, text[:, :31], text[:, 31:], graph=True)
print(json.dumps([backbone.fused is not None, len(filled), float((got - want).norm() / want.norm()),
    all(torch.equal(a.positions(), b.positions()) for a, b in zip(cache.layers, mine.layers, strict=True))]))
"""


@pytest.mark.triton_interpret
def test_all_kernels_together_give_what_torch_gives():
    """Each was right alone when compaction in place lost new units in a slab that was not full yet."""
    fused, filled, error, same = interpret(INTERPRETED)
    assert fused
    assert filled == 4
    assert same
    assert error < 1e-4
