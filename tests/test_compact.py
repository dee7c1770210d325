"""Compaction: which units stay equals ten plain lines of Python, and every column moves with them, also in place."""

from __future__ import annotations

import pytest
import torch
from triton_programs import compile_only, interpret

from locret.cache import KVCache, Packed, Units
from locret.errors import ConfigError
from locret.kernels import switch
from locret.kernels.compact import (
    Candidates,
    Column,
    compact,
    kept,
    kept_beside,
    others,
    pin,
    reference_compact,
    reference_kept,
)
from locret.kernels.switch import use_triton
from locret.select import reference_keep, select

# name -> (scores [B, Hkv, S], pinned, budget)
LENGTHS = (1, 2, 63, 128, 129, 500)


def cases():
    g = torch.Generator().manual_seed(0)
    made = {}
    for s in LENGTHS:
        for budget in sorted({1, s // 2, s - 1, s} - {0}):
            scores = torch.randn(1, 2, s, generator=g)
            made[f"random {budget} of {s}"] = scores, torch.rand(1, 2, s, generator=g) < 0.2 * budget / s, budget
    s, none = 200, torch.zeros(2, 1, 200, dtype=torch.bool)
    rough = torch.randint(-2, 3, (2, 1, s), generator=g).float()
    made["ties"] = rough, torch.rand(2, 1, s, generator=g) < 0.1, 100
    made["signed zeros"] = torch.where(rough > 0, 0.0, -0.0), none, 100
    made["all equal"] = torch.full((2, 1, s), -3.5), none, 77
    made["all pinned"] = rough, ~none, s
    made["as many pins as units that stay"] = rough, (torch.arange(s) % 3 == 0).expand(2, 1, s).clone(), 100
    made["mostly -inf"] = rough.masked_fill(torch.rand(2, 1, s, generator=g) < 0.9, float("-inf")), none, 150
    made["+inf loses to a pin"] = torch.full((2, 1, s), float("inf")), torch.arange(s).expand(2, 1, s) >= 190, 20
    made["extremes"] = rough * torch.tensor([1e-45, 3e38]).repeat(100), none, 120
    made["half precision"] = rough.bfloat16() / 3, none, 120
    return made


CASES = cases()
LONG = {name: case for name, case in CASES.items() if case[0].shape[2] > 128}  # shorter rows are one block in any way


def pieces():
    """name -> old and new units as they lie in a slab and come from heads, budget, pins."""
    g = torch.Generator().manual_seed(7)
    made = {}
    for held, count, budget, sinks, newest in (
        (100, 40, 100, 4, 10), (128, 128, 128, 0, 0), (200, 1, 200, 3, 20), (1, 150, 90, 1, 0), (90, 60, 20, 4, 16)
    ):  # fmt: skip
        shape = 2, 3, held + 50
        position = torch.arange(shape[2]).expand(shape) * 2
        slab = [torch.randn(shape, generator=g), position.clone(), torch.rand(shape, generator=g) < 0.02]
        old = Candidates(*(x[:, :, :held] for x in slab))
        score = torch.randn(2, count, 3, generator=g).transpose(1, 2)
        at, marked = torch.arange(1000, 1000 + count), torch.rand(count, generator=g) < 0.02
        new = Candidates(score, at.expand(2, 3, count), marked.expand(2, 3, count))
        pins = dict(num_sinks=sinks, num_newest=newest)
        made[f"{held} + {count}"] = old, new, budget, pins
        for bad in (float("nan"), float("inf")) if count == 40 else ():
            broken = score.clone()
            broken[1, 2, count // 2] = bad
            made[f"{held} + {count}, {bad}"] = old, new._replace(score=broken), budget, pins
    return made


PIECES = pieces()


@pytest.mark.parametrize("name", PIECES)
def test_kept_beside_is_kept_of_both_with_pins(name):
    old, new, budget, pins = PIECES[name]
    score, position, protected = (torch.cat(both, 2) for both in zip(old, new, strict=True))
    pinned = pin(protected, num_sinks=pins["num_sinks"], num_newest=pins["num_newest"], positions=position)
    choice, sound = kept_beside(old, new, budget, **pins)
    assert torch.equal(choice.keep, kept(score, pinned, budget))
    assert choice.dropped is None
    assert torch.equal(sound.isfinite(), new.score.isfinite().all(-1))


@pytest.mark.parametrize("name", CASES)
def test_others_are_those_that_go(name):
    scores, pinned, budget = CASES[name]
    keep = kept(scores, pinned, budget)
    dropped = others(keep, scores.shape[2])
    for stays, goes in zip(keep.flatten(0, 1).tolist(), dropped.flatten(0, 1).tolist(), strict=True):
        assert goes == [unit for unit in range(scores.shape[2]) if unit not in stays]


@pytest.mark.parametrize("name", CASES)
def test_kept_is_the_plain_reading(name):
    scores, pinned, budget = CASES[name]
    got = reference_kept(scores, pinned, budget)
    assert got.dtype == torch.int64
    assert got.tolist() == reference_keep(scores.float(), budget, pinned)


def test_kept_is_what_select_keeps_where_scores_differ():
    g = torch.Generator().manual_seed(1)
    scores = torch.stack([torch.randperm(500, generator=g) for _ in range(6)]).view(2, 3, 500).float() - 250
    pinned = torch.rand(2, 3, 500, generator=g) < 0.1
    for budget in (80, 200, 500):
        assert torch.equal(kept(scores, pinned, budget), select(scores, budget, pinned))


def test_of_equal_scores_the_older_units_stay():
    scores = torch.tensor([[[1.0, 5, 1, 1, 7, 1]]])
    pinned = torch.tensor([[[False, False, False, False, False, True]]])
    assert kept(scores, pinned, 4).tolist() == [[[0, 1, 4, 5]]]


def test_nan_scores_still_keep_units_of_the_row():
    scores = torch.full((1, 2, 50), float("nan"))
    scores[0, 0, 10:] = 0
    pinned = torch.arange(50).expand(1, 2, 50) == 49
    got = kept(scores, pinned, 11)
    assert got[0, 0].tolist() == [*range(10), 49]
    assert got[0, 1].tolist() == [*range(10), 49]


# ---------------------------------------------------------------------- moving

# (B, Hkv, held, new, b, D)
MOVES = [(1, 1, 1, 0, 1, 1), (2, 3, 40, 0, 17, 8), (2, 3, 40, 9, 40, 24), (1, 2, 150, 60, 140, 128),
         (2, 1, 0, 30, 9, 5), (1, 1, 600, 50, 590, 3),
         (2, 3, 20, 15, 35, 8)]  # fmt: skip  # all stay: new units whose slot is their index are not there yet
NAN = float("nan")


def table(shape, *, place, dtype=torch.bfloat16, device="cpu"):
    """Columns like a layer's, in views of larger memory full of NaN, and where units go."""
    batch, heads, held, new, b, dim = shape
    g = torch.Generator().manual_seed(sum(shape))
    columns = []
    for tail, kind in ((dim,), dtype), ((dim,), dtype), ((), torch.float32), ((), torch.int64), ((), torch.bool), (
        (2,), torch.float32), ((0,), torch.float32):  # fmt: skip
        poison = 1 if kind in (torch.bool, torch.int64) else NAN

        def make(n, tail=tail, kind=kind, poison=poison):
            whole = torch.full((batch, heads + 1, max(n, b) + 5, *tail), poison, dtype=kind)
            values = torch.randn(batch, heads, n, *tail, generator=g)
            whole[:, :heads, 2 : n + 2] = (values > 0) if kind == torch.bool else (values * 1000).to(kind)
            return whole.to(device)

        slab, chunk = make(held), make(new)
        out = slab if place else torch.full_like(slab, poison)
        columns.append(
            Column(slab[:, :heads, 2 : 2 + held], chunk[:, :heads, 2 : 2 + new] if new else None, out[:, :heads, 2:])
        )
    keep = torch.rand(batch, heads, held + new, generator=g).argsort(-1)[..., :b].sort(-1).values
    return columns, keep.to(device)


def wanted(columns, keep):
    """Row by row."""
    rows = []
    for old, new, _ in columns:
        both = (old if new is None else torch.cat((old, new), 2)).clone()
        rows.append(torch.stack([torch.stack([both[i, h][keep[i, h]] for h in range(keep.shape[1])])
                                 for i in range(keep.shape[0])]))  # fmt: skip
    return rows


def same(a, b):
    return torch.equal(torch.nan_to_num(a.float(), 12345.0), torch.nan_to_num(b.float(), 12345.0))


def untouched(columns, keep):
    """What lies behind the kept units in `out`, before a move."""
    return [out[:, :, keep.shape[2] :].clone() for _, _, out in columns]


@pytest.mark.parametrize("place", [True, False])
@pytest.mark.parametrize("shape", MOVES, ids=str)
def test_every_column_moves(shape, place):
    columns, keep = table(shape, place=place)
    want = wanted(columns, keep)
    compact(columns, keep)
    for (_, _, out), rows in zip(columns, want, strict=True):
        assert same(out[:, :, : keep.shape[2]], rows)


@pytest.mark.parametrize("storage", ["dense", "int4"])
def test_compacting_a_layers_slab_in_place_is_append_and_keep(storage):
    """No workspace: the chunk stays where it is, and what survives of slab and chunk moves into the slab."""
    g = torch.Generator().manual_seed(4)

    def units(n, start):
        k, v = (torch.randn(2, 3, n, 32, generator=g).bfloat16() for _ in range(2))
        position = torch.arange(start, start + n, dtype=torch.int32).expand(2, 3, n)
        return Units(k, v, torch.randn(2, 3, n, generator=g), position, position < 3)

    cache = KVCache(windows=[None], batch=2, num_kv_heads=3, head_dim=32, capacity=20, chunk_size=12,
                    dtype=torch.bfloat16, device=torch.device("cpu"), storage=storage)  # fmt: skip
    first, chunk = units(20, 0), units(12, 20)
    cache.append(0, first)
    layer = cache.layers[0]
    layer.settle()
    twin = layer.copy()
    both = cache.append(0, chunk)
    keep = kept(both.score, both.protected, 20)
    layer.keep(keep)

    new = chunk
    if storage != "dense":
        store = cache.stores[0]
        k, v = store.k.encode(chunk.k), store.v.encode(chunk.v)
        new = Packed(store, k, v, {name: x for name, x in chunk.tensors().items() if name not in "kv"})
    slab, theirs = twin.slab.tensors(), new.tensors()
    compact([Column(slab[name][:, :, :20], theirs[name], slab[name]) for name in slab], keep)
    for name, column in layer.slab.tensors().items():
        assert torch.equal(slab[name], column), name


# In a process of its own: triton reads the environment when it is imported.
INTERPRETED = """
import json, torch
from locret.kernels import compact_triton
from locret.select import reference_keep
from locret.kernels.compact import kept_beside
from test_compact import CASES, LONG, MOVES, PIECES, same, table, untouched, wanted
out = {}
for way, *sizes in (("parts", 2**15, 2**12, 128), ("walked", 128, 2**12, 1024), ("blocks", 2**15, 128, 1024)):
    compact_triton.HELD, compact_triton.BLOCK, compact_triton.PART = sizes
    for name, (scores, pinned, budget) in (CASES if way == "parts" else LONG).items():
        place = torch.full((*scores.shape[:2], budget), -1)
        got = compact_triton.kept_triton(scores, pinned, budget, place)
        out[f"kept {name} {way}"] = got.tolist() == reference_keep(scores.float(), budget, pinned)
    for name, (old, new, budget, pins) in PIECES.items():
        place = torch.full((*old.score.shape[:2], budget), -1)
        going = torch.full((*old.score.shape[:2], old.score.shape[2] + new.score.shape[2] - budget), -1)
        got, sound = compact_triton.kept_beside_triton(old, new, budget, *pins.values(), place, going)
        want, wanted_sound = kept_beside(old, new, budget, **pins, drops=True)
        right = torch.equal(sound.isfinite(), wanted_sound.isfinite())
        out[f"pieces {name} {way}"] = right and torch.equal(got, want.keep) and torch.equal(going, want.dropped)
for tile in (compact_triton.TILE_BYTES, 512):  # one block, and many that overlap in place
    compact_triton.TILE_BYTES = tile
    for shape in MOVES:
        for place in (True, False):
            columns, keep = table(shape, place=place)
            want, rest = wanted(columns, keep), untouched(columns, keep)
            compact_triton.compact_triton(columns, keep)
            b = keep.shape[2]
            out[f"move {shape} {place} {tile == 512}"] = all(
                same(column.out[:, :, :b], rows) and (same(column.out[:, :, b:], behind))
                for column, rows, behind in zip(columns, want, rest, strict=True)
            )
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def interpreted():
    return interpret(INTERPRETED)


@pytest.mark.triton_interpret
def test_the_interpreted_kernels_equal_the_plain_reading(interpreted):
    wrong = [name for name, right in interpreted.items() if not right]
    assert not wrong
    assert len(interpreted) == len(CASES) + 2 * len(LONG) + 3 * len(PIECES) + 4 * len(MOVES)


# Triton's compiler needs no GPU to make a binary for one.
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from locret.kernels.compact_triton import _keys, _move, _threshold, _write
def build(kernel, types, fixed, warps):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 1})
    print(made.metadata.shared, made.asm["ptx"].count("bar.sync"))
pieces = ("*fp32", "*u8", "*i64")
types = dict(olds=pieces, news=pieces, strides=(("i32",) * 6,) * 3, work_ptr="*i32", keep_ptr="*i64")
types |= dict.fromkeys(("heads", "held", "s", "budget", "sinks", "newest", "padded", "parts"), "i32")
types |= dict(dropped_ptr="*i64", sound_ptr="*fp32")
build(_keys, types, dict(NEW=True, PIN=True, PART=1024), 4)
for blocks in (5, 0):
    build(_threshold, types, dict(NEW=True, PART=1024, PARTS=32, BLOCK=4096, BLOCKS=blocks), 16)
build(_write, types, dict(DROP=True, PART=1024, PARTS=32), 4)
pointers = ("*bf16", "*bf16", "*fp32", "*i64", "*u8")
types = dict(olds=pointers, news=pointers, outs=pointers, strides=(("i32",) * 9,) * 5, keep_ptr="*i64")
types |= dict(heads="i32", b="i32", held="i32")
for place in (True, False):
    build(_move, types, dict(WIDTHS=(128, 128, 1, 1, 1), SLICES=(32, 32, 1, 1, 1), BLOCKS=(512, 512, 1024, 1024, 1024),
          FIRST=(0, 4, 8, 9, 10, 11), IN_PLACE=place, NEW=True), 8)
"""


@pytest.mark.triton_interpret
def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    """Within a multiprocessor's memory; in place there is a barrier between loads and stores."""
    lines = [[int(word) for word in line] for line in compile_only(COMPILED, tmp_path)]
    assert len(lines) == 6
    assert all(shared <= 99 * 1024 for shared, _ in lines)
    assert lines[4][1] >= lines[5][1] + 5, "a barrier a column"


# ---------------------------------------------------------------------- the switch


def test_the_switch_chooses_kernels(monkeypatch):
    class OnDevice:
        is_cuda = True

    monkeypatch.setattr(switch, "_installed", lambda: True)
    monkeypatch.delenv("LOCRET_TRITON", raising=False)
    assert use_triton("compact", OnDevice)
    assert not use_triton("compact", torch.zeros(1))
    monkeypatch.setenv("LOCRET_TRITON", "none")
    assert not use_triton("compact", OnDevice)
    monkeypatch.setenv("LOCRET_TRITON", "compact")
    assert use_triton("compact", OnDevice)
    assert not use_triton("decode_attention", OnDevice)
    monkeypatch.setenv("LOCRET_TRITON", "all")
    assert use_triton("decode_attention", OnDevice)
    monkeypatch.setenv("LOCRET_TRITON", "compakt")
    with pytest.raises(ConfigError, match="did you mean 'compact'"):
        use_triton("compact", OnDevice)


def test_without_triton_the_torch_paths_run_unless_a_kernel_was_asked_for(monkeypatch):
    class OnDevice:
        is_cuda = True

    monkeypatch.setattr(switch, "_installed", lambda: False)
    monkeypatch.delenv("LOCRET_TRITON", raising=False)
    assert not use_triton("compact", OnDevice)
    monkeypatch.setenv("LOCRET_TRITON", "compact")
    with pytest.raises(ConfigError, match="Triton is not installed"):
        use_triton("compact", OnDevice)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kept_on_a_gpu(name, monkeypatch):
    monkeypatch.setenv("LOCRET_TRITON", "compact")
    scores, pinned, budget = CASES[name]
    assert torch.equal(kept(scores.cuda(), pinned.cuda(), budget).cpu(), reference_kept(scores, pinned, budget))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PIECES)
def test_kept_beside_on_a_gpu(name, monkeypatch):
    monkeypatch.setenv("LOCRET_TRITON", "compact")
    old, new, budget, pins = PIECES[name]
    on_gpu = (Candidates(*(x.cuda() for x in units)) for units in (old, new))
    choice, sound = kept_beside(*on_gpu, budget, **pins, drops=True)
    want, _ = kept_beside(old, new, budget, **pins, drops=True)
    assert torch.equal(choice.keep.cpu(), want.keep)
    assert torch.equal(choice.dropped.cpu(), want.dropped)
    assert torch.equal(sound.isfinite().cpu(), new.score.isfinite().all(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("place", [True, False])
@pytest.mark.parametrize("shape", [*MOVES, (2, 8, 16_384, 3072, 16_384, 128)], ids=str)
def test_moves_on_a_gpu(shape, place, monkeypatch):
    monkeypatch.setenv("LOCRET_TRITON", "compact")
    columns, keep = table(shape, place=place, device="cuda")
    twin, _ = table(shape, place=place, device="cuda")
    compact(columns, keep)
    reference_compact(twin, keep)
    for mine, theirs in zip(columns, twin, strict=True):
        assert same(mine.out, theirs.out)
