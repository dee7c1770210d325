"""Codecs: half a step bounds the error, bytes are counted, and a unit is itself whatever happens to its neighbours.

The references are plain float64 loops over groups and share no code with `locret.storage`.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from locret.errors import ConfigError
from locret.kivi import KiviKeys
from locret.storage import (
    CODECS,
    Affine,
    Dense,
    Stored,
    allocate,
    dequantise,
    get_codec,
    group_size,
    pack,
    quantise,
    stored_bytes,
    unpack,
)
from locret.stores import layer_store
from locret.tail import Newest

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    """Like keys: channels of different size and offset, a few large outliers."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g, dtype=torch.float64)
    x = x * (0.1 + 3 * torch.rand(shape[-1], generator=g, dtype=torch.float64)) + torch.linspace(-5, 5, shape[-1])
    x[..., ::7, 0] *= 20
    return x.to(dtype).to(device)


def reference(x: Tensor, bits: int, group: int) -> tuple[list, list, list]:
    """Codes, scales and zeros of units [n, D], one group after the other."""
    codes, scales, zeros = [], [], []
    for unit in x.double().tolist():
        for start in range(0, len(unit), group):
            part = unit[start : start + group]
            low, high = min(part), max(part)
            scale = (high - low) / (2**bits - 1)
            codes.append([round((value - low) / scale) if scale else 0 for value in part])
            scales.append(scale)
            zeros.append(low)
    return codes, scales, zeros


