"""`decode_attention` in Triton: split-KV flash-decode. Meaning and shapes: decode_attention.py.

`_split`: grid (stretches, B Hkv). The G T query rows of a KV head are one tile of M rows, padded to 16 for the tensor
cores. Keys come in up to three tiles, so that nothing is shuffled between lanes: the first and the second channels of
RoPE's pairs, and the channels that are not rotated; values in two halves. With 4 bits a byte holds a code of either
half. Maximum and sum are kept in base 2; every stretch leaves its output and log-sum in fp32.

`_split_codes` (`decode_codes_triton`): in its place for the codes of most models in bfloat16.

`_merge`: grid (B Hq T). Stretches are weighted by their share of the sum; one without visible slots weighs nothing.
"""

# mypy: disable-error-code="no-untyped-def"
# a kernel's parameters are pointers, numbers and compile-time constants

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from locret.kernels.decode_attention import Angles, Codes, Slab, Span
from locret.kernels.decode_codes_triton import REGISTERS, fits, per_multiprocessor, split_codes, splits_of
from locret.kernels.scattered import Scattered
from locret.kernels.scattered_triton import first_codes, pointer_at
from locret.kernels.sizes import cdiv, next_power_of_2

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # its dot multiplies the bits of bf16 as if they were numbers
LONGEST_STRETCH = 1024
MERGED = 16_384  # numbers that a program of `_merge` has loaded at once: it waits for memory, not for sums


