"""The label kernel: the Triton program equals its definition, in the interpreter here and on a GPU elsewhere."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from triton_programs import compile_only, interpret

from locret.kernels.label_max import kernel_works, label_max

# (batch, query heads, KV heads, answer rows, prompt keys, head dim)
SHAPES = [
    (1, 1, 1, 1, 1, 8),
    (2, 4, 2, 5, 63, 8),
    (1, 6, 2, 65, 130, 24),
    (1, 8, 8, 3, 100, 96),
    (2, 4, 1, 70, 257, 64),
    (1, 2, 1, 33, 64, 128),
]
DTYPES = {"float32": 1e-5, "bfloat16": 1e-5}  # products of bf16 numbers are exact in fp32; only the sum's order differs

# In a process of its own: triton reads the environment when it is imported. Outputs are poisoned with NaN, so that a
# place nobody wrote shows; inputs are views of larger NaN tensors, so that reading past the end does too.
INTERPRETED = """
import json, sys, torch
from locret.kernels.label_max_triton import label_max_triton
from test_label_max import inputs, naive
out = []
for shape, dtype in json.loads(sys.argv[1]):
    q, k = inputs(shape, getattr(torch, dtype))
    poisoned = torch.full((*k.shape[:3],), float("nan"))
    got = label_max_triton(q, k, 0.3, out=poisoned)
    out.append((got.double() - naive(q, k, 0.3)).abs().max().item() if bool(torch.isfinite(got).all()) else None)
print(json.dumps(out))
"""


def inputs(shape, dtype, device="cpu"):
    """Rows and keys with odd strides, [B, T, H, D] in memory, inside tensors of NaN."""
    batch, num_q, num_kv, rows, keys, dim = shape
    g = torch.Generator().manual_seed(sum(shape))
    made = []
    for heads, length in ((num_q, rows), (num_kv, keys)):
        x = torch.full((batch, length + 3, heads + 1, dim + 5), float("nan"), dtype=dtype, device=device)
        x[:, 1 : length + 1, :heads, :dim] = torch.randn(batch, length, heads, dim, generator=g).to(device, dtype)
        made.append(x[:, 1 : length + 1, :heads, :dim].transpose(1, 2))
    return made


def naive(q, k, scale):
    """max over rows and over the query heads of a group, one query head at a time, float64."""
    groups = q.shape[1] // k.shape[1]
    out = torch.full(k.shape[:3], float("-inf"), dtype=torch.float64, device=k.device)
    for head in range(q.shape[1]):
        logits = scale * (q[:, head].double() @ k[:, head // groups].double().mT)  # [B, A, P]
        out[:, head // groups] = torch.maximum(out[:, head // groups], logits.amax(1))
    return out


@pytest.fixture(scope="module")
def interpreted():
    """Errors of the interpreted kernel by shape and dtype."""
    cases = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    errors = interpret(INTERPRETED, json.dumps(cases))
    return dict(zip([(tuple(shape), dtype) for shape, dtype in cases], errors))


@pytest.mark.triton_interpret
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_interpreted_kernel_equals_the_definition(shape, dtype, interpreted):
    error = interpreted[shape, dtype]
    assert error is not None, "a label was not written, or came from outside the inputs"
    assert error < DTYPES[dtype]


# Triton's compiler needs no GPU to make a binary for one.
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from locret.kernels.label_max_triton import _label_max, block_sizes
names = [f"{x}_{axis}" for x in "qk" for axis in "bht"]
numbers = ["num_rows", "num_keys", "num_kv", *names]
for capability, dtype, size, dim, group in ((80, "bf16", 2, 256, 2), (90, "bf16", 2, 128, 4), (90, "fp32", 4, 96, 1)):
    block_d, block_k, block_r = block_sizes(dim, size)
    fixed = dict(GROUP=group, DIM=dim, BLOCK_D=block_d, BLOCK_K=block_k, BLOCK_R=block_r, PRECISION="ieee")
    fixed |= dict(UPCAST=False, q_d=1, k_d=1)
    types = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "out_ptr": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(numbers, "i32") | dict.fromkeys(fixed, "constexpr")
    signature = {name: types[name] for name in _label_max.arg_names}
    source = ASTSource(fn=_label_max, signature=signature, constexprs=fixed)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_stages": 2})
    print(dtype, made.metadata.shared, any(word in made.asm["ptx"] for word in ("wgmma", "mma.sync")))
"""


@pytest.mark.triton_interpret
def test_the_kernel_compiles_for_gpus_that_are_not_here(tmp_path):
    """For Ampere and Hopper, within the memory of a consumer card's multiprocessor, 16-bit types on tensor cores."""
    lines = compile_only(COMPILED, tmp_path)
    assert len(lines) == 3
    for dtype, shared, cores in lines:
        assert int(shared) <= 99 * 1024
        assert cores == str(dtype != "fp32")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_elements", [1, 100, 1 << 24])
def test_the_blocked_reference_equals_the_definition(shape, dtype, block_elements):
    if block_elements == 1 and shape[3] * shape[4] > 1000:
        block_elements = 64  # a logit at a time takes seconds
    q, k = inputs(shape, dtype)
    got = label_max(q, k, 0.3, block_elements=block_elements)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), naive(q, k, 0.3), atol=tolerance, rtol=tolerance)


def test_a_kernel_that_cannot_be_compiled_leaves_the_torch_path(monkeypatch):
    """It says so, once; nothing is silently slower."""
    broken = SimpleNamespace(label_max_triton=lambda *a: (_ for _ in ()).throw(RuntimeError("no C compiler\nmore")))
    monkeypatch.setitem(sys.modules, "locret.kernels.label_max_triton", broken)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.warns(UserWarning, match=r"cannot compile the label kernel here \(RuntimeError: no C compiler\)"):
        assert not kernel_works.__wrapped__(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 32, 8, 300, 10_001, 128), (1, 32, 32, 40, 5000, 96)], ids=str)
def test_the_kernel_on_a_gpu_equals_the_definition_and_allocates_its_output_only(shape, dtype):
    q, k = inputs(shape, dtype, "cuda")
    label_max(q, k, 0.3)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = label_max(q, k, 0.3)
    assert torch.cuda.max_memory_allocated() - before <= got.nbytes + 4096
    want = naive(q, k, 0.3)
    assert ((got.double() - want).abs() <= 1e-3 * want.abs().clamp_min(1e-2)).all()
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)
