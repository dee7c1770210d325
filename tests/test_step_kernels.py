"""The small kernels of chunks and decode steps: one-row products, norms, gates, append, rotate, merge.

Each against its torch path in float64, on inputs that lie inside larger memory, into outputs full of NaN: in Triton's
interpreter here, on the device with `-m gpu`.
"""

import math
import os

import pytest
import torch
from triton_programs import compile_only, interpret

from locret.graph import codes
from locret.kernels import append, attention, linear, rotate
from locret.kernels.append_codes import append_codes
from locret.kernels.decode_attention import Angles, Codes
from locret.kernels.linear import Norm
from locret.kernels.scattered import Scattered, addresses
from locret.kernels.sizes import cdiv, next_power_of_2
from locret.storage import Affine

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
SIZES = ((64, (48, 16, 16)), (100, (33,)), (300, (70, 5)))
DEVICE = "cuda" if os.environ.get("LOCRET_TEST_DEVICE") == "cuda" else "cpu"


def error(got, want):
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def numbers(*shape, dtype, seed=0):
    """Inside a larger tensor: a kernel that assumes contiguous memory reads something else."""
    generator = torch.Generator().manual_seed(seed)
    outer = torch.randn(*shape[:-1], shape[-1] + 8, generator=generator).to(dtype).to(DEVICE)
    return outer[..., : shape[-1]]


def wide(x):
    return None if x is None else Norm(x.weight.double(), x.eps) if isinstance(x, Norm) else x.double()


def products():
    """name -> relative error of `project` and `gated`."""
    from locret.kernels.linear_triton import gated_triton, project_triton

    found = {}
    for dtype, allowed in TOLERANCE.items():
        for e, sizes in SIZES:
            x = numbers(1, e, dtype=dtype)
            weights = [numbers(n, e, dtype=dtype, seed=n) / e**0.5 for n in sizes]
            biases = [numbers(n, dtype=dtype, seed=n + 1) if i % 2 == 0 else None for i, n in enumerate(sizes)]
            for norm in (None, Norm(numbers(e, dtype=dtype, seed=9), 1e-5)):
                out = torch.full((1, sum(sizes)), float("nan"), dtype=dtype, device=DEVICE)
                want = linear.torch_project(
                    x.double(), [w.double() for w in weights], biases=[wide(b) for b in biases], norm=wide(norm)
                )
                got = project_triton(x, weights, biases, norm, None, out=out)
                name = f"{dtype} {e} {sizes} {norm is not None}"
                found[f"project {name}"] = error(got, torch.cat(want, -1)) / allowed
                got = gated_triton(x, weights[0], weights[0] * 0.5, norm)
                want = linear.torch_gated(x.double(), [weights[0].double(), weights[0].double() * 0.5], norm=wide(norm))
                found[f"gated {name}"] = error(got, want) / allowed
            residual = torch.randn(1, sizes[0], device=DEVICE).to(dtype)
            want = residual.double() + x.double() @ weights[0].double().T
            got = project_triton(x, weights[:1], None, None, residual, out=residual)
            found[f"residual {dtype} {e} {sizes}"] = error(got, want) / allowed
    return found