# ---------------------------------------------------------------------- packing


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_loses_nothing(bits):
    codes = torch.randint(0, 2**bits, (3, 5, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, 24 * bits // 8)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), codes)


def test_packed_bytes_worked_by_hand():
    assert pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 4).tolist() == [1 | 3 << 4, 2 | 4 << 4]
    assert pack(torch.tensor([3, 0, 1, 2], dtype=torch.uint8), 2).tolist() == [3 | 0 << 2 | 1 << 4 | 2 << 6]


# ---------------------------------------------------------------------- affine codes


@pytest.mark.parametrize("group", [4, 8, 24])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_scales_and_zeros_are_those_of_plain_loops(bits, group):
    x = numbers(11, 24, dtype=torch.float64)
    stored = Affine(bits, group).encode(x)
    codes, scales, zeros = reference(x, bits, group)
    assert unpack(stored.parts["codes"], bits).reshape(-1, group).tolist() == codes
    torch.testing.assert_close(stored.parts["scale"].flatten(), torch.tensor(scales, dtype=torch.float64))
    torch.testing.assert_close(stored.parts["zero"].flatten(), torch.tensor(zeros, dtype=torch.float64))


def test_a_group_worked_by_hand():
    """0, 1, 2, 6 in two bits: steps of 2, and 1 lies between two codes (round half to even: 0)."""
    stored = Affine(2, 4).encode(torch.tensor([[0.0, 1.0, 2.0, 6.0]]))
    assert unpack(stored.parts["codes"], 2).tolist() == [[0, 0, 1, 3]]
    assert Affine(2, 4).decode(stored).tolist() == [[0.0, 0.0, 2.0, 6.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_number_misses_by_more_than_half_a_step(bits, dtype):
    x = numbers(2, 3, 40, 64, dtype=dtype)
    codec = Affine(bits, 16)
    stored = codec.encode(x)
    decoded = codec.decode(stored)
    assert decoded.dtype == dtype
    missed = (x.double() - decoded.double()).abs().unflatten(-1, (-1, 16))
    ulp = EPS[dtype] * decoded.double().abs().unflatten(-1, (-1, 16))  # of writing the result down in dtype
    half = stored.parts["scale"].double()[..., None] / 2
    assert (missed <= half * (1 + 1e-5) + ulp + 1e-5 * x.double().abs().max()).all()
    exact = (x.double().unflatten(-1, (-1, 16)).amax(-1) - x.double().unflatten(-1, (-1, 16)).amin(-1)) / (2**bits - 1)
    assert (stored.parts["scale"].double() >= exact * (1 - 1e-6)).all()  # never rounded down: the maximum is reached
    assert (stored.parts["scale"].double() <= exact * (1 + 2 * EPS[dtype]) + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_groups_and_numbers_on_the_grid_are_exact(dtype):
    for value in (0.0, -3.5, 1e-4, 300.0):
        x = torch.full((2, 5, 32), value, dtype=dtype)
        assert torch.equal(Affine(2).decode(Affine(2).encode(x)), x)
    grid = torch.arange(16, dtype=dtype).repeat(3, 2) * 0.5 - 4
    assert torch.equal(Affine(4, 16).decode(Affine(4, 16).encode(grid)), grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantising_what_was_decoded_changes_nothing(bits, dtype):
    """So transformers' QuantizedLayer, which decodes and re-quantises per-token groups, loses time and not accuracy."""
    codec = Affine(bits, 16)
    first = codec.encode(numbers(50, 32, dtype=dtype))
    again = codec.encode(codec.decode(first))
    assert torch.equal(again.parts["codes"], first.parts["codes"])
    torch.testing.assert_close(codec.decode(again), codec.decode(first), rtol=1e-5, atol=1e-5)


def test_more_bits_and_smaller_groups_miss_by_less():
    x = numbers(200, 64)
    errors = [(x - Affine(b, g).decode(Affine(b, g).encode(x))).pow(2).mean() for b, g in
              [(2, 64), (2, 16), (4, 64), (4, 16), (8, 64)]]  # fmt: skip
    assert errors == sorted(errors, reverse=True)


def test_broken_numbers_stay_visible():
    x = numbers(4, 32)
    x[1, 3], x[2, 5] = math.nan, math.inf
    decoded = Affine(4, 16).decode(Affine(4, 16).encode(x))
    assert decoded[1, :16].isnan().all()
    assert not decoded[2, :16].isfinite().all()
    assert decoded[[0, 3]].isfinite().all()
    assert decoded[1:3, 16:].isfinite().all()


# ---------------------------------------------------------------------- HQQ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4])
def test_hqq_is_never_worse_in_its_norm_and_often_better(bits, dtype):
    x = numbers(300, 32, dtype=dtype).unflatten(-1, (-1, 16))

    def norm(fit):
        missed = x.float() - dequantise(*(part.float() for part in quantise(x, bits, fit)))
        return missed.abs().pow(0.7).sum(-1)

    plain, refined = norm("minmax"), norm("hqq")
    assert (refined <= plain * (1 + 1e-5)).all()
    assert (refined < plain * 0.99).float().mean() > 0.25
    codes, scale, zero = quantise(x, bits, "hqq")
    assert torch.equal(scale, quantise(x, bits)[1])  # only the zero moves
    assert codes.max() <= 2**bits - 1
    assert zero.dtype == dtype


def test_hqq_steps_are_those_of_a_plain_loop():
    """Float64, every step in scalar arithmetic, each group keeps its best zero."""
    groups = numbers(60, 8, dtype=torch.float64)
    got = quantise(groups, 2, "hqq")[2].tolist()
    moved = 0
    for x, answer in zip(groups.tolist(), got, strict=True):
        low, high = min(x), max(x)
        scale = (high - low) / 3
        zero, beta, best = low, 10.0, (math.inf, 0.0)
        for _ in range(21):
            codes = [min(3, max(0, round((value - zero) / scale))) for value in x]
            missed = [value - (code * scale + zero) for value, code in zip(x, codes, strict=True)]
            error = sum(abs(e) ** 0.7 for e in missed)
            if error < best[0]:
                best = (error, zero)
            shrunk = [math.copysign(max(0.0, abs(e) - max(abs(e), 1e-12) ** -0.3 / beta), e) for e in missed]
            zero = sum(v - s - c * scale for v, s, c in zip(x, shrunk, codes, strict=True)) / len(x)
            beta *= 1.01
        assert answer == pytest.approx(best[1], rel=1e-9)
        moved += answer != low
    assert moved >= 5


# ---------------------------------------------------------------------- units are independent


@pytest.mark.parametrize("codec", [*CODECS.values(), Affine(4, 8, "hqq")], ids=[*CODECS, "hqq4 in groups of 8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_unit_is_the_same_alone_in_chunks_and_after_evictions(codec, dtype):
    """U9: encoding, then evicting, is evicting, then encoding; bit for bit."""
    x = numbers(2, 2, 60, 32, dtype=dtype)
    keep = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(i))[:17].sort().values
                        for i in range(4)]).view(2, 2, 17)  # fmt: skip
    stored = codec.encode(x)
    whole = codec.decode(stored)
    rows = keep[..., None].expand(2, 2, 17, 32)
    assert torch.equal(codec.decode(stored.gather(keep)), whole.gather(2, rows))
    assert torch.equal(codec.decode(codec.encode(x.gather(2, rows))), whole.gather(2, rows))
    chunks = Stored.cat(codec.encode(piece) for piece in x.split([7, 1, 30, 22], 2))
    assert torch.equal(codec.decode(chunks), whole)
    assert torch.equal(codec.decode(stored[slice(5, 9)]), whole[:, :, 5:9])
    assert torch.equal(codec.decode(codec.encode(x[1:, 1:, 3:4])), whole[1:, 1:, 3:4])


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_slab_holds_what_was_written(codec):
    x = numbers(2, 3, 12, 32, dtype=torch.bfloat16)
    slab = allocate(codec, 2, 3, units=20, head_dim=32, dtype=torch.bfloat16)
    assert len(slab) == 20
    slab.write(0, codec.encode(x[:, :, :5]))
    slab.write(5, codec.encode(x[:, :, 5:]))
    assert torch.equal(codec.decode(slab[slice(0, 12)]), codec.decode(codec.encode(x)))
    assert slab.nbytes == 20 * 6 * stored_bytes(codec, 32, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_counted_from_the_tensors_and_equal_the_formula(dtype):
    """n D b / 8 bytes of codes and two numbers a group (specs: KIVI (f)); dense is D numbers."""
    x = numbers(3, 50, 128, dtype=dtype)
    size = dtype.itemsize
    assert Dense().encode(x).nbytes == x.nbytes == 150 * 128 * size
    for bits in (2, 4, 8):
        for group in (16, 32, 128):
            want = 150 * 128 * bits // 8 + 150 * 2 * size * 128 // group
            assert Affine(bits, group).encode(x).nbytes == want
            assert stored_bytes(Affine(bits, group), 128, dtype) * 150 == want


# ---------------------------------------------------------------------- bad options


def test_bad_options_name_what_is_allowed():
    with pytest.raises(ConfigError, match=r"bits is 5; allowed: 2, 4, 8"):
        Affine(5)
    with pytest.raises(ConfigError, match=r"unknown storage 'int5'; valid: dense, hqq2, .*int2, int4, int8"):
        get_codec("int5")
    with pytest.raises(ConfigError, match=r"group_size 24 does not divide 64; allowed: 1, 2, 4, 8, 16, 32, 64"):
        Affine(4, 24).encode(numbers(3, 64))
    with pytest.raises(ConfigError, match=r"6 codes of 2 bits do not fill whole bytes.*multiple of 4"):
        Affine(2).encode(numbers(3, 6))
    with pytest.raises(ConfigError, match=r"unknown fit 'minmix'.*did you mean 'minmax'"):
        Affine(4, fit="minmix")
    with pytest.raises(ConfigError, match=r"residual 40 is no multiple of 32; allowed: 32, 64"):
        KiviKeys(residual=40)
    with pytest.raises(ConfigError, match="bits is 3"):
        KiviKeys(bits=3)


def test_the_default_group_is_the_largest_divisor_up_to_32():
    assert [group_size(d, None) for d in (8, 16, 40, 64, 80, 96, 128)] == [8, 16, 20, 32, 20, 32, 32]


# ---------------------------------------------------------------------- KIVI's layout


def kivi_keys_reference(x: Tensor, bits: int, group: int, residual: int) -> Tensor:
    """Keys [n, D] in float64: one channel of one group of units after the other."""
    out = x.double().clone()
    for start in range(0, len(x) // residual * residual, group):
        for channel in range(x.shape[1]):
            part = out[start : start + group, channel].tolist()
            low, high = min(part), max(part)
            scale = (high - low) / (2**bits - 1)
            for i, value in enumerate(part):
                out[start + i, channel] = low + scale * (round((value - low) / scale) if scale else 0)
    return out


def held(codec, x: Tensor, sizes: list[int] | None = None):
    """x [B, H, n, D] stored, coming in pieces; (stored, positions)."""
    stored, at = codec.encode(x[:, :, :0]), torch.arange(x.shape[2]).expand(x.shape[:3])
    done = 0
    for piece in x.split(sizes or x.shape[2], 2):
        done += piece.shape[2]
        stored = codec.settle(stored.join(codec.encode(piece)), at[..., :done], newest=done - 1, heads=None,
                              num_heads=x.shape[1], queries=None)  # fmt: skip
    return stored, at


def gathered(stored, keep: Tensor):
    rows = keep[..., None]
    return stored.like({name: x.gather(2, rows.expand(*keep.shape, x.shape[-1])) for name, x in stored.parts.items()})


@pytest.mark.parametrize("n", [1, 7, 16, 40, 70])
def test_kivi_keys_are_those_of_plain_loops(n):
    x = numbers(2, 3, n, 8, dtype=torch.float64)
    codec = KiviKeys(2, 8, 16)
    stored, _ = held(codec, x)
    assert len(stored) == n
    for b in range(2):
        for h in range(3):
            torch.testing.assert_close(codec.decode(stored)[b, h], kivi_keys_reference(x[b, h], 2, 8, 16))


def test_a_group_of_keys_worked_by_hand():
    """Two bits, four units: channel 0 spans 0 .. 3, so steps of 1; channel 1 is constant; channel 2 spans 2 .. 8."""
    x = torch.tensor([[0.0, 1, 2, 0], [1.4, 1, 8, 0], [2.6, 1, 4.9, 0], [3.0, 1, 5.1, 0], [9.9, 9, 9, 9]])
    codec = KiviKeys(2, 4, 4)
    stored, _ = held(codec, x.view(1, 1, 5, 4))
    want = [[0.0, 1, 2, 0], [1.0, 1, 8, 0], [3.0, 1, 4, 0], [3.0, 1, 6, 0], [9.9, 9, 9, 9]]
    torch.testing.assert_close(codec.decode(stored)[0, 0], torch.tensor(want))
    assert stored.tables["scale"].tolist() == [[1.0, 0.0, 2.0, 0.0]]
    assert stored.tables["zero"].tolist() == [[0.0, 1.0, 2.0, 0.0]]


@pytest.mark.parametrize("n", [1, 7, 16, 40])
def test_kivi_values_are_quantised_per_unit_as_they_age(n):
    x = numbers(1, 2, n, 16)
    codec, old = Newest(Affine(4, 8), 16), max(0, n - 16)
    got = codec.decode(held(codec, x)[0])
    assert torch.equal(got[:, :, old:], x[:, :, old:])
    assert torch.equal(got[:, :, :old], Affine(4, 8).decode(Affine(4, 8).encode(x[:, :, :old])))


@pytest.mark.parametrize("sizes", [[70], [1] * 70, [33, 16, 21], [16, 54]])
def test_how_units_came_in_makes_no_difference(sizes):
    x = numbers(2, 2, 70, 16, dtype=torch.bfloat16)
    for codec in (KiviKeys(2, 8, 16), Newest(Affine(2, 8), 16)):
        whole, parts = held(codec, x)[0], held(codec, x, sizes)[0]
        assert torch.equal(codec.decode(parts), codec.decode(whole))
        assert parts.nbytes == whole.nbytes


@pytest.mark.parametrize("share", [1.0, 0.3, 0.05])
def test_evicting_changes_no_other_unit(share):
    """Eviction across groups of keys: those that stay decode to the bits they had, and may be evicted from again."""
    x = numbers(2, 3, 150, 16)
    g = torch.Generator().manual_seed(2)
    for codec in (KiviKeys(2, 8, 32), Newest(Affine(2, 8), 32)):
        stored, at = held(codec, x)
        want = codec.decode(stored)
        for step in range(2):
            count = max(1, int(len(stored) * share))
            keep = torch.stack([torch.randperm(len(stored), generator=g)[:count].sort().values for _ in range(6)])
            keep = keep.view(2, 3, count)
            at = at.gather(2, keep)
            codes = stored.row.gather(2, keep) >= 0
            stored = codec.settle(gathered(stored, keep), at, newest=149, heads=None, num_heads=3, queries=None)
            want = want.gather(2, keep[..., None].expand(2, 3, count, 16))
            assert torch.equal(codec.decode(stored)[codes], want[codes]), step
            want = codec.decode(stored)  # dense ones may be codes now
        rows = int((stored.row < 0).sum())
        assert len(stored.tables["tail"]) == rows


def test_kivi_bytes_equal_the_formula_and_eviction_frees_tables():
    """2 n D b / 8 + 2 * 2 * (itemsize n D / g) for n in whole residuals, and row numbers of four bytes a unit."""
    n, d = 256, 64
    x = numbers(1, 1, n, d, dtype=torch.float16)
    keys = KiviKeys(2, 32, 128)
    stored, at = held(keys, x)
    assert stored.nbytes == n * d * 2 // 8 + 2 * 2 * n * d // 32 + 4 * n
    values = held(Newest(Affine(2, 32), 128), x)[0]
    assert values.nbytes == n * (d * 2 // 8 + 2 * 2 * d // 32 + 4) + 128 * d * 2

    def evicted(keep):
        keep = keep.view(1, 1, -1)
        at_keep = at.gather(2, keep)
        return keys.settle(gathered(stored, keep), at_keep, newest=255, heads=None, num_heads=1, queries=None)

    assert evicted(torch.arange(64)).nbytes == 64 * d * 2 // 8 + 2 * 2 * 64 * d // 32 + 4 * 64  # two of eight groups
    spread = evicted(torch.arange(0, 256, 32))  # eight units, one of each group
    assert spread.nbytes == 8 * keys.unit_bytes(d, torch.float16) > 8 * d * 2  # more than dense, as the header warns


def test_minikv_is_kivi_with_groups_of_16_behind_an_eviction():
    """arXiv:2411.18077: eviction first, then 2-bit sub-channel groups of 16; the composition is the parts in a row."""
    x = numbers(1, 1, 256, 16, dtype=torch.float64)
    keep = torch.arange(0, 256, 2)
    codec = layer_store("minikv").k
    fresh = codec.encode(x)
    kept = keep.view(1, 1, -1)
    got = codec.settle(gathered(fresh, kept), kept, newest=255, heads=None, num_heads=1, queries=None)
    torch.testing.assert_close(codec.decode(got)[0, 0], kivi_keys_reference(x[0, 0, keep], 2, 16, 128))


# ---------------------------------------------------------------------- others' code as an oracle, and the GPU


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_torchao_gives_the_same_codes(bits):
    """Its affine primitives; skipped without torchao. Its zero point is a code and ours a number: where every group's
    minimum is 0, both are 0 and the rest must agree."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x = numbers(40, 64).unflatten(-1, (-1, 16))
    x = x - x.amin(-1, keepdim=True)
    block, limits = (1, 1, 16), (0, 2**bits - 1)
    scale, zero = primitives.choose_qparams_affine(
        x, primitives.MappingType.ASYMMETRIC, block, torch.uint8, *limits, eps=1e-12
    )
    codes, ours, offset = quantise(x, bits)
    assert not zero.any()
    assert not offset.any()
    torch.testing.assert_close(ours, scale.view_as(ours), rtol=1e-6, atol=0)
    assert torch.equal(codes, primitives.quantize_affine(x, block, scale, zero, torch.uint8, *limits))
    theirs = primitives.dequantize_affine(codes, block, scale, zero, torch.uint8, *limits)
    torch.testing.assert_close(dequantise(codes, ours, offset), theirs, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gpu_stores_the_same_bytes(dtype):
    x = numbers(2, 4, 300, 128, dtype=dtype)
    for codec in CODECS.values():
        here, there = codec.encode(x), codec.encode(x.cuda())
        if "hqq" in codec.name:  # its fit takes powers, and those differ in the last bit
            error = (codec.decode(there).cpu() - codec.decode(here)).float().norm() / x.float().norm()
            assert error < 0.01 * 2 ** (4 - codec.bits), (codec.name, error)
            continue
        for name, part in here.parts.items():
            assert torch.equal(part, there.parts[name].cpu()), (codec.name, name)
        assert torch.equal(codec.decode(there).cpu(), codec.decode(here))
