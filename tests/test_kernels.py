"""Attention of a chunk over (everything before it + itself): every path equals one float64 reading with a full mask."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles import Meter

from locret.kernels import attention
from locret.kernels.attention import prefix_causal_attention, reference_attention

# relative to the largest value of the output. fp32 sums up to 2,000 products in another order; bf16 and fp16 round
# weights and outputs to 8 and 11 bits. Blocks of plain matmuls (softcap, and windows on a CPU) also round the logits,
# as eager transformers do: three times the error.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
SIZES = (1, 63, 100, 1000)
PREFIXES = (0, 1, 63, 1000)
HEADS = ((4, 4), (8, 2), (6, 1))
OPTIONS = (
    dict(), dict(softcap=20.0), dict(window=1), dict(window=24), dict(window=10**6), dict(softcap=5.0, window=70),
)  # fmt: skip

gpu = pytest.mark.gpu


def qkv(t, prefix, heads=(8, 2), dim=16, dtype=torch.float32, batch=2, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (heads[0], t), (heads[1], prefix + t), (heads[1], prefix + t)
    return [torch.randn(batch, h, length, dim, generator=g).to(device, dtype) for h, length in shapes]


def check(q, k, v, **options):
    got = prefix_causal_attention(q, k, v, scale=0.3, **options)
    want = reference_attention(q, k, v, scale=0.3, **options)
    assert got.shape == q.shape
    assert got.dtype == q.dtype
    error = ((got.double() - want).abs().max() / want.abs().max()).item()
    factor = 3 if options and q.dtype.itemsize == 2 else 1
    assert error < TOLERANCE[q.dtype] * factor, (tuple(q.shape), tuple(k.shape), options, error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("t", "prefix"), [*itertools.product((1, 63, 100), PREFIXES), (1000, 0), (1000, 63)])
def test_every_path_equals_the_reference_at_odd_sizes(t, prefix, dtype):
    small = t * (t + prefix) < 10**5
    for group, options in itertools.product(HEADS if small else [(2, 1)], OPTIONS):
        check(*qkv(t, prefix, group, dtype=dtype, batch=2 if small else 1), **options)


@pytest.mark.parametrize("dim", [4, 8, 24, 80, 128])
def test_any_head_dim_is_taken(dim):
    check(*qkv(33, 50, dim=dim))
    check(*qkv(1, 50, dim=dim))


def test_strided_inputs_give_what_contiguous_ones_give():
    """Projections arrive as [B, T, H, D] in memory, slabs as a slice of a longer one."""
    q, k, v = qkv(40, 60, batch=1)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    slab = torch.full((1, 2, 200, 16), float("nan"))
    slab[:, :, :100] = k
    want = prefix_causal_attention(q, k, v, scale=0.3)
    assert torch.equal(prefix_causal_attention(strided, slab[:, :, :100], v, scale=0.3), want)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_query_t_sees_the_whole_prefix_and_the_chunk_up_to_itself(options):
    t, prefix = 9, 13
    q, k, v = qkv(t, prefix, batch=1, dtype=torch.float64)
    before = prefix_causal_attention(q, k, v, scale=0.3, **options)
    for key in range(prefix + t):
        changed = v.clone()
        changed[:, :, key] += 1.0
        after = prefix_causal_attention(q, k, changed, scale=0.3, **options)
        moved = [not torch.equal(before[:, :, i], after[:, :, i]) for i in range(t)]
        window = options.get("window", 10**9)
        assert moved == [0 <= prefix + i - key < window for i in range(t)], key


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_where_a_prompt_is_cut_changes_no_output(options):
    q, k, v = qkv(70, 0, dtype=torch.float64, batch=1)
    whole = prefix_causal_attention(q, k, v, scale=0.3, **options)
    for cut in (1, 33, 69):
        part = prefix_causal_attention(q[:, :, cut:], k, v, scale=0.3, **options)
        torch.testing.assert_close(part, whole[:, :, cut:], rtol=0, atol=1e-12)


def test_every_output_is_written(monkeypatch):
    """`torch.empty_like` poisoned with NaN."""
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))
    for t, options in itertools.product((1, 255, 257), OPTIONS):
        q, k, v = qkv(t, 10, batch=1)
        assert prefix_causal_attention(q, k, v, scale=0.3, **options).isfinite().all()


def test_extreme_logits_stay_finite():
    q, k, v = qkv(20, 30, batch=1)
    check(q * 300, k * 10, v)
    check(q * 300, k * 10, v, window=7)


def test_the_two_part_path_allocates_no_score_matrix():
    """Every tensor that torch creates, and the process's own high-water mark, stay far below T * S."""
    t, prefix = 2048, 14336
    q, k, v = qkv(t, prefix, heads=(2, 1), batch=1, dim=8)
    one_matrix = t * (t + prefix) * q.element_size()  # of one head: 134 MB
    with Meter() as meter:
        before = _reset_peak()
        out = prefix_causal_attention(q, k, v, scale=0.3)
        grown = None if before is None else _peak() - before
    assert out.shape == q.shape
    assert meter.peak < one_matrix / 50, meter.peak
    assert grown is None or grown < one_matrix / 4, grown  # memory that kernels take without telling torch