def elements():
    """name -> relative error of norms, gates, rotations, merges; 0 or inf for copies."""
    from locret.kernels.append_codes_triton import append_codes_triton
    from locret.kernels.append_triton import append_triton
    from locret.kernels.linear_triton import rms_norm_triton, silu_mul_triton, silu_scores_triton
    from locret.kernels.merge_triton import merge_triton
    from locret.kernels.rotate_triton import rotate_triton

    found = {}
    for dtype, allowed in TOLERANCE.items():
        for shape in ((3, 100), (2, 5, 3, 16), (1, 7, 64)):
            x, norm = numbers(*shape, dtype=dtype), Norm(numbers(shape[-1], dtype=dtype, seed=1).contiguous(), 1e-6)
            found[f"norm {dtype} {shape}"] = (
                error(rms_norm_triton(x, norm), linear.rms_norm(x.double(), wide(norm))) / allowed
            )
        gate, up = (numbers(5, 1000, dtype=dtype, seed=i).contiguous() for i in range(2))
        want = torch.nn.functional.silu(gate.double()) * up.double()
        found[f"silu {dtype}"] = error(silu_mul_triton(gate, up), want) / allowed
        for batch, tokens, inner, outputs in ((2, 37, 48, 8), (1, 20, 1000, 3), (3, 1, 256, 32)):
            x = numbers(batch * tokens, inner, dtype=dtype).contiguous()
            weight = numbers(outputs, inner, dtype=dtype, seed=2)
            got, want = silu_scores_triton(x, weight, tokens), linear.silu_scores(x.double(), weight.double(), tokens)
            found[f"scores {dtype} {inner}"] = error(got, want) / allowed
        for heads, tokens, dim, turned, interleaved in (
            (3, 70, 64, 64, False),
            (2, 33, 20, 12, False),
            (2, 5, 16, 16, True),
        ):
            angles = torch.rand(200, turned // 2, device=DEVICE)
            table = Angles(angles.cos().to(dtype), angles.sin().to(dtype), interleaved)
            x = numbers(2, tokens, heads, dim, dtype=dtype).transpose(1, 2)
            out = torch.full((2, heads, tokens + 4, dim), float("nan"), dtype=dtype, device=DEVICE)
            want = rotate.rotate(x.double(), Angles(table.cos.double(), table.sin.double(), interleaved), 17,
                                 torch.empty(x.shape, dtype=torch.float64, device=DEVICE))  # fmt: skip
            rotate_triton(x, table, 17, out[:, :, 2:-2])
            assert out[:, :, :2].isnan().all()
            assert out[:, :, -2:].isnan().all()
            found[f"rotate {dtype} {dim} {turned} {interleaved}"] = error(out[:, :, 2:-2], want) / allowed
        a, b = (numbers(2, 21, 3, 24, dtype=dtype, seed=i).transpose(1, 2) for i in range(2))
        lse = [torch.randn(2, 3, 21, device=DEVICE) * 5 for _ in range(2)]
        want = torch.lerp(a.double(), b.double(), torch.sigmoid(lse[1] - lse[0]).double()[..., None])
        found[f"merge {dtype}"] = (
            error(merge_triton(a.clone(memory_format=torch.preserve_format), b, *lse), want) / allowed
        )
        found[f"append {dtype}"] = _appended(append_triton, dtype)
        found[f"append to scattered rows {dtype}"] = _scattered(append_triton, dtype)
        found |= {f"append {dtype} {case}": _encoded(append_codes_triton, dtype, *case) for case in CODES}
        found |= {f"append {dtype} {case} by table": _encoded(_append_by_table, dtype, *case) for case in CODES}
    return found


def _appended(run, dtype):
    q, k, v = (numbers(2, 1, heads, 24, dtype=dtype, seed=heads).transpose(1, 2) for heads in (6, 3, 3))
    slabs = [numbers(2, heads, slots, 24, dtype=dtype, seed=5).clone() for heads, slots in ((3, 9), (3, 9), (6, 4))]
    twins = [slab.clone() for slab in slabs]
    at, slot = (torch.tensor(x, device=DEVICE) for x in ([[0, 8, 4], [3, 3, 1]], [[2, 2, 2], [0, 0, 0]]))
    run(q, k, v, slabs[0], slabs[1], at, slabs[2], slot)
    for row in range(2):
        for head in range(3):
            twins[0][row, head, at[row, head]] = k[row, head, 0]
            twins[1][row, head, at[row, head]] = v[row, head, 0]
        twins[2][row, :, slot[row, 0]] = q[row, :, 0]
    return 0.0 if all(torch.equal(*pair) for pair in zip(slabs, twins, strict=True)) else float("inf")


def _scattered(run, dtype):
    """Rows in slabs of 9, 1 and 4 slots; nothing else in them may change."""
    q, k, v = (numbers(3, 1, heads, 24, dtype=dtype, seed=heads).transpose(1, 2) for heads in (6, 3, 3))
    rows = [[numbers(1, 3, n, 24, dtype=dtype, seed=n + i).clone() for n in (9, 1, 4)] for i in range(2)]
    twins = [[slab.clone() for slab in slabs] for slabs in rows]
    at, slot = torch.tensor([[0, 8, 4], [0, 0, 0], [3, 1, 2]], device=DEVICE), torch.zeros(3, 3, dtype=torch.int64)
    keys, values = (Scattered(slabs, addresses(slabs).to(DEVICE), 9) for slabs in rows)
    run(q, k, v, keys, values, at, None, slot.to(DEVICE))
    for i, new in enumerate((k, v)):
        for row in range(3):
            for head in range(3):
                twins[i][row][0, head, at[row, head]] = new[row, head, 0]
    pairs = [pair for i in range(2) for pair in zip(rows[i], twins[i], strict=True)]
    return 0.0 if all(torch.equal(*pair) for pair in pairs) else float("inf")


CODES = [(8, 24, 6), (4, 24, 8), (4, 128, 32), (8, 20, None), (4, 96, 32)]  # bits, head dim, group


def _append_by_table(q, k, v, k_slab, v_slab, *rest):
    """To slabs that the kernel finds by addresses alone: the tensors that it is given are others."""
    from locret.kernels.append_codes_triton import append_codes_triton

    slabs = [
        Codes(*(x.clone() for x in slab.parts), slab.bits, addresses(slab.parts).unflatten(0, (3, -1)).to(DEVICE))
        for slab in (k_slab, v_slab)
    ]
    append_codes_triton(q, k, v, *slabs, *rest)


def _encoded(run, dtype, bits, dim, group, *encode):
    """Groups of all sizes of numbers, a constant one and one of zeros; nothing else in slabs and stash may change."""
    codec = Affine(bits, group)
    size = torch.tensor([1e-3, 1.0, 1e4], device=DEVICE)[:, None, None]
    q, k, v = (numbers(2, 1, heads, dim, dtype=dtype, seed=heads + bits).transpose(1, 2) for heads in (6, 3, 3))
    k, v = (k * size).to(dtype), (v * size).to(dtype)
    k[0, 0], v[1, 2] = 0.3, 0.0

    def slab(seed):
        parts = codec.encode(numbers(2, 3, 9, dim, dtype=dtype, seed=seed)).parts
        return Codes(parts["codes"], parts["scale"], parts["zero"], bits)

    slabs = [slab(5), slab(6)]
    stash = [numbers(2, heads, 4, dim, dtype=dtype, seed=7).clone() for heads in (6, 3, 3)]
    held = [x for one in slabs for x in (one.codes, one.scale, one.zero)] + stash
    twins = [x.clone() for x in held]
    at, slot = (torch.tensor(x, device=DEVICE) for x in ([[0, 8, 4], [3, 3, 1]], [[2, 2, 2], [0, 0, 0]]))
    run(q, k, v, *slabs, at, stash, slot, *encode)
    new = [x for one in (k, v) for x in codec.encode(one).parts.values()]
    for row in range(2):
        for head in range(3):
            for twin, x in zip(twins[:6], new, strict=True):
                twin[row, head, at[row, head]] = x[row, head, 0]
        for twin, x in zip(twins[6:], (q, k, v), strict=True):
            twin[row, :, slot[row, 0]] = x[row, :, 0]
    return 0.0 if all(torch.equal(*pair) for pair in zip(held, twins, strict=True)) else float("inf")


PROGRAM = "import json; from test_step_kernels import {0}; print(json.dumps({0}()))"


@pytest.mark.triton_interpret
@pytest.mark.parametrize("group", ["products", "elements"])
def test_the_interpreted_kernels_equal_their_torch_paths(group):
    found = interpret(PROGRAM.format(group))
    assert {name: round(share, 2) for name, share in found.items() if not share <= 1} == {}
    assert len(found) > 12


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_append_in_torch(dtype):
    assert _appended(append.append, dtype) == 0.0
    assert _scattered(append.append, dtype) == 0.0
    for bits, *shape in CODES:
        codec = Affine(bits, shape[1])
        assert _encoded(append_codes, dtype, bits, *shape, lambda x, codec=codec: codes(codec.encode(x), codec)) == 0.0


@pytest.mark.parametrize("prefix", [0, 1, 37])
@pytest.mark.parametrize("tokens", [1, 20])
def test_two_part_attention_is_attention(prefix, tokens):
    q, k, v = (
        torch.randn(2, heads, n, 16, dtype=torch.float64)
        for heads, n in ((6, tokens), (3, prefix + tokens), (3, prefix + tokens))
    )
    want = attention.reference_attention(q, k, v, scale=0.25)
    got = attention.two_part_attention(
        q, (k[:, :, :prefix], v[:, :, :prefix]), (k[:, :, prefix:], v[:, :, prefix:]), scale=0.25
    )
    torch.testing.assert_close(got, want)


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from locret.kernels.append_codes_triton import _append_codes
from locret.kernels.linear_triton import _gated, _project, _silu_scores
def build(kernel, types, fixed):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    made = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=fixed), target=GPUTarget("cuda", 90, 32),
                          options={"num_warps": 4, "num_stages": 1})
    print(made.metadata.shared)
