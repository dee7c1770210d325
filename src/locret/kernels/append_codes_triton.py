"""`append_codes` in Triton: a program a row, KV head and one of K and V. Meaning: append_codes.py.

The same bytes as torch's: divisions and conversions round to nearest even, the scale up. Whole numbers are found in
the last bits of x + 2**23, which is rounded to even as well.
"""

# mypy: disable-error-code="no-untyped-def"
# a kernel's parameters are pointers, numbers and compile-time constants

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from locret.kernels.decode_attention import Codes
from locret.kernels.scattered_triton import first_codes
from locret.kernels.sizes import next_power_of_2


@triton.jit
def _of_groups(numbers, channel, GROUP: tl.constexpr):
    """numbers [groups] for channels [n]."""
    group = tl.arange(0, numbers.shape[0])
    return tl.sum(tl.where(group[None, :] == (channel // GROUP)[:, None], numbers[None, :], 0.0), 1)


@triton.jit
def _code(x_ptr, channel, step, zero, mask, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Codes of some channels, int32."""
    x = tl.load(x_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    x = tl.div_rn(x - _of_groups(zero, channel, GROUP), _of_groups(step, channel, GROUP))
    x = tl.minimum(tl.maximum(x, 0.0), 2.0**BITS - 1)
    return (x + 8388608.0).to(tl.int32, bitcast=True) & 255


@triton.jit
def _encode(x_ptr, codes_ptr, scale_ptr, zero_ptr, BITS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
            BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    group, member = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_C)
    there = group < DIM // GROUP
    real = there[:, None] & (member < GROUP)[None, :]
    x = tl.load(x_ptr + group[:, None] * GROUP + member[None, :], mask=real, other=0.0).to(tl.float32)
    low = tl.where(there, tl.min(tl.where(real, x, float("inf")), 1), 0.0)
    high = tl.where(there, tl.max(tl.where(real, x, float("-inf")), 1), 0.0)
    wide = tl.div_rn(high - low, low * 0 + (2.0**BITS - 1))
    scale = wide.to(scale_ptr.dtype.element_ty)
    if scale_ptr.dtype.element_ty != tl.float32:  # the next larger number, unless it is one
        bits = scale.to(tl.int16, bitcast=True) + (scale.to(tl.float32) < wide).to(tl.int16)
        scale = bits.to(scale_ptr.dtype.element_ty, bitcast=True)
    tl.store(scale_ptr + group, scale, mask=there)
    tl.store(zero_ptr + group, low.to(zero_ptr.dtype.element_ty), mask=there)
    step = scale.to(tl.float32)
    step = tl.where(step > 0, step, 1.0)
    byte = tl.arange(0, BLOCK_B)
    mask = byte < DIM * BITS // 8
    code = _code(x_ptr, byte, step, low, mask, BITS, GROUP)
    if BITS == 4:
        code |= _code(x_ptr, byte + DIM // 2, step, low, mask, BITS, GROUP) << 4
    tl.store(codes_ptr + byte, code.to(tl.uint8), mask=mask)


@triton.jit
def _copy(x_ptr, out_ptr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    tl.store(out_ptr + d, tl.load(x_ptr + d, mask=d < DIM, other=0.0), mask=d < DIM)


@triton.jit
def _append_codes(
    q_ptr, k_ptr, v_ptr, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, k_table, v_table, at_ptr,
    q_stash, k_stash, v_stash, slot_ptr, heads,
    q_b, q_h, k_b, k_h, v_b, v_h, kc_b, kc_h, kc_t, ks_b, ks_h, ks_t, vc_b, vc_h, vc_t, vs_b, vs_h, vs_t,
    qst_b, qst_h, qst_t, kst_b, kst_h, kst_t,
    G: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr, STASH: tl.constexpr,
):  # fmt: skip
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    batch, head = row // heads, row % heads
    at = tl.load(at_ptr + row)
    k_ptr += batch * k_b + head * k_h
    v_ptr += batch * v_b + head * v_h
    if tl.program_id(1) == 0:
        codes, scale, zero = first_codes(
            k_codes, k_scale, k_zero, k_table, row, rows, heads, kc_b, kc_h, ks_b, ks_h
        )  # fmt: skip
        _encode(k_ptr, codes + at * kc_t, scale + at * ks_t, zero + at * ks_t,
                BITS, GROUP, DIM, BLOCK_G, BLOCK_C, BLOCK_B)  # fmt: skip
    else:
        codes, scale, zero = first_codes(
            v_codes, v_scale, v_zero, v_table, row, rows, heads, vc_b, vc_h, vs_b, vs_h
        )  # fmt: skip
        _encode(v_ptr, codes + at * vc_t, scale + at * vs_t, zero + at * vs_t,
                BITS, GROUP, DIM, BLOCK_G, BLOCK_C, BLOCK_B)  # fmt: skip
    if STASH:
        slot = tl.load(slot_ptr + row)
        own = batch * kst_b + head * kst_h + slot * kst_t
        if tl.program_id(1) == 0:
            _copy(k_ptr, k_stash + own, DIM, BLOCK)
        else:
            _copy(v_ptr, v_stash + own, DIM, BLOCK)
            for g in range(G):
                query = q_ptr + batch * q_b + (head * G + g) * q_h
                _copy(query, q_stash + batch * qst_b + (head * G + g) * qst_h + slot * qst_t, DIM, BLOCK)


def append_codes_triton(
    q: Tensor, k: Tensor, v: Tensor, k_slab: Codes, v_slab: Codes, at: Tensor,
    stash: Sequence[Tensor] | None, slot: Tensor,
) -> None:  # fmt: skip
    """`append_codes` in one launch; every tensor's last dimension is contiguous."""
    batch, heads, _, dim = k.shape
    group = dim // k_slab.scale.shape[3]
    for slab in (k_slab, v_slab):
        assert slab.scale.stride() == slab.zero.stride(), "a slab's scales and zeros lie alike"
    places = (q, k, v) if stash is None else tuple(stash)
    assert places[1].stride() == places[2].stride() or stash is None, "a stash's keys and values lie alike"
    _append_codes[(batch * heads, 2)](
        q, k, v, *k_slab.parts, *v_slab.parts, k_slab.table, v_slab.table, at, *places,
        slot, heads,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_slab.codes.stride()[:3], *k_slab.scale.stride()[:3],
        *v_slab.codes.stride()[:3], *v_slab.scale.stride()[:3], *places[0].stride()[:3], *places[1].stride()[:3],
        G=q.shape[1] // heads, DIM=dim, BLOCK=next_power_of_2(dim), BITS=k_slab.bits, GROUP=group,
        BLOCK_G=next_power_of_2(dim // group), BLOCK_C=next_power_of_2(group),
        BLOCK_B=next_power_of_2(dim * k_slab.bits // 8), STASH=stash is not None, num_warps=1,
    )  # fmt: skip