def test_the_meter_above_would_see_a_score_matrix():
    t, s = 256, 2048
    q, k, v = qkv(t, s - t, heads=(2, 1), batch=1, dim=8)
    with Meter() as meter:
        reference_attention(q, k, v, scale=0.3)
    assert meter.largest >= t * s


def test_the_blocked_path_holds_one_block_of_rows_at_a_time():
    t, prefix = 2048, 6144
    q, k, v = qkv(t, prefix, heads=(1, 1), batch=1, dim=8)
    with Meter() as meter:
        prefix_causal_attention(q, k, v, scale=0.3, softcap=20.0)
    assert meter.largest <= attention._ROWS * (t + prefix)
    with Meter() as meter:
        prefix_causal_attention(q, k, v, scale=0.3, window=64)
    assert meter.largest <= attention._ROWS * (attention._ROWS + 64)


def _reset_peak() -> int | None:
    """Make the kernel forget this process's high-water mark; None where it cannot. Bytes resident now."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return _peak()
    except OSError:
        return None


def _peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


# ---------------------------------------------------------------------- on a GPU


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("t", SIZES)
def test_on_cuda_every_path_equals_the_reference_at_odd_sizes(t, prefix, dtype):
    for group, options in itertools.product(HEADS, OPTIONS):
        check(*qkv(t, prefix, group, dtype=dtype, device="cuda"), **options)


@gpu
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_cuda_any_head_dim_is_taken(dim, dtype):
    for t, prefix, options in ((1, 200, {}), (77, 0, {}), (77, 200, {}), (77, 200, dict(window=33))):
        check(*qkv(t, prefix, dim=dim, dtype=dtype, device="cuda"), **options)


@gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_cuda_query_t_sees_the_whole_prefix_and_the_chunk_up_to_itself(dtype, options):
    """Lower-right causality: a kernel with upper-left causality would hide most of the prefix."""
    t, prefix = 9, 130
    q, k, v = qkv(t, prefix, batch=1, dtype=dtype, device="cuda", dim=64)
    before = prefix_causal_attention(q, k, v, scale=0.01, **options)
    for key in range(prefix + t):
        changed = v.clone()
        changed[:, :, key] += 100.0
        after = prefix_causal_attention(q, k, changed, scale=0.01, **options)
        moved = [not torch.equal(before[:, :, i], after[:, :, i]) for i in range(t)]
        window = options.get("window", 10**9)
        assert moved == [0 <= prefix + i - key < window for i in range(t)], key


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_cuda_one_token_and_a_chunk_without_prefix_are_exact(dtype):
    for t, prefix in ((1, 0), (1, 1), (1, 999), (1, 100_000), (512, 0), (513, 0)):
        for options in ({}, dict(window=100)):
            check(*qkv(t, prefix, dtype=dtype, device="cuda", batch=1, dim=64), **options)


@gpu
@pytest.mark.parametrize("window", [None, 1000])
def test_on_cuda_flash_allocates_no_score_matrix_and_copies_no_keys(window):
    t, prefix = 2048, 65536 - 2048
    q, k, v = qkv(t, prefix, heads=(8, 2), dtype=torch.bfloat16, device="cuda", batch=1, dim=64)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prefix_causal_attention(q, k, v, scale=0.3, window=window)
    grown = torch.cuda.max_memory_allocated() - before
    assert grown < k.nbytes / 2 + 4 * q.nbytes, grown  # T * S of one head in bf16 would be 268 MB; keys are 17 MB


@gpu
def test_on_cuda_fp32_allocates_no_score_matrix():
    t, prefix = 2048, 32768 - 2048
    q, k, v = qkv(t, prefix, heads=(2, 1), device="cuda", batch=1, dim=64)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prefix_causal_attention(q, k, v, scale=0.3)
    grown = torch.cuda.max_memory_allocated() - before
    assert grown < t * (t + prefix) * 4 / 2, grown


@gpu
def test_on_cuda_strided_slabs_give_what_contiguous_ones_give():
    q, k, v = qkv(40, 60, batch=1, dtype=torch.bfloat16, device="cuda", dim=64)
    slab = torch.full((1, 2, 200, 64), float("nan"), dtype=torch.bfloat16, device="cuda")
    slab[:, :, :100] = k
    want = prefix_causal_attention(q, k, v, scale=0.3)
    assert torch.equal(prefix_causal_attention(q, slab[:, :, :100], v, scale=0.3), want)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("t", "prefix"), [(1, 9), (7, 0), (7, 20), (300, 40)])
def test_a_bias_is_added_to_the_logits_and_hides_keys(t, prefix, softcap):
    g = torch.Generator().manual_seed(t)
    q = torch.randn(2, 4, t, 8, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, 2, prefix + t, 8, generator=g, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(2, 2, prefix + t, generator=g, dtype=torch.float64)
    hidden = max(0, prefix - 3)
    bias[1, 0, :hidden] = float("-inf")
    got = prefix_causal_attention(q, k, v, scale=0.3, softcap=softcap, bias=bias)
    torch.testing.assert_close(got, reference_attention(q, k, v, scale=0.3, softcap=softcap, bias=bias))
    if hidden:  # what is hidden does not matter, and the heads of one group only are changed
        k[1, 0, :hidden], v[1, 0, :hidden] = 7.0, 7.0
        assert torch.equal(prefix_causal_attention(q, k, v, scale=0.3, softcap=softcap, bias=bias), got)
