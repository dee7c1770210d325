"""Attention over fixed slots: every path equals one float64 reading, which is checked by a plain loop itself."""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import dataclass

import pytest
import torch
from triton_programs import compile_only, interpret

from locret.cache import KVCache, Units
from locret.kernels.attention import prefix_causal_attention, reference_attention
from locret.kernels.decode_attention import (
    Angles,
    Codes,
    Span,
    angles_of,
    decode_attention,
    reference_decode_attention,
    torch_decode_attention,
)
from locret.kernels.scattered import Scattered, addresses
from locret.select import select_across_heads
from locret.storage import Affine

NAN = float("nan")
# relative to the largest value of the output: bf16 rounds rotated keys and weights to 8 bits
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


@dataclass(frozen=True)
class Case:
    batch: int = 2
    heads: tuple[int, int] = (4, 2)  # query, KV
    t: int = 1
    slots: int = 100
    dim: int = 16
    rotated: int | None = None  # channels
    interleaved: bool = False
    left: bool = False  # padded
    right: bool = False
    offset: bool = False  # positions
    softcap: float | None = None
    bias: bool = False
    bits: int | None = None
    group: int | None = None


CASES = [
    Case(),
    Case(slots=1, dim=1, heads=(1, 1)),
    Case(slots=1000, dim=128, heads=(8, 2), batch=1, rotated=128),
    Case(slots=63, dim=96, heads=(3, 3), rotated=96, left=True),
    Case(slots=130, dim=80, heads=(6, 1), rotated=32, right=True),
    Case(slots=130, dim=24, rotated=24, interleaved=True, left=True, right=True, offset=True),
    Case(slots=130, dim=20, rotated=8, interleaved=True, offset=True),
    Case(slots=65, dim=17, t=3, left=True),
    Case(slots=65, dim=32, t=5, heads=(8, 2), rotated=32, left=True, right=True, offset=True, bias=True, softcap=3.0),
    Case(slots=200, dim=16, bias=True),
    Case(slots=200, dim=16, softcap=2.0, right=True),
    Case(slots=300, dim=64, rotated=64, bits=8, right=True),
    Case(slots=300, dim=64, rotated=64, bits=4, left=True, offset=True, t=2),
    Case(slots=70, dim=96, rotated=96, bits=4, bias=True),
    Case(slots=70, dim=80, rotated=32, bits=4),
    Case(slots=70, dim=32, rotated=16, bits=8, interleaved=True, right=True),
    Case(slots=70, dim=32, rotated=32, bits=4, interleaved=True),
    Case(slots=70, dim=32, bits=4, heads=(4, 4)),
    Case(slots=90, dim=128, rotated=128, bits=4, heads=(4, 1)),
    Case(slots=90, dim=128, rotated=128, bits=8, heads=(4, 1), left=True),
    # what `decode_codes_triton` takes in bfloat16, and what it leaves to the others
    Case(slots=100, dim=128, rotated=128, bits=4, heads=(8, 2), t=3, left=True, right=True, offset=True, group=64),
    Case(slots=70, dim=64, rotated=64, bits=8, t=2, right=True, bias=True, softcap=3.0, group=8, batch=1),
    Case(slots=130, dim=128, rotated=128, bits=8, heads=(8, 1), t=2, right=True, bias=True, softcap=3.0, batch=1),
    Case(slots=130, dim=128, bits=4, heads=(8, 1), bias=True, softcap=3.0, batch=1),
    Case(slots=40, dim=256, rotated=256, bits=4, left=True, batch=1),
    Case(slots=40, dim=256, bits=8, right=True, group=64, batch=1),
    Case(slots=3, dim=128, rotated=128, bits=4, t=3, batch=1),
    Case(slots=40, dim=128, rotated=64, bits=4, batch=1),
    Case(slots=40, dim=128, rotated=128, bits=8, group=128, batch=1),
]


