"""Units in the slots of those that go: the same units as when all of them move up, in another order until the end."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_model
from oracles import method_of, reader_of, tokens
from triton_programs import compile_only, interpret

from locret import prefill
from locret.backbone import Backbone, Rope
from locret.cache import LayerCache
from locret.graph import StepGraph
from locret.kernels.compact import Column, others, reference_compact
from locret.kernels.decode_attention import Angles
from locret.kernels.fill import fill
from locret.kernels.rotate import rotate
from locret.kernels.switch import use_triton
from locret.prefill import ChunkPass

SMALL = dict(budget=40, chunk_size=16, num_sinks=2, num_stabilizers=6, local_window=5, decode_interval=4)

# (B, Hkv, held, new, D); of each as many stay as are held
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 40, 9, 24), (1, 2, 150, 60, 128), (2, 2, 20, 50, 8), (1, 3, 130, 1, 5)]
KINDS = ["random", "none is new", "all are new"]


def table(shape, kind, device="cpu"):
    """Two columns in views of larger memory, slots, and which units stay."""
    batch, heads, held, new, dim = shape
    g = torch.Generator().manual_seed(sum(shape))
    columns = []
    for tail, dtype in (((dim,), torch.bfloat16), ((2, 3), torch.uint8)):
        slab = torch.randint(0, 200, (batch, heads + 1, held + 5, *tail), generator=g).to(dtype).to(device)
        chunk = torch.randint(0, 200, (batch, new, heads, *tail), generator=g).to(dtype).to(device).transpose(1, 2)
        columns.append(Column(slab[:, :heads, 2 : 2 + held], chunk, slab[:, :heads, 2:]))
    key = torch.rand(batch, heads, held + new, generator=g)
    if kind != "random":
        key[..., held:] += 2.0 if kind == "all are new" else -2.0
    keep = key.argsort(-1, descending=True)[..., :held].sort(-1).values
    slots = torch.rand(batch, heads, held, generator=g).argsort(-1).int()
    return columns, slots.to(device), keep.to(device), others(keep, held + new).to(device)


def in_order(column, slots):
    """The held units of a column, by position: [B, Hkv, held, ...]."""
    rows = [[column.out[b, h][slots[b, h].long()] for h in range(slots.shape[1])] for b in range(slots.shape[0])]
    return torch.stack([torch.stack(row) for row in rows])


def check(columns, slots, keep, dropped, run):
    """`run`, and what then lies where the slots say is what a move would have left; nothing else was touched."""
    held = slots.shape[2]
    before = [(in_order(column, slots), column.out[:, :, held:].clone()) for column in columns]
    taken = run(columns, slots, keep, dropped)
    reference_compact([Column(slots, taken, slots)], keep)
    right = torch.equal(slots.sort(-1).values, torch.arange(held).to(slots).expand_as(slots))
    for column, (units, behind) in zip(columns, before, strict=True):
        want = torch.empty_like(units)
        reference_compact([Column(units, column.new, want)], keep)
        right = right and torch.equal(in_order(column, slots), want)
        right = right and torch.equal(column.out[:, :, held:], behind)
    return right


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_new_units_take_the_slots_of_those_that_go(shape, kind):
    assert check(*table(shape, kind), fill)


def turned(dtype=torch.float32, device="cpu"):
    """x, angles, slots, and x rotated token by token."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 70, 16, generator=g).to(device, dtype)
    angle = torch.rand(100, 6, generator=g).to(device, dtype)  # 12 of 16 channels turn
    angles = Angles(angle.cos(), angle.sin())
    slots = torch.rand(2, 3, 70, generator=g).argsort(-1).int().to(device)
    want = torch.empty_like(x)
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(70)).tolist():
        slot = int(slots[b, h, t])
        one = x[b, h, slot][None, None, None]
        want[b, h, slot] = angles.rotate(one, torch.tensor([[[9 + t]]], device=device))[0, 0, 0]
    return x, angles, slots, want


def test_tokens_in_slots_turn_by_their_order():
    x, angles, slots, want = turned()
    out = rotate(x, angles, 9, torch.full_like(x, float("nan")), slots)
    torch.testing.assert_close(out, want)