@triton.jit
def _scaled(codes, scale_ptr, zero_ptr, scale_t, slot, channel, mask, GROUP: tl.constexpr):
    """Codes [slots, channels] as numbers, fp32."""
    at = slot[:, None] * scale_t + channel[None, :] // GROUP
    scale = tl.load(scale_ptr + at, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return codes.to(tl.float32) * scale + zero


@triton.jit
def _channels(x_ptr, x_t, scale_ptr, zero_ptr, scale_t, slot, channel, mask, BITS: tl.constexpr, GROUP: tl.constexpr,
              BYTES: tl.constexpr):  # fmt: skip
    """Some channels of some slots, [slots, channels]: as stored if dense (BITS 0), else fp32."""
    if BITS == 0:
        numbers = tl.load(x_ptr + slot[:, None] * x_t + channel[None, :], mask=mask, other=0.0)
    else:
        codes = tl.load(x_ptr + slot[:, None] * x_t + (channel % BYTES)[None, :], mask=mask, other=0).to(tl.int32)
        if BITS == 4:
            codes = (codes >> (channel // BYTES * 4)[None, :]) & 15
        numbers = _scaled(codes, scale_ptr, zero_ptr, scale_t, slot, channel, mask, GROUP)
    return numbers


@triton.jit
def _two_tiles(x_ptr, x_t, scale_ptr, zero_ptr, scale_t, slot, used, a, b, in_a, in_b, BITS: tl.constexpr,
               GROUP: tl.constexpr, BYTES: tl.constexpr):  # fmt: skip
    """Channels a and b of some slots."""
    mask_a, mask_b = used[:, None] & in_a[None, :], used[:, None] & in_b[None, :]
    one = _channels(x_ptr, x_t, scale_ptr, zero_ptr, scale_t, slot, a, mask_a, BITS, GROUP, BYTES)
    two = _channels(x_ptr, x_t, scale_ptr, zero_ptr, scale_t, slot, b, mask_b, BITS, GROUP, BYTES)
    return one, two


@triton.jit
def _rotate(a, b, cos_ptr, sin_ptr, table_t, position, pair, mask):
    """Pairs (a, b) [rows, pairs] at positions [rows], fp32."""
    at = position[:, None] * table_t + pair[None, :]
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=mask, other=0.0).to(tl.float32)
    a, b = a.to(tl.float32), b.to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _split(
    q_ptr, k_ptr, v_ptr, k_scale, k_zero, v_scale, v_zero, k_table, v_table, cos_ptr, sin_ptr, first_ptr, stop_ptr,
    position_ptr, bias_ptr, part_ptr, lse_ptr,
    slots, stretch, heads, scale, softcap,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, ks_b, ks_h, ks_t, vs_b, vs_h, vs_t, bias_b, bias_h, table_t,
    T: tl.constexpr, G: tl.constexpr, M: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr,
    PAIR_STEP: tl.constexpr, SECOND: tl.constexpr, REST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, SCATTERED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    i, h = head // heads, head % heads
    dot_type = tl.float32 if UPCAST else q_ptr.dtype.element_ty
    first = head * 0
    stop = first + slots
    base = first
    if first_ptr is not None:
        first = tl.load(first_ptr + head).to(tl.int64)
    if stop_ptr is not None:
        stop = tl.load(stop_ptr + head).to(tl.int64)
    if position_ptr is not None:
        base = tl.load(position_ptr + i).to(tl.int64)
    if SCATTERED:  # k_ptr and v_ptr are tables of addresses
        k_ptr = pointer_at(k_ptr + head, q_ptr, ALIGNED)
        v_ptr = pointer_at(v_ptr + head, q_ptr, ALIGNED)
    elif BITS == 0:
        k_ptr += i * k_b + h * k_h
        v_ptr += i * v_b + h * v_h
    else:
        rows = tl.num_programs(1)
        k_ptr, k_scale, k_zero = first_codes(k_ptr, k_scale, k_zero, k_table, head, rows, heads, k_b, k_h, ks_b, ks_h)
        v_ptr, v_scale, v_zero = first_codes(v_ptr, v_scale, v_zero, v_table, head, rows, heads, v_b, v_h, vs_b, vs_h)
    if bias_ptr is not None:
        bias_ptr += i * bias_b + h * bias_h

    row = tl.arange(0, M)
    g, t = row // T, row % T
    real = row < G * T
    q_row = q_ptr + i * q_b + (h * G + g) * q_h + t * q_t
    pair = tl.arange(0, BLOCK_P)
    k_one, k_two = pair * PAIR_STEP, pair * PAIR_STEP + SECOND
    in_one, in_two = pair < PAIRS, (pair < PAIRS) & (k_two < DIM)
    rest = DIM - REST + tl.arange(0, BLOCK_R)
    in_rest = rest < DIM
    q_one = tl.load(q_row[:, None] + k_one[None, :], mask=real[:, None] & in_one[None, :], other=0.0)
    q_two = tl.load(q_row[:, None] + k_two[None, :], mask=real[:, None] & in_two[None, :], other=0.0)
    if cos_ptr is not None:
        at = base + tl.maximum(stop - first - T + t, 0)
        q_one, q_two = _rotate(q_one, q_two, cos_ptr, sin_ptr, table_t, at, pair, real[:, None] & in_one[None, :])
    q_one, q_two = q_one.to(dot_type), q_two.to(dot_type)
    if REST > 0:
        q_rest = tl.load(q_row[:, None] + rest[None, :], mask=real[:, None] & in_rest[None, :], other=0.0)
        q_rest = q_rest.to(dot_type)

    half: tl.constexpr = (DIM + 1) // 2
    v_one = tl.arange(0, BLOCK_V)
    v_two = half + v_one
    in_v_one, in_v_two = v_one < half, v_two < DIM
    most = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    out_one = tl.zeros((M, BLOCK_V), tl.float32)
    out_two = tl.zeros((M, BLOCK_V), tl.float32)
    low = tl.maximum(tl.program_id(0).to(tl.int64) * stretch, first)
    high = tl.minimum((tl.program_id(0).to(tl.int64) + 1) * stretch, stop)
    for start in range(low, high, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        used = slot < high
        one, two = _two_tiles(k_ptr, k_t, k_scale, k_zero, ks_t, slot, used, k_one, k_two, in_one, in_two,
                              BITS, GROUP, BYTES)  # fmt: skip
        if cos_ptr is not None:
            where = base + slot - first
            one, two = _rotate(one, two, cos_ptr, sin_ptr, table_t, where, pair, used[:, None] & in_one[None, :])
        logits = tl.dot(q_one, tl.trans(one.to(dot_type)), input_precision="ieee")
        logits = tl.dot(q_two, tl.trans(two.to(dot_type)), logits, input_precision="ieee")
        if REST > 0:
            other = _channels(k_ptr, k_t, k_scale, k_zero, ks_t, slot, rest, used[:, None] & in_rest[None, :],
                              BITS, GROUP, BYTES)  # fmt: skip
            logits = tl.dot(q_rest, tl.trans(other.to(dot_type)), logits, input_precision="ieee")
        logits *= scale
        if CAPPED:
            logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)  # tanh
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + slot, mask=used, other=0.0).to(tl.float32)[None, :]
        seen = used[None, :] & (slot[None, :] < stop - (T - 1 - t)[:, None])
        logits = tl.where(seen, logits * 1.4426950408889634, float("-inf"))  # log2(e): powers of two from here on
        new_most = tl.maximum(most, tl.max(logits, 1))
        ground = tl.where(new_most == float("-inf"), 0.0, new_most)
        weight = tl.exp2(logits - ground[:, None])
        fade = tl.exp2(most - ground)
        most = new_most
        total = total * fade + tl.sum(weight, 1)
        one, two = _two_tiles(v_ptr, v_t, v_scale, v_zero, vs_t, slot, used, v_one, v_two, in_v_one, in_v_two,
                              BITS, GROUP, BYTES)  # fmt: skip
        weight = weight.to(dot_type)
        out_one = tl.dot(weight, one.to(dot_type), out_one * fade[:, None], input_precision="ieee")
        out_two = tl.dot(weight, two.to(dot_type), out_two * fade[:, None], input_precision="ieee")

    at = (head * tl.num_programs(0) + tl.program_id(0)) * (G * T) + row
    share = 1.0 / tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, most + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + at, lse, mask=real)
    place = part_ptr + at[:, None] * DIM
    tl.store(place + v_one[None, :], out_one * share[:, None], mask=real[:, None] & in_v_one[None, :])
    tl.store(place + v_two[None, :], out_two * share[:, None], mask=real[:, None] & in_v_two[None, :])


@triton.jit
def _merge(part_ptr, lse_ptr, out_ptr, splits, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
           BLOCK_S: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, r = row // ROWS, row % ROWS
    dim = tl.arange(0, BLOCK_D)
    most = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    out = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        at = (head * splits + split) * ROWS + r
        lse = tl.load(lse_ptr + at, mask=split < splits, other=float("-inf"))
        mask = (split < splits)[:, None] & (dim < DIM)[None, :]
        part = tl.load(part_ptr + at[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
        new_most = tl.maximum(most, tl.max(lse, 0))
        ground = tl.where(new_most == float("-inf"), 0.0, new_most)
        weight = tl.exp2(lse - ground)
        fade = tl.exp2(most - ground)
        most = new_most
        total = total * fade + tl.sum(weight, 0)
        out = out * fade + tl.sum(weight[:, None] * part, 0)
    out = out / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < DIM)


@dataclass(frozen=True)
class Tile:
    """How a kernel is laid out; results differ in rounding only. benchmarks/kernel_speed.py --sweep tries others."""

    slots: int  # at once
    stretch: int | None = None  # slots of a program; None: by the number of multiprocessors
    warps: int = 4
    stages: int = 2  # of slots on their way; `_split_codes` always has the next one in registers
    registers: int = REGISTERS  # of a thread of `_split_codes`


def default_tile(dim: int, element_size: int, *, coded: bool = False) -> Tile:
    """At most 16 KB of keys at once; as they are, two further blocks are on their way meanwhile."""
    return Tile(64 if next_power_of_2(dim) * element_size <= 256 else 32, stages=2 if coded else 3)


def codes_tile(dim: int, bits: int) -> Tile:
    """Of `_split_codes`: what was fastest on an H200 at Llama-3.1-8B's shape. One warp waits for no other."""
    if dim > 128:
        return Tile(32)
    return Tile(16, warps=1) if bits == 4 else Tile(32, warps=2)


def decode_attention_triton(
    q: Tensor, k: Slab, v: Slab, scale: float, span: Span, angles: Angles | None,
    softcap: float | None, bias: Tensor | None, *, out: Tensor | None = None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """`decode_attention`, into `out` (contiguous, like q) if given.

    Shapes decide the launches, so that they can be captured in a CUDA graph.
    """
    batch, num_q, t, dim = q.shape
    k_x, k_scale, k_zero = _parts(k)
    v_x, v_scale, v_zero = _parts(v)
    heads, slots = (k.heads, k.slots) if isinstance(k, Scattered) else k_x.shape[1:3]
    rows = num_q // heads * t
    coded = k if isinstance(k, Codes) and fits(q, k, v, angles) else None
    if tile is None:
        tile = default_tile(dim, q.element_size(), coded=isinstance(k, Codes)) if coded is None else (
            codes_tile(dim, coded.bits)
        )  # fmt: skip
    cut = k.stretch if isinstance(k, Scattered) else None
    stretch = tile.stretch or cut or _stretch(slots, batch * heads, tile.slots, q.device)
    splits = cdiv(slots, stretch)
    if coded is not None and not tile.stretch:
        at_once = per_multiprocessor(tile.warps, tile.registers) * _processors(q.device)
        splits = splits_of(slots, batch * heads, tile.slots, at_once)
    part = torch.empty(batch * heads, splits, rows, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch * heads, splits, rows, dtype=torch.float32, device=q.device)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q = _rows(q)
    bias = None if bias is None else _rows(bias)
    if coded is not None:
        assert isinstance(v, Codes)
        shape = (tile.slots, tile.warps, tile.registers)
        split_codes(q, coded, v, scale, span, angles, softcap, bias, part, lse, *shape)
    else:
        fixed = constants(dim, num_q // heads, t, tile.slots, k, angles)
        fixed |= dict(CAPPED=softcap is not None, UPCAST=INTERPRETED and q.dtype == torch.bfloat16)
        fixed |= dict(SCATTERED=isinstance(k, Scattered), ALIGNED=isinstance(k, Scattered) and k.aligned)
        cos, sin = (None, None) if angles is None else (_rows(angles.cos), _rows(angles.sin))
        first, stop, position = (
            None if x is None else x.contiguous() for x in (span.first_unit, span.stop, span.first_position)
        )
        _split[(splits, batch * heads)](
            q, k_x, v_x, k_scale, k_zero, v_scale, v_zero, _table(k), _table(v), cos, sin, first, stop, position, bias,
            part, lse,
            slots, stretch, heads, scale, softcap or 0.0,
            *q.stride()[:3], *_steps(k, k_x), *_steps(v, v_x), *_strides(k_scale), *_strides(v_scale),
            *((0, 0) if bias is None else bias.stride()[:2]), 0 if cos is None else cos.stride(0),
            **fixed, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    block_d = next_power_of_2(dim)
    at_once = min(max(next_power_of_2(splits), 16), max(MERGED // block_d, 16))
    _merge[(batch * num_q * t,)](
        part, lse, out, splits, ROWS=rows, DIM=dim, BLOCK_D=block_d, BLOCK_S=at_once,
        num_warps=4 if at_once * block_d <= 4096 else 8,
    )  # fmt: skip
    return out


def constants(dim: int, groups: int, t: int, block: int, k: Slab, angles: Angles | None) -> dict[str, int | bool]:
    """What `_split` is compiled for. block: slots at once."""
    pairs = (dim + 1) // 2 if angles is None else angles.cos.shape[1]
    interleaved = angles is not None and angles.interleaved
    rest = 0 if angles is None else dim - 2 * pairs
    bits = k.bits if isinstance(k, Codes) else 0
    group = dim // k.scale.shape[3] if isinstance(k, Codes) else 1
    block_v = max(16, next_power_of_2((dim + 1) // 2))
    return dict(
        T=t, G=groups, M=max(16, next_power_of_2(groups * t)), DIM=dim, PAIRS=pairs,
        PAIR_STEP=2 if interleaved else 1, SECOND=1 if interleaved else pairs, REST=rest,
        BLOCK_P=max(16, next_power_of_2(pairs)), BLOCK_R=max(16, next_power_of_2(rest)),
        BLOCK_V=block_v, BLOCK_N=block,
        BITS=bits, GROUP=group, BYTES=dim * max(bits, 1) // 8 or 1,
    )  # fmt: skip


def _stretch(slots: int, heads: int, block: int, device: torch.device) -> int:
    """Two programs a multiprocessor; with many heads more, so that the last ones do not run alone for long."""
    wanted = cdiv(2 * _processors(device), heads)
    return min(cdiv(cdiv(slots, wanted), block) * block, LONGEST_STRETCH)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _parts(x: Slab) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if isinstance(x, Scattered):
        return x.table, None, None
    if not isinstance(x, Codes):
        return _rows(x), None, None
    scale, zero = _rows(x.scale), _rows(x.zero)
    if scale.stride() != zero.stride():
        scale, zero = scale.contiguous(), zero.contiguous()
    return _rows(x.codes), scale, zero


def _table(x: Slab) -> Tensor | None:
    return x.table if isinstance(x, Codes) else None


def _rows(x: Tensor) -> Tensor:
    """A row's numbers lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _steps(x: Slab, numbers: Tensor) -> tuple[int, ...]:
    """From row to row, head to head and unit to unit; a table has the first two in it."""
    return (0, 0, x.head_dim) if isinstance(x, Scattered) else numbers.stride()[:3]


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]