def inputs(case, dtype, device="cpu"):
    """Arguments. Tensors are views of larger ones, all of it NaN where no unit lies."""
    g = torch.Generator().manual_seed(CASES.index(case) if case in CASES else 0)
    (hq, hkv), b, s, t, d = case.heads, case.batch, case.slots, case.t, case.dim

    def inside(x):
        whole = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 3, *x.shape[3:]),
                           NAN if x.is_floating_point() else 255, dtype=x.dtype)  # fmt: skip
        whole[:, :-1, 2:-1] = x
        return whole.to(device)[:, :-1, 2:-1]

    first = torch.randint(0, s // 2, (b, hkv), generator=g) if case.left and s > 1 else None
    stop = torch.randint(s // 2 + t, s + 1, (b, hkv), generator=g) if case.right else None
    span = Span(*(None if x is None else x.to(device) for x in (
        first, stop, torch.randint(0, 9, (b,), generator=g) if case.offset else None)))  # fmt: skip
    slot = torch.arange(s)
    used = (slot >= (0 if first is None else first[..., None])) & (slot < (s if stop is None else stop[..., None]))
    used = used.expand(b, hkv, s)
    k, v = (torch.randn(b, hkv, s, d, generator=g).to(dtype) for _ in range(2))
    if case.bits:
        stored = [Affine(case.bits, case.group).encode(x).parts for x in (k, v)]
        k, v = (Codes(inside(x["codes"]), inside(x["scale"].masked_fill(~used[..., None], NAN)),
                      inside(x["zero"].masked_fill(~used[..., None], NAN)), case.bits) for x in stored)  # fmt: skip
    else:
        k, v = (inside(x.masked_fill(~used[..., None], NAN)) for x in (k, v))
    angles = None
    if case.rotated:
        theta = torch.arange(s + t + 9)[:, None] * 0.7 ** torch.arange(case.rotated // 2)
        angles = Angles(theta.cos().to(device, dtype), theta.sin().to(device, dtype), case.interleaved)
    bias = None
    if case.bias:
        bias = torch.randn(b, hkv, s, generator=g).masked_fill(torch.rand(b, hkv, s, generator=g) < 0.2, float("-inf"))
        bias[..., -t:] = 0
        bias = inside(bias.masked_fill(~used, NAN))
    q = inside(torch.randn(b, hq, t, d, generator=g).to(dtype))
    return dict(q=q, k=k, v=v, scale=0.4, span=span, angles=angles, softcap=case.softcap, bias=bias)


def error(got, want):
    """Relative to the largest value; infinite if anything is not finite."""
    if not bool(torch.isfinite(got).all()):
        return math.inf
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def by_loop(q, k, v, scale, span, angles, softcap, bias):
    """One query and one slot at a time, complex numbers for pairs."""
    k, v = ((x.decode() if isinstance(x, Codes) else x).double() for x in (k, v))
    first, stop, position = (x.tolist() for x in span.bounds(k))
    q, out = q.double(), torch.zeros(q.shape, dtype=torch.float64)

    def turn(x, at):
        if angles is None:
            return x
        turned, rest = x[: 2 * angles.cos.shape[1]], x[2 * angles.cos.shape[1] :]
        pairs = turned.view(-1, 2) if angles.interleaved else turned.view(2, -1).T
        z = torch.view_as_complex(pairs.contiguous())
        z = torch.view_as_real(z * torch.complex(angles.cos[at].double(), angles.sin[at].double()))
        return torch.cat((z.flatten() if angles.interleaved else z.T.flatten(), rest))

    for i, hq, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        h = hq // (q.shape[1] // k.shape[1])
        end = stop[i][h] - (q.shape[2] - 1 - t)
        start, base = first[i][h], position[i][0]
        query = turn(q[i, hq, t], base + end - 1 - start)
        logits = torch.stack([query @ turn(k[i, h, s], base + s - start) for s in range(start, end)]) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias[i, h, start:end]
        out[i, hq, t] = logits.softmax(0) @ v[i, h, start:end]
    return out


@pytest.mark.parametrize("case", [case for case in CASES if case.slots <= 130], ids=str)
def test_the_reference_is_the_definition(case):
    given = inputs(case, torch.float32)
    assert error(reference_decode_attention(**given), by_loop(**given)) < 1e-12


def test_without_options_the_reference_is_the_one_of_prefill():
    given = inputs(CASES[0], torch.float32)
    want = reference_attention(given["q"], given["k"], given["v"], scale=0.4)
    assert error(reference_decode_attention(**given), want) < 1e-12


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_torch_path_equals_the_reference(case, dtype):
    given = inputs(case, dtype)
    got = decode_attention(**given)
    assert got.dtype == dtype
    assert error(got, reference_decode_attention(**given)) < TOLERANCE[dtype] * (2 if case.bits else 1)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_decode_as_storage_does(bits):
    stored = Affine(bits).encode(torch.randn(2, 3, 40, 96).bfloat16())
    codes = Codes(stored.parts["codes"], stored.parts["scale"], stored.parts["zero"], bits)
    assert torch.equal(codes.decode(), Affine(bits).decode(stored))
    assert codes.head_dim == 96


def test_a_head_without_units_and_one_whose_units_are_all_hidden_give_zeros():
    given = inputs(Case(slots=20), torch.float32)
    stop = torch.tensor([[0, 20], [20, 20]])
    bias = torch.zeros(2, 2, 20)
    bias[1, 1] = float("-inf")
    for attend in (decode_attention, reference_decode_attention):
        out = attend(**given | dict(span=Span(stop=stop), bias=bias))
        assert (out[0, :2] == 0).all()
        assert (out[1, 2:] == 0).all()
        assert (out[0, 2:] != 0).all()
        assert (out[1, :2] != 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("family", "interleaved"), [("llama", False), ("phi3", False), ("glm", True), ("cohere", True)]
)
def test_a_familys_own_rotation_is_found(family, interleaved, dtype):
    """Tables as its rotary module makes them: GLM's and Cohere's pairs are neighbours, their tables differ."""
    apply = importlib.import_module(f"transformers.models.{family}.modeling_{family}").apply_rotary_pos_emb
    theta = torch.arange(50)[:, None] * 0.7 ** torch.arange(8)
    table = theta.repeat_interleave(2, -1) if family == "cohere" else torch.cat((theta, theta), -1)
    cos, sin = table.cos().to(dtype), table.sin().to(dtype)
    dim = 16 if family in ("llama", "cohere") else 24  # the others rotate some channels only
    found = angles_of(apply, cos, sin, dim)
    assert found is not None
    assert found.interleaved is interleaved
    x = torch.randn(2, 3, 20, dim).to(dtype)
    want = apply(x, x, cos[None, 5:25], sin[None, 5:25])[0]
    got = found.rotate(x, torch.arange(5, 25).expand(2, 3, 20))
    torch.testing.assert_close(got, want, atol=1e-5 if dtype == torch.float32 else 4e-2, rtol=1e-5)


def test_a_rotation_of_another_kind_is_not_taken_for_one():
    theta = torch.arange(50)[:, None] * 0.7 ** torch.arange(16)
    assert angles_of(lambda q, k, cos, sin: (q * cos + q.flip(-1) * sin, k), theta.cos(), theta.sin(), 16) is None


@pytest.mark.parametrize("storage", ["dense", "int8", "int4"])
def test_it_reads_ragged_layers_as_they_lie_and_gives_what_prefill_gives(storage):
    """Heads padded on the left, in codes or not: the decode step of `prefill` today, against one call."""
    g = torch.Generator().manual_seed(3)
    made = KVCache(windows=[None], batch=2, num_kv_heads=2, head_dim=32, capacity=30, chunk_size=40,
                   dtype=torch.float32, device=torch.device("cpu"), ragged=True, storage=storage)  # fmt: skip
    layer = made.layers[0]

    def units(n, start):
        k, v = (torch.randn(2, 2, n, 32, generator=g) for _ in range(2))
        position = torch.arange(start, start + n).expand(2, 2, n)
        return Units(k, v, torch.rand(2, 2, n, generator=g), position, position < 0)

    scores = made.append(0, units(40, 0)).score
    layer.keep(select_across_heads(scores, 29, torch.zeros_like(scores, dtype=torch.bool), floor=4))
    assert layer.longest > 29
    joined = made.append(0, units(1, 40))
    q = torch.randn(2, 6, 1, 32, generator=g)
    theta = torch.arange(80)[:, None] * 0.7 ** torch.arange(16)
    angles, span = Angles(theta.cos(), theta.sin()), Span(first_unit=layer.padding)
    own = (torch.arange(len(joined)) - layer.padding[..., None]).clamp(min=0)
    hidden = torch.zeros(own.shape).masked_fill(torch.arange(len(joined)) < layer.padding[..., None], float("-inf"))
    want = prefix_causal_attention(angles.rotate(q, own[..., -1:].repeat_interleave(3, 1)),
                                   angles.rotate(joined.k, own), joined.v, scale=0.3, bias=hidden)  # fmt: skip
    torch.testing.assert_close(decode_attention(q, joined.k, joined.v, scale=0.3, span=span, angles=angles), want)
    if storage != "dense":  # the newest unit too as it is stored, as later steps see it
        source, bits = layer._source, int(storage[3:])
        k, v = (Codes(x.parts["codes"], x.parts["scale"], x.parts["zero"], bits) for x in (source.k, source.v))
        want = decode_attention(q, k.decode(), v.decode(), scale=0.3, span=span, angles=angles)
        torch.testing.assert_close(decode_attention(q, k, v, scale=0.3, span=span, angles=angles), want)


def by_table(x):
    """Codes that kernels find by addresses alone: the tensors that are handed over hold zeros."""
    table = addresses(x.parts).unflatten(0, (3, -1))
    return Codes(*(torch.empty_strided(y.shape, y.stride(), dtype=y.dtype).zero_() for y in x.parts), x.bits, table)


SCATTERED = [
    Case(batch=4, slots=70, dim=16),
    Case(batch=3, slots=1100, dim=64, heads=(8, 2), rotated=64),  # several stretches
    Case(batch=5, slots=65, dim=17, heads=(3, 3), softcap=3.0),  # units that begin anywhere
    Case(batch=2, slots=130, dim=24, heads=(6, 1), rotated=24, interleaved=True),
]


def scattered(case, dtype, device="cpu"):
    """Arguments whose rows lie in slabs of their own, and what each row gives by itself. NaN where no unit lies."""
    g = torch.Generator().manual_seed(SCATTERED.index(case))
    hkv, d = case.heads[1], case.dim
    lengths = torch.randint(1, case.slots + 1, (case.batch,), generator=g).tolist()
    lengths[0] = 1
    stop = torch.stack([torch.randint(1, n + 1, (hkv,), generator=g) for n in lengths])
    stop[1] = lengths[1]
    given = inputs(case, dtype, device) | dict(span=Span(stop=stop.to(device)))
    rows = []
    for _ in "kv":
        slabs = [torch.randn(1, hkv, n, d, generator=g).to(dtype) for n in lengths]
        used = [torch.arange(n) < own[:, None] for n, own in zip(lengths, stop, strict=True)]
        rows.append([x.masked_fill(~mask[..., None], NAN).to(device) for x, mask in zip(slabs, used, strict=True)])
    want = torch.cat([
        reference_decode_attention(**given | dict(q=given["q"][i : i + 1], k=rows[0][i], v=rows[1][i],
                                                  span=given["span"].row(i))) for i in range(case.batch)
    ])  # fmt: skip
    k, v = (Scattered(slabs, addresses(slabs).to(device), case.slots) for slabs in rows)
    return given | dict(k=k, v=v), want


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", SCATTERED, ids=str)
def test_rows_that_lie_apart_in_torch(case, dtype):
    given, want = scattered(case, dtype)
    assert error(decode_attention(**given), want) < TOLERANCE[dtype]


# In a process of its own: triton reads the environment when it is imported. Outputs are poisoned with NaN, so that a
# place nobody wrote shows. Stretches: several with a short last one, and one.
INTERPRETED = """
import dataclasses, json, torch
from locret.kernels.decode_attention import Span, reference_decode_attention
from locret.kernels.decode_attention_triton import Tile, decode_attention_triton
from test_decode_attention import CASES, SCATTERED, Case, TOLERANCE, by_table, error, inputs, scattered
out = {}
def run(name, given, stretch, want=None):
    poisoned = torch.full(given["q"].shape, float("nan"), dtype=given["q"].dtype)
    got = decode_attention_triton(*given.values(), out=poisoned, tile=stretch and Tile(32, stretch))
    out[name] = error(got, reference_decode_attention(**given) if want is None else want)
    return got
for case in CASES:
    for dtype in TOLERANCE:
        given = inputs(case, dtype)
        want = reference_decode_attention(**given)
        for stretch in (48, None):
            one = run(f"{dtype} {stretch} {case}", given, stretch, want)
        if case.bits:
            other = run(f"by table {dtype} {case}", given | {name: by_table(given[name]) for name in "kv"}, None, want)
            out[f"by table, the same, {dtype} {case}"] = 0.0 if torch.equal(one, other) else float("inf")
for case in SCATTERED:
    for dtype in TOLERANCE:
        given, want = scattered(case, dtype)
        one = run(f"scattered {dtype} {case}", given, None, want)
        for name in "kv":  # more room than anybody needs: the same bits
            given[name] = dataclasses.replace(given[name], slots=4 * case.slots)
        other = run(f"scattered, room, {dtype} {case}", given, None, want)
        out[f"scattered, the same, {dtype} {case}"] = 0.0 if torch.equal(one, other) else float("inf")
given = inputs(Case(slots=90), torch.float32)
bias = torch.zeros(2, 2, 90)
bias[1, 1] = float("-inf")
got = run("hidden", given | dict(span=Span(stop=torch.tensor([[0, 90], [20, 90]])), bias=bias), 32)
out["zeros"] = got[0, :2].abs().max().item() + got[1, 2:].abs().max().item()
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def interpreted():
    return interpret(INTERPRETED)


@pytest.mark.triton_interpret
def test_the_interpreted_kernel_equals_the_reference(interpreted):
    wrong = {name: value for name, value in interpreted.items()
             if not value < TOLERANCE[torch.bfloat16 if "bfloat16" in name else torch.float32]}  # fmt: skip
    assert not wrong
    coded = sum(case.bits is not None for case in CASES)
    assert len(interpreted) == 4 * len(CASES) + 4 * coded + 6 * len(SCATTERED) + 2
    assert interpreted["zeros"] == 0


# Triton's compiler needs no GPU to make a binary for one.
COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from locret.kernels.decode_attention import Angles, Codes
from locret.kernels.decode_attention_triton import _merge, _split, constants, default_tile
names = "first_ptr stop_ptr position_ptr bias_ptr".split()
def build(kernel, types, fixed, capability, stages=2):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={**fixed, **{
        name: None for name in kernel.arg_names if name not in types and name not in fixed}})
    options = {"num_warps": 4, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(made.metadata.shared, any(word in made.asm["ptx"] for word in ("wgmma", "mma.sync")))
def split(dtype, size, dim, bits, rotated, capability, spans):
    shape = 1, 1, 1
    k = torch.empty(*shape, dim)
    types = dict(q_ptr=f"*{dtype}", k_ptr=f"*{dtype}", v_ptr=f"*{dtype}", part_ptr="*fp32", lse_ptr="*fp32")
    if bits:
        levels = torch.empty(*shape, dim // 32, dtype=torch.bfloat16)
        k = Codes(torch.empty(*shape, dim * bits // 8), levels, torch.empty(0), bits)
        types |= dict(k_ptr="*u8", v_ptr="*u8")
        types |= dict.fromkeys(("k_scale", "k_zero", "v_scale", "v_zero"), f"*{dtype}")
    if rotated:
        types |= dict(cos_ptr=f"*{dtype}", sin_ptr=f"*{dtype}")
    if spans:
        types |= dict(first_ptr="*i64", stop_ptr="*i64", position_ptr="*i64", bias_ptr="*fp32")
    types |= dict(slots="i32", stretch="i32", heads="i32", scale="fp32", softcap="fp32", table_t="i32")
    types |= {f"{x}_{axis}": "i32" for x in ("q", "k", "v", "ks", "vs", "bias") for axis in "bht"}
    angles = Angles(torch.empty(1, rotated // 2), torch.empty(1, rotated // 2)) if rotated else None
    tile = default_tile(dim, size, coded=bits > 0)
    fixed = constants(dim, 4, 1, tile.slots, k, angles) | dict(CAPPED=spans, UPCAST=False)
    build(_split, types, fixed, capability, tile.stages)
for capability in (80, 90):
    for bits in (0, 8, 4):
        split("bf16", 2, 128, bits, 128, capability, bits == 8)
split("bf16", 2, 256, 0, 64, 80, False)
split("fp32", 4, 96, 0, 0, 90, True)
types = dict(part_ptr="*fp32", lse_ptr="*fp32", out_ptr="*bf16", splits="i32")
build(_merge, types, dict(ROWS=4, DIM=128, BLOCK_D=128, BLOCK_S=16), 90)
"""


@pytest.mark.triton_interpret
def test_the_kernel_compiles_for_gpus_that_are_not_here(tmp_path):
    """For Ampere and Hopper, within the memory of a consumer card's multiprocessor, 16-bit types on tensor cores."""
    lines = compile_only(COMPILED, tmp_path)
    assert len(lines) == 9
    assert all(int(shared) <= 99 * 1024 for shared, _ in lines)
    assert [cores for _, cores in lines] == ["True"] * 7 + ["False"] * 2


# Pointers that come from a table carry no promise about their alignment: without one, every number is a load.
WIDE = """
import re, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from locret.kernels.decode_attention_triton import _split, constants, default_tile
fixed = constants(128, 4, 1, default_tile(128, 2).slots, torch.empty(0), None)
fixed |= dict(CAPPED=False, UPCAST=False, SCATTERED=True)
types = dict(q_ptr="*bf16", k_ptr="*i64", v_ptr="*i64", stop_ptr="*i64", part_ptr="*fp32", lse_ptr="*fp32")
types |= dict(scale="fp32", softcap="fp32")
names = _split.arg_names
steps = [name for name in names if re.fullmatch("[a-z]+_[bht]", name)]
types |= dict.fromkeys(["slots", "stretch", "heads", *steps], "i32")
for aligned in (True, False):
    constexprs = {name: None for name in names if name not in types} | fixed | dict(ALIGNED=aligned)
    source = ASTSource(
        fn=_split, signature={name: types.get(name, "constexpr") for name in names}, constexprs=constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ["q_ptr", *steps]})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2})
    print(len(re.findall("ld.global[.a-z:0-9]*b16 ", made.asm["ptx"])))
"""


@pytest.mark.triton_interpret
def test_units_of_scattered_rows_are_loaded_in_large_pieces(tmp_path):
    (wide,), (narrow,) = compile_only(WIDE, tmp_path)
    assert int(wide) == 0
    assert int(narrow) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", SCATTERED, ids=str)
def test_rows_that_lie_apart_on_a_gpu(case, dtype):
    given, want = scattered(case, dtype, "cuda")
    assert error(decode_attention(**given), want) < max(TOLERANCE[dtype], 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [*CASES, Case(slots=16_384, dim=128, heads=(32, 8), rotated=128, right=True)], ids=str)
def test_the_kernel_on_a_gpu_equals_the_reference(case, dtype, monkeypatch):
    given = inputs(case, dtype, "cuda")
    monkeypatch.setenv("LOCRET_TRITON", "decode_attention")
    want = reference_decode_attention(**given)
    assert error(decode_attention(**given), want) < max(TOLERANCE[dtype], 1e-4)
    if case.dim % 16 == 0:  # torch's fused calls want aligned rows
        assert error(torch_decode_attention(**given), want) < max(2 * TOLERANCE[dtype], 1e-4)