# In a process of its own: triton reads the environment when it is imported.
INTERPRETED = """
import json, torch
from locret.kernels.fill_triton import fill_triton
from locret.kernels.rotate_triton import rotate_triton
from test_fill import KINDS, SHAPES, check, table, turned
out = {f"{shape} {kind}": check(*table(shape, kind), fill_triton) for shape in SHAPES for kind in KINDS}
x, angles, slots, want = turned()
got = rotate_triton(x, angles, 9, torch.full_like(x, float("nan")), slots)
out["turn"] = torch.allclose(got, want, atol=1e-6)
print(json.dumps(out))
"""


@pytest.mark.triton_interpret
def test_the_interpreted_kernels_do_the_same():
    found = interpret(INTERPRETED)
    assert len(found) == len(SHAPES) * len(KINDS) + 1
    assert not [name for name, right in found.items() if not right]


# Triton's compiler needs no GPU to make a binary for one.
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from locret.kernels.fill_triton import _fill
types = dict(news=("*bf16", "*bf16"), outs=("*bf16", "*bf16"), strides=(("i32",) * 6,) * 2, slots_ptr="*i32")
types |= dict(keep_ptr="*i64", dropped_ptr="*i64", taken_ptr="*i32", heads="i32", held="i32", count="i32")
fixed = dict(WIDTHS=(128, 128), BLOCKS=(128, 128), UNITS=32, COUNTED=4096)
signature = {name: types.get(name, "constexpr") for name in _fill.arg_names}
source = ASTSource(fn=_fill, signature=signature, constexprs=fixed)
for capability in (80, 90):
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    print(made.metadata.shared)
"""


@pytest.mark.triton_interpret
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(tmp_path):
    assert all(int(shared) <= 48 * 1024 for (shared,) in compile_only(COMPILED, tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 8, 16_384, 3072, 128)], ids=str)
def test_fill_on_a_gpu(shape, kind, monkeypatch):
    monkeypatch.setenv("LOCRET_TRITON", "compact")
    assert check(*table(shape, kind, device="cuda"), fill)


@pytest.mark.gpu
def test_tokens_in_slots_turn_on_a_gpu(monkeypatch):
    monkeypatch.setenv("LOCRET_TRITON", "rotate")
    x, angles, slots, want = turned(device="cuda")
    torch.testing.assert_close(rotate(x, angles, 9, torch.full_like(x, float("nan")), slots), want)


# ---------------------------------------------------------------------- the engine


@pytest.fixture(scope="module")
def backbone():
    return Backbone(build_tiny_model("llama", max_position_embeddings=4096))


@pytest.fixture
def filled(monkeypatch):
    """Readers fill slots on the CPU too, by the torch paths; how often they did."""
    monkeypatch.setattr(prefill, "use_triton", lambda kernel, x: True)
    monkeypatch.setattr(Rope, "kernel_angles", lambda rope, layer, x: rope.angles(layer))
    counted, run = [], LayerCache.fill
    monkeypatch.setattr(LayerCache, "fill", lambda held, choice: (counted.append(held), run(held, choice))[1])
    return counted


def moved(monkeypatch):
    """From here on units move up, as they do where no kernel finds slots."""
    monkeypatch.setattr(ChunkPass, "_fills", lambda chunk, held, view: False)


def close(reader, twin):
    for mine, theirs in zip(reader.cache.layers, twin.cache.layers, strict=True):
        a, b = mine.units().tensors(), theirs.units().tensors()
        assert all(torch.equal(a[name], b[name]) for name in ("position", "protected"))
        assert all(torch.allclose(a[name].float(), b[name].float(), atol=1e-5) for name in a)
        assert mine.held == theirs.held
        assert mine.evicted == theirs.evicted


@torch.inference_mode()
@pytest.mark.parametrize("storage", ["dense", "int8"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["locret", "knorm"])
def test_the_same_units_stay(backbone, name, batch, storage, filled, monkeypatch):
    method, ids, steps = method_of(name, backbone), tokens(230, batch=batch), tokens(9, batch=batch, seed=3)
    ends = []
    for fills in (True, False):
        if not fills:
            moved(monkeypatch)
        reader = reader_of(backbone, method, 230, batch=batch, storage=storage, **SMALL)
        found = [reader.read(ids[:, :200], more=True), reader.read(ids[:, 200:])]
        assert all(layer.slots is None for layer in reader.cache.layers)
        ends.append((reader, found + [reader.step(step) for step in steps.T]))
        assert len(filled) >= 13 * backbone.num_layers
    (reader, got), (twin, want) = ends
    close(reader, twin)
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(got, want, strict=True))


@torch.inference_mode()
def test_units_that_do_not_fill_a_layer_move_up(backbone, filled):
    """From the chunk that first overflows on they have slots to take, and short chunks have, too."""
    reader = reader_of(backbone, "knorm", 60, **SMALL)
    for done, _ in reader.chunks(tokens(60)):
        assert len(filled) == {16: 0, 32: 0, 48: 0, 55: 1, 60: 2}[done] * backbone.num_layers


@torch.inference_mode()
def test_whoever_looks_in_between_sees_units_in_order(backbone, filled, monkeypatch):
    text = tokens(230)
    seen = []
    for looks in (False, True):
        reader = reader_of(backbone, "knorm", 230, **SMALL)
        for done, _ in reader.chunks(text):
            if looks and 100 < done < 225:  # the last token before the window fits the spare slot: it is appended
                assert reader.cache.layers[0].slots is not None
                twin = reader.copy()
                assert all(torch.equal(a.units().k, b.units().k)
                           for a, b in zip(twin.cache.layers, reader.cache.layers, strict=True))  # fmt: skip
                assert all(layer.slots is None for layer in twin.cache.layers)
        seen.append(reader)
    close(*seen)
    moved(monkeypatch)
    last = reader_of(backbone, "knorm", 230, **SMALL)
    last.read(text)
    close(seen[0], last)


@torch.inference_mode()
@pytest.mark.parametrize(("steps", "graph"), [(0, False), (1, False), (2, True)])
def test_a_prompt_that_was_given_up_can_be_gone_on_from(backbone, steps, graph, filled, monkeypatch):
    text, ends = tokens(230), []
    for fills in (True, False):
        if not fills:
            moved(monkeypatch)
        reader = reader_of(backbone, "knorm", 230, **SMALL)
        for done, _ in reader.chunks(text):
            if done == 96:
                break
        assert (reader.cache.layers[0].slots is not None) == fills
        if graph:
            reader._graph = StepGraph.of(reader, capture=False)
        found = [reader.step(text[:, 96]) for _ in range(steps)]
        ends.append((reader, *found, reader.follow(text[:, 97:120]), reader.follow(text[:, 120:121])))
    (reader, *got), (twin, *want) = ends
    close(reader, twin)
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(got, want, strict=True))


@torch.inference_mode()
def test_slots_are_counted_while_they_are_there(backbone, filled):
    reader = reader_of(backbone, "knorm", 230, **SMALL)
    before = reader.cache.nbytes
    for done, _ in reader.chunks(tokens(230)):
        slots = 4 * SMALL["budget"] * backbone.num_kv_heads * backbone.num_layers
        assert reader.cache.nbytes == before + (slots if 48 < done < 225 else 0)
    assert reader.cache.peak_bytes > before + slots


def test_no_kernel_no_slots(backbone):
    assert not use_triton("compact", torch.zeros(1))
    reader = reader_of(backbone, "knorm", 200, **SMALL)
    with torch.inference_mode():
        for _ in reader.chunks(tokens(200)):
            assert all(layer.slots is None for layer in reader.cache.layers)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.8), (torch.float32, 0.99)])
@pytest.mark.parametrize("name", ["locret", "knorm", "random"])
def test_a_prompt_read_on_a_gpu(name, dtype, share, monkeypatch):
    """The same bits each time, and nearly always the units that stay where all of them move up.

    In bfloat16 another order of sums is felt: on a CPU, by the torch paths, 86 % are the same in the fourth layer, and
    all in float32.
    """
    model = build_tiny_model("llama", head_dim=64, num_hidden_layers=4, max_position_embeddings=32_768)
    backbone = Backbone(model.to("cuda", dtype))
    method = method_of(name, backbone)
    if hasattr(method, "heads"):
        method.heads.to("cuda", dtype)
    ids = tokens(20_000).cuda()
    options = dict(budget=4096, chunk_size=2048, num_stabilizers=64, local_window=64)

    def read():
        with torch.inference_mode():
            reader = reader_of(backbone, method, ids.shape[1], **options)
            logits = reader.read(ids)
        return [logits, *(x for layer in reader.cache.layers for x in layer.units())]

    want = [read() for _ in range(2)][1]  # twice: compiled
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(read(), want, strict=True))
    moved(monkeypatch)
    mine, theirs = ([x for x in units if x.dtype == torch.int32] for units in (want, read()))
    assert torch.equal(mine[0], theirs[0]), "the first layer's do not depend on any sum"
    rows = [(a, b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x[0], y[0], strict=True)]
    assert min(torch.isin(a, b).float().mean() for a, b in rows) > share
