"""`decode_attention` over codes in Triton, bfloat16, for the head dims and groups of most models (`fits`).

Meaning and shapes: decode_attention.py. As `_split` does, a program takes a row, a KV head and a stretch of slots, and
`_merge` puts the stretches together. What differs is how codes become numbers, which costs more than reading them:

    words     Codes are loaded 4 bytes at a time. 16 bits that are an integer n below 256 are n * 2**-133 in bfloat16,
              exactly (subnormal numbers, and the smallest of the others, at the same distances). So bytes that a
              permutation parts, or their halves behind a mask, are numbers already, two in a register, and one
              instruction decodes them: * scale + zero, with 2**133 in the scale. So that this is a number, all are held
              at 2**-64 of their value (`SHRINK`); queries and results take it back (powers of two).
    pairs     A word has both channels of RoPE's pairs (8 bits: two words), so they turn where they are, two at once.
    angles    R(q) . R(k) depends on the difference of the positions only. Queries are rotated once, by their distance
              from the stretch's first slot, and keys by theirs: a few hundred angles, which the L1 cache holds, where
              those of all positions would come from the L2 cache, more bytes than the codes, for every head.
    channels  The order of channels in a dot product is free. It is the one in which threads load words, so keys go from
              registers to tensor cores without a detour through shared memory.
    columns   Tensor cores have tiles of 16 x 8. Up to 8 queries are their columns and slots the rows: the other way
              round most models would pay for 12 rows of padding out of 16, in products and in the softmax. A warp's
              rows are slots that it loaded (`_dealt`).

Rounding: numbers are rounded to bfloat16 after decoding, as `Codes.decode` does, and rotated as a product with the sine
and a fused multiply-add, each rounded, as models do that rotate in bfloat16.

Shapes: N slots at a time, M padded rows, C lanes of a unit, each with E words of a half of the channels.
"""

# mypy: disable-error-code="no-untyped-def"
# a kernel's parameters are pointers, numbers and compile-time constants

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from locret.kernels.decode_attention import Angles, Codes, Slab, Span
from locret.kernels.scattered_triton import first_codes
from locret.kernels.sizes import cdiv, next_power_of_2

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then there is no PTX
HEAD_DIMS = (64, 128, 256)
REGISTERS = 168  # of a thread, at most: three programs of 4 warps on a multiprocessor
LONGEST_STRETCH = 1024  # slots whose angles stay near


SHRINK = tl.constexpr(2.0**-64)  # of decoded numbers: those below 2**-62 lose digits, scales may be up to 2**58
GROW = tl.constexpr(2.0**64)


# ---------------------------------------------------------------------- codes to numbers, in PTX