three = lambda kind: (kind,) * 3
common = dict(x_ptr="*bf16", norm_ptr="*bf16", out_ptr="*bf16", e="i32", eps="fp32")
project = common | dict(weights=three("*bf16"), strides=three("i32"), biases=three("*bf16"), residual_ptr="*bf16")
gated = common | dict(gate_ptr="*bf16", gate_n="i32", up_ptr="*bf16", up_n="i32", outputs="i32")
fixed = dict(NORM=True, BLOCK_N=16, BLOCK_K=256)
build(_project, project, fixed | dict(SIZES=(4096, 1024, 1024), BLOCKS=(0, 256, 320, 384), OFFSETS=(0, 4096, 5120),
      BIASED=(True, False, False), ADD=False))
build(_gated, gated, fixed)
scores = dict(x_ptr="*bf16", w_ptr="*bf16", w_n="i32", out_ptr="*fp32", rows="i32", tokens="i32", e="i32")
build(_silu_scores, scores, dict(N=8, BLOCK_M=32, BLOCK_K=256))
names = _append_codes.arg_names
types = dict.fromkeys(names[:names.index("slot_ptr")], "*bf16") | dict.fromkeys(("k_codes", "v_codes"), "*u8")
types |= dict.fromkeys(("at_ptr", "slot_ptr", "k_table", "v_table"), "*i64")
types |= dict.fromkeys(names[names.index("heads"):names.index("G")], "i32")
build(_append_codes, types, dict(G=4, DIM=128, BLOCK=128, BITS=4, GROUP=32, BLOCK_G=4, BLOCK_C=32, BLOCK_B=64,
                                 STASH=True))
"""


@pytest.mark.triton_interpret
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    lines = compile_only(COMPILED, tmp_path)
    assert len(lines) == 4
    assert all(int(shared) <= 99 * 1024 for (shared,) in lines)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [products, elements])
def test_the_kernels_on_a_gpu(group, monkeypatch):
    monkeypatch.setattr("test_step_kernels.DEVICE", "cuda")
    found = group()
    assert {name: round(share, 2) for name, share in found.items() if not share <= 2} == {}


def test_sizes_of_launches_are_triton_s():
    """Its own functions do the same and take microseconds on the host."""
    assert [next_power_of_2(n) for n in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert all(cdiv(x, y) == math.ceil(x / y) for x in range(20) for y in range(1, 8))