def _program(bits: int, *, rotated: bool, subtracts: bool) -> str:
    """Four channels of either half, $0 .. $7, in the order of `_decoded`'s arguments from $8 on.

    subtracts: for compute capability 9.0 and later, where a product and a difference become one instruction.
    """
    names = ("a0", "a1", "b0", "b1")
    lines = ["mov.b32 none, 0x80008000;"]
    if bits == 4:  # channels 0 1 and 2 3 of both halves from one word: the second half's codes stay 16 times as large
        lines += ["prmt.b32 t, $8, 0, 0x4140;", "prmt.b32 u, $8, 0, 0x4342;"]
        masks = ("0x000F000F", "0x000F000F", "0x00F000F0", "0x00F000F0")
        lines += [f"and.b32 {x}, {y}, {mask};" for x, y, mask in zip(names, "tutu", masks, strict=True)]
    else:
        sources = ("$8, 0, 0x4140", "$8, 0, 0x4342", "$9, 0, 0x4140", "$9, 0, 0x4342")
        lines += [f"prmt.b32 {x}, {source};" for x, source in zip(names, sources, strict=True)]
    levels = ("$10, $11", "$10, $11", "$12, $13", "$12, $13")
    lines += [f"fma.rn.bf16x2 {x}, {x}, {level};" for x, level in zip(names, levels, strict=True)]
    for i in range(2 if rotated else 0):
        cos, sin = f"${14 + i}", f"${16 + i}"
        lines += [f"fma.rn.bf16x2 u, a{i}, {sin}, none;", f"fma.rn.bf16x2 t, b{i}, {sin}, none;"]
        if subtracts:  # not .rn: the assembler may fuse them, and does (`enable_fp_fusion`)
            lines += [f"mul.bf16x2 a{i}, a{i}, {cos};", f"sub.bf16x2 a{i}, a{i}, t;"]
        else:
            lines += ["neg.bf16x2 t, t;", f"fma.rn.bf16x2 a{i}, a{i}, {cos}, t;"]
        lines += [f"fma.rn.bf16x2 b{i}, b{i}, {cos}, u;"]
    lines += [f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, {x};" for i, x in enumerate(names)]
    return "{ .reg .b32 t, u, none, a0, a1, b0, b1; " + " ".join(lines) + " }"


def _twice_times(exponent: int) -> str:
    """A 16-bit number times 2**exponent, in both halves of 32 bits."""
    factor = (exponent + 127) << 7
    lines = [f"mov.b32 factor, 0x{factor * 65537:08X};", "mov.b32 none, 0x80008000;", "mov.b32 x, {$1, $1};",
             "fma.rn.bf16x2 $0, x, factor, none;"]  # fmt: skip
    return "{ .reg .b32 factor, none, x; " + " ".join(lines) + " }"


PROGRAMS = {
    (bits, rotated, subtracts): _program(bits, rotated=rotated, subtracts=subtracts)
    for bits in (4, 8) for rotated in (False, True) for subtracts in (False, True)
}  # fmt: skip
FORM = tl.constexpr(",".join(["=h"] * 8 + ["r"] * 10))
ZERO = tl.constexpr(_twice_times(-64))
SCALE = tl.constexpr(_twice_times(133 - 64))
SCALE_16 = tl.constexpr(_twice_times(133 - 64 - 4))  # of codes that stay 16 times as large


@triton.jit
def _half(pair, SECOND: tl.constexpr):
    """One of two bfloat16 numbers in an int32, as fp32."""
    return ((pair & -65536) if SECOND else (pair << 16)).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x):
    """fp32 to the nearest number that bfloat16 has, ties to even. (Triton's interpreter cuts off.)"""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _number(word, scale, zero, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """A code as a number that bfloat16 has, times `SHRINK`, in fp32."""
    code = ((word >> SHIFT) & (2**BITS - 1)).to(tl.float32)
    return _rounded(code * _half(scale, False) + _half(zero, False)) * SHRINK


@triton.jit
def _turned(a, b, cos, sin, SECOND: tl.constexpr):
    c, s = _half(cos, SECOND), _half(sin, SECOND)
    return _rounded(a * c - _rounded(b * s)), _rounded(b * c + _rounded(a * s))


@triton.jit
def _twice(x, C: tl.constexpr, PROGRAM: tl.constexpr):
    """16-bit numbers [N C] in both halves of an int32, [N, C, 1]; by PTX also times a power of two."""
    if PROGRAM is None:
        twice = (x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 65537
    else:
        twice = tl.inline_asm_elementwise(PROGRAM, "=r,h", [x], tl.int32, is_pure=True, pack=1)
    return tl.reshape(twice, (x.shape[0] // C, C, 1))


@triton.jit
def _join(a, b, c, d):
    """[N, C, E] four times -> [N, C, E, 2, 2], a b c d in the last two."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _decoded(one, two, s1, z1, s2, z2, c01, c23, s01, s23, C: tl.constexpr, BITS: tl.constexpr,
             ROTATED: tl.constexpr, PROGRAM: tl.constexpr):  # fmt: skip
    """Words [N, C, E] as bfloat16 numbers of both halves times `SHRINK`, [N, C, E, 2, 2] each.

    one, two: words of the halves, the same at 4 bits. s1, z1, s2, z2: their scales and zeros, [N C].
    c01 .. s23: cosines and sines, two in an int32, read if ROTATED. PROGRAM: PTX; None: what it does, in Triton.
    """
    if PROGRAM is None:
        s1, z1, s2, z2 = _twice(s1, C, None), _twice(z1, C, None), _twice(s2, C, None), _twice(z2, C, None)
        UP: tl.constexpr = 4 if BITS == 4 else 0
        a, b = _number(one, s1, z1, 0, BITS), _number(one, s1, z1, 8, BITS)
        c, d = _number(one, s1, z1, 16, BITS), _number(one, s1, z1, 24, BITS)
        w, x = _number(two, s2, z2, UP, BITS), _number(two, s2, z2, UP + 8, BITS)
        y, z = _number(two, s2, z2, UP + 16, BITS), _number(two, s2, z2, UP + 24, BITS)
        if ROTATED:
            a, w = _turned(a, w, c01, s01, False)
            b, x = _turned(b, x, c01, s01, True)
            c, y = _turned(c, y, c23, s23, False)
            d, z = _turned(d, z, c23, s23, True)
    else:
        s1, z1, z2 = _twice(s1, C, SCALE), _twice(z1, C, ZERO), _twice(z2, C, ZERO)
        s2 = _twice(s2, C, SCALE_16 if BITS == 4 else SCALE)
        a, b, c, d, w, x, y, z = tl.inline_asm_elementwise(
            PROGRAM, FORM, [one, two, s1, z1, s2, z2, c01, c23, s01, s23],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
             tl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
    return _join(a, b, c, d).to(tl.bfloat16), _join(w, x, y, z).to(tl.bfloat16)


@triton.jit
def _words(x_ptr, slot, C: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr, BITS: tl.constexpr):
    """Words of both halves, [N, C, E]; at 4 bits one word is of both."""
    place = x_ptr + slot[:, None] * UNIT + tl.arange(0, C * E)[None, :]
    one = tl.load(place, cache_modifier=".cg")  # the L1 cache is for angles
    two = one
    if BITS == 8:
        two = tl.load(place + C * E, cache_modifier=".cg")
    return _lanes(one, C, E), _lanes(two, C, E)


@triton.jit
def _lanes(x, C: tl.constexpr, E: tl.constexpr):
    """[N, C E] -> [N, C, E]. Loaded as [N, C E], so that a thread's neighbours have the unit's other words."""
    return tl.reshape(x, (x.shape[0], C, E))


@triton.jit
def _levels(scale_ptr, zero_ptr, step, slot, C: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr):
    """Scale and zero of a lane's channels in the first half, then in the second, [N C] each. slot: [N C]."""
    group = slot * step + tl.arange(0, slot.shape[0]) % C * (4 * E) // GROUP
    scales, zeros = scale_ptr + group, zero_ptr + group
    HALF: tl.constexpr = 4 * C * E // GROUP
    return tl.load(scales), tl.load(zeros), tl.load(scales + HALF), tl.load(zeros + HALF)


@triton.jit
def _angle_words(ptr, step, at, C: tl.constexpr, E: tl.constexpr):
    """A lane's 2 E words of cosines or sines at positions [N], in two loads: [N, C, E] twice."""
    word = tl.arange(0, C * E)
    place = ptr + at[:, None] * step + (word // E * (2 * E) + word % E)[None, :]
    return _lanes(tl.load(place), C, E), _lanes(tl.load(place + E), C, E)


@triton.jit
def _spread(near, far, N: tl.constexpr, C: tl.constexpr, E: tl.constexpr):
    """A lane's 2 E words of angles, in two tensors of E, as channels 0 1 and channels 2 3 of its E words of codes."""
    both = tl.reshape(tl.permute(tl.join(near, far), (0, 1, 3, 2)), (N, C, E, 2))
    return tl.split(both)


@triton.jit
def _wall(x, PROGRAM: tl.constexpr):
    """x, and nothing is seen of where it comes from: behind joins Triton arranges tensor cores' operands otherwise."""
    if PROGRAM is None:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.bfloat16, is_pure=False, pack=2)


@triton.jit
def _of_queries(x, COLUMNS: tl.constexpr):
    """One number a query, beside [queries, others]; COLUMNS: beside [others, queries]."""
    if COLUMNS:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def _of_others(x, COLUMNS: tl.constexpr):
    """One number a slot or channel, beside the same."""
    if COLUMNS:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def _dot_keys(q, k, logits, COLUMNS: tl.constexpr):
    """logits [queries, slots] or [slots, queries] + q . k. q: [queries, channels] or [channels, queries]."""
    if COLUMNS:
        return tl.dot(k.to(q.dtype), q, logits, input_precision="ieee")
    else:
        return tl.dot(q, tl.trans(k.to(q.dtype)), logits, input_precision="ieee")


@triton.jit
def _dot_values(weight, v, out, COLUMNS: tl.constexpr):
    """out [queries, channels] or [channels, queries] + weight . v."""
    if COLUMNS:
        return tl.dot(tl.trans(v.to(weight.dtype)), weight, out, input_precision="ieee")
    else:
        return tl.dot(weight, v.to(weight.dtype), out, input_precision="ieee")


@triton.jit
def _dealt(x, DEALT: tl.constexpr):
    """[N, X], slots in an order in which every 16 are of one warp, as tensor cores have rows: it loaded 8 at a time.

    DEALT: to how many warps; 0: slots stay in order.
    """
    if DEALT:
        ordered = tl.reshape(x, (x.shape[0] // (16 * DEALT), 2, DEALT, 8, x.shape[1]))
        return tl.reshape(tl.permute(ordered, (0, 2, 1, 3, 4)), x.shape)
    else:
        return x


@triton.jit
def _dealt_slots(N: tl.constexpr, DEALT: tl.constexpr):
    """Which slots `_dealt` has, [N]."""
    at = tl.arange(0, N)
    if DEALT:
        at = at // (16 * DEALT) * (16 * DEALT) + at // 8 % 2 * (8 * DEALT) + at // 16 % DEALT * 8 + at % 8
    return at


@triton.jit
def _split_codes(
    q_ptr, k_ptr, v_ptr, k_scale, k_zero, v_scale, v_zero, k_table, v_table, cos_ptr, sin_ptr, cos_words, sin_words,
    first_ptr, stop_ptr, bias_ptr, part_ptr, lse_ptr,
    slots, heads, scale, softcap,
    q_b, q_h, q_t, k_b, k_h, v_b, v_h, ks_b, ks_h, ks_t, vs_b, vs_h, vs_t, bias_b, bias_h, table_t,
    T: tl.constexpr, G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr, COLUMNS: tl.constexpr,
    DEALT: tl.constexpr, K_PROGRAM: tl.constexpr, V_PROGRAM: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = 4 * C * E
    UNIT: tl.constexpr = 2 * HALF * BITS // 32
    ROTATED: tl.constexpr = cos_ptr is not None
    LOG2E: tl.constexpr = 1.4426950408889634  # logits in powers of two
    dot_type = tl.float32 if UPCAST else tl.bfloat16
    head = tl.program_id(1).to(tl.int64)
    i, h = head // heads, head % heads
    first = head * 0
    stop = first + slots
    if first_ptr is not None:
        first = tl.load(first_ptr + head).to(tl.int64)
    if stop_ptr is not None:
        stop = tl.load(stop_ptr + head).to(tl.int64)
    part, parts, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.cdiv(slots, N)
    low = tl.maximum(part * blocks // parts * N, first)  # as many blocks as any other program, give or take one
    high = tl.minimum((part + 1) * blocks // parts * N, stop)
    # from here on slots are counted from `low`, in 32 bits; what would be read behind the last one is read there
    units = tl.maximum(high - low, 0).to(tl.int32)
    last = tl.maximum(units - 1, 0)
    low = tl.minimum(low, slots - 1)  # a stretch without units reads one that nobody sees
    rows = tl.num_programs(1)
    k_ptr, k_scale, k_zero = first_codes(k_ptr, k_scale, k_zero, k_table, head, rows, heads, k_b, k_h, ks_b, ks_h)
    v_ptr, v_scale, v_zero = first_codes(v_ptr, v_scale, v_zero, v_table, head, rows, heads, v_b, v_h, vs_b, vs_h)
    k_ptr = tl.multiple_of(k_ptr + low * UNIT, 16)
    v_ptr = tl.multiple_of(v_ptr + low * UNIT, 16)
    k_scale += low * ks_t
    k_zero += low * ks_t
    v_scale += low * vs_t
    v_zero += low * vs_t
    if bias_ptr is not None:
        bias_ptr += i * bias_b + h * bias_h + low

    # queries, their channels in the order that keys have below: words, lanes, a word's channels
    row = tl.arange(0, M)
    g, t = row // T, row % T
    real = row < G * T
    at = tl.arange(0, HALF)
    channel = at // 2 % C * (4 * E) + at // (4 * C) * 4 + at // (2 * C) % 2 * 2 + at % 2
    q_row = q_ptr + i * q_b + (h * G + g) * q_h + t * q_t
    q_at = _of_queries(q_row, COLUMNS) + _of_others(channel, COLUMNS)
    shown = _of_queries(real, COLUMNS)
    q_one, q_two = tl.load(q_at, mask=shown, other=0.0), tl.load(q_at + HALF, mask=shown, other=0.0)
    q_one, q_two = q_one.to(tl.float32), q_two.to(tl.float32)
    factor = 2 * scale / softcap if CAPPED else scale * LOG2E  # queries that are rounded anyway take it in
    if ROTATED:
        ahead = tl.maximum(stop - T + t - low, 0)  # a query whose own unit lies before this stretch sees nothing of it
        place = _of_queries(ahead, COLUMNS) * (2 * table_t) + _of_others(channel, COLUMNS)
        cos = tl.load(cos_ptr + place, mask=shown, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + place, mask=shown, other=0.0).to(tl.float32)
        q_one, q_two = factor * (q_one * cos - q_two * sin), factor * (q_two * cos + q_one * sin)
    q_one, q_two = (q_one * GROW).to(dot_type), (q_two * GROW).to(dot_type)

    visible = tl.minimum(units, stop - (T - 1 - t) - low).to(tl.int32)
    most = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((N, M) if COLUMNS else (M, N), tl.float32)
    out_one = tl.zeros((HALF, M) if COLUMNS else (M, HALF), tl.float32)
    out_two = tl.zeros((HALF, M) if COLUMNS else (M, HALF), tl.float32)
    SLOTS: tl.constexpr = 0 if COLUMNS else 1  # their axis
    dealt = _dealt_slots(N, DEALT)
    step, lane_step = tl.arange(0, N), tl.arange(0, N * C) // C
    own = tl.minimum(lane_step, last)
    slot = tl.minimum(step, last)  # of the first block; every block fetches the next one's
    k_one, k_two = _words(k_ptr, slot, C, E, UNIT, BITS)
    v_one, v_two = _words(v_ptr, slot, C, E, UNIT, BITS)
    k_s1, k_z1, k_s2, k_z2 = _levels(k_scale, k_zero, ks_t, own, C, E, GROUP)
    v_s1, v_z1, v_s2, v_z2 = _levels(v_scale, v_zero, vs_t, own, C, E, GROUP)
    for start in range(0, units, N):
        c01, c23, s01, s23 = k_one, k_one, k_one, k_one
        if ROTATED:
            where = start + step
            cos_near, cos_far = _angle_words(cos_words, table_t, where, C, E)
            sin_near, sin_far = _angle_words(sin_words, table_t, where, C, E)
            c01, c23 = _spread(cos_near, cos_far, N, C, E)
            s01, s23 = _spread(sin_near, sin_far, N, C, E)
        one, two = _decoded(k_one, k_two, k_s1, k_z1, k_s2, k_z2, c01, c23, s01, s23, C, BITS, ROTATED, K_PROGRAM)
        one = _wall(_dealt(tl.reshape(tl.permute(one, (0, 2, 3, 1, 4)), (N, HALF)), DEALT), K_PROGRAM)
        two = _wall(_dealt(tl.reshape(tl.permute(two, (0, 2, 3, 1, 4)), (N, HALF)), DEALT), K_PROGRAM)
        logits = _dot_keys(q_one, one, None, COLUMNS)
        logits = _dot_keys(q_two, two, logits, COLUMNS)
        next_slot, next_own = tl.minimum(start + N + step, last), tl.minimum(start + N + lane_step, last)
        k_one, k_two = _words(k_ptr, next_slot, C, E, UNIT, BITS)
        k_s1, k_z1, k_s2, k_z2 = _levels(k_scale, k_zero, ks_t, next_own, C, E, GROUP)
        if not ROTATED:
            logits *= factor
        if CAPPED:
            logits = (softcap * LOG2E) * (2 * tl.sigmoid(logits) - 1)  # tanh
        at_slot = start + dealt
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + at_slot, mask=at_slot < units, other=0.0).to(tl.float32)
            logits += _of_others(LOG2E * bias, COLUMNS)
        seen = _of_others(at_slot, COLUMNS) < _of_queries(visible, COLUMNS)
        logits = tl.where(seen, logits, float("-inf"))
        new_most = tl.maximum(most, tl.max(logits, SLOTS))
        ground = tl.where(new_most == float("-inf"), 0.0, new_most)
        weight = tl.exp2(logits - _of_queries(ground, COLUMNS))
        fade = _of_queries(tl.exp2(most - ground), COLUMNS)
        most = new_most
        total = total * fade + weight
        one, two = _decoded(v_one, v_two, v_s1, v_z1, v_s2, v_z2, v_one, v_one, v_one, v_one, C, BITS, False, V_PROGRAM)
        one = _wall(_dealt(tl.reshape(one, (N, HALF)), DEALT), V_PROGRAM)
        two = _wall(_dealt(tl.reshape(two, (N, HALF)), DEALT), V_PROGRAM)
        weight = weight.to(dot_type)
        out_one = _dot_values(weight, one, out_one * fade, COLUMNS)
        out_two = _dot_values(weight, two, out_two * fade, COLUMNS)
        v_one, v_two = _words(v_ptr, next_slot, C, E, UNIT, BITS)
        v_s1, v_z1, v_s2, v_z2 = _levels(v_scale, v_zero, vs_t, next_own, C, E, GROUP)

    whole = tl.sum(total, SLOTS)
    place = (head * tl.num_programs(0) + tl.program_id(0)) * (G * T) + row
    share = GROW / tl.where(whole > 0, whole, 1.0)
    lse = tl.where(whole > 0, most + tl.log2(tl.where(whole > 0, whole, 1.0)), float("-inf"))
    tl.store(lse_ptr + place, lse, mask=real)
    out = part_ptr + _of_queries(place, COLUMNS) * (2 * HALF) + _of_others(at, COLUMNS)
    tl.store(out, out_one * _of_queries(share, COLUMNS), mask=shown)
    tl.store(out + HALF, out_two * _of_queries(share, COLUMNS), mask=shown)


def fits(q: Tensor, k: Slab, v: Slab, angles: Angles | None) -> bool:
    """Whether this kernel takes them: bfloat16, whole groups in every lane, everything aligned to 16 bytes."""
    if not (isinstance(k, Codes) and isinstance(v, Codes)) or q.dtype != torch.bfloat16 or q.shape[3] not in HEAD_DIMS:
        return False
    dim = q.shape[3]
    lane = dim // 2 // _lanes_of(dim)[0]  # channels
    for x in (k, v):
        group = dim // x.scale.shape[3]
        if x.bits != k.bits or x.scale.dtype != q.dtype or x.scale.stride() != x.zero.stride():
            return False
        if group % lane or dim // 2 % group or group != dim // k.scale.shape[3]:
            return False
        if x.codes.stride()[2:] != (dim * x.bits // 8, 1) or not _aligned(x.codes):
            return False
    if angles is None:
        return True
    tables = (angles.cos, angles.sin)
    whole = not angles.interleaved and 2 * angles.cos.shape[1] == dim and angles.cos.stride() == angles.sin.stride()
    return whole and all(x.dtype == q.dtype and x.stride(1) == 1 and _aligned(x) for x in tables)


def _aligned(x: Tensor) -> bool:
    """Rows of the last dimension begin at multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(step * x.element_size() % 16 == 0 for step in x.stride()[:-1])


def _lanes_of(dim: int) -> tuple[int, int]:
    """Lanes that share a unit, and words of a half that each has: 4, as tensor cores have it, unless words are many."""
    words = min(4, dim // 32)
    return dim // 8 // words, words


def splits_of(slots: int, heads: int, block: int, at_once: int) -> int:
    """Programs of a head: of as many rounds as it takes, `at_once` of them run, all rounds full."""
    blocks, rounds = cdiv(slots, block), 1
    while True:
        splits = min(blocks, max(1, at_once * rounds // heads))
        if cdiv(blocks, splits) * block <= max(LONGEST_STRETCH, block):
            return splits
        rounds += 1


def per_multiprocessor(warps: int, registers: int) -> int:
    """Programs that one runs at a time: it has 65,536 registers."""
    return max(1, 65_536 // (32 * warps * registers))


@functools.cache
def _subtracts(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def constants(
    dim: int, groups: int, t: int, block: int, warps: int, k: Codes, *, rotated: bool, subtracts: bool
) -> dict[str, int | bool | str | None]:
    """What `_split_codes` is compiled for. block: slots at once. subtracts: the device's capability is 9.0 or more."""
    lanes, words = _lanes_of(dim)
    rows = max(8, next_power_of_2(groups * t))
    columns = rows == 8
    programs = dict(K_PROGRAM=PROGRAMS[k.bits, rotated, subtracts], V_PROGRAM=PROGRAMS[k.bits, False, False])
    return dict(
        T=t, G=groups, M=rows, N=block, C=lanes, E=words, BITS=k.bits, GROUP=dim // k.scale.shape[3],
        UPCAST=INTERPRETED, COLUMNS=columns, DEALT=warps if columns and block % (16 * warps) == 0 else 0,
        **(dict.fromkeys(programs) if INTERPRETED else programs),
    )  # fmt: skip


def split_codes(
    q: Tensor, k: Codes, v: Codes, scale: float, span: Span, angles: Angles | None, softcap: float | None,
    bias: Tensor | None, part: Tensor, lse: Tensor, block: int, warps: int, registers: int,
) -> None:  # fmt: skip
    """Fill `part` [B Hkv, stretches, G T, D] and `lse` [B Hkv, stretches, G T], fp32, for `_merge`.

    Everything has what `fits` asks for; q's and bias's last dimensions are contiguous. A span's first position does not
    matter: only differences of positions do.
    """
    batch, num_q, t, dim = q.shape
    heads, slots = k.codes.shape[1:3]
    first, stop = (None if x is None else x.contiguous() for x in (span.first_unit, span.stop))
    tables = [None] * 4 if angles is None else [
        angles.cos, angles.sin, angles.cos.view(torch.int32), angles.sin.view(torch.int32)]  # fmt: skip
    words = [x.codes.view(torch.int32) for x in (k, v)]
    fixed = constants(
        dim, num_q // heads, t, block, warps, k, rotated=angles is not None, subtracts=_subtracts(q.device)
    )  # fmt: skip
    _split_codes[(part.shape[1], batch * heads)](
        q, *words, k.scale, k.zero, v.scale, v.zero, k.table, v.table, *tables, first, stop, bias, part, lse,
        slots, heads, scale, softcap or 0.0,
        *q.stride()[:3], *words[0].stride()[:2], *words[1].stride()[:2], *k.scale.stride()[:3], *v.scale.stride()[:3],
        *((0, 0) if bias is None else bias.stride()[:2]), 0 if angles is None else angles.cos.stride(0) // 2,
        CAPPED=softcap is not None, **fixed, num_warps=warps, num_stages=1, maxnreg=registers,
    )  # fmt: skip
