"""How the numbers of a kept unit are stored: as they are, or quantised once, when it is encoded, and never again.

A codec turns K or V, [..., n, D], into a `Stored`: a few tensors that all have their n units on axis -2. Quantisation
groups lie inside one unit, along D, so a unit's bytes depend on that unit alone: which units are evicted, gathered or
put behind it never changes what it decodes to, and encoding in chunks is encoding at once. (Codecs that leave the
newest units as they are lie in `tail`, and those whose groups span units in `kivi`.)

Asymmetric affine codes of b bits, as in KIVI (arXiv:2402.02750), quanto and HQQ:

    zero = min(group);  scale = (max(group) - min(group)) / (2**b - 1);  code = round((x - zero) / scale)
    decoded = code * scale + zero,  |x - decoded| <= scale / 2

scale and zero are kept in the dtype of x. A group's minimum is one of its numbers, so as a zero it is exact; the
scale is rounded up, so that the codes still reach the maximum. What is decoded is rounded to that dtype on top: with 8
bits in bfloat16 its last digit may be as large as a step.

Codes are packed in planes: with b = 4, byte j holds channels j and j + D / 2, which is also the pair that RoPE's
half-rotation mixes; with b = 2 channels j, j + D / 4, j + D / 2 and j + 3 D / 4.

Shapes: n units, D head dim, g group size, b bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from locret.errors import ConfigError, unknown

BITS = (2, 4, 8)
FITS = ("minmax", "hqq")
DEFAULT_GROUP = 32  # KIVI's
_HQQ_NORM, _HQQ_BETA, _HQQ_KAPPA, _HQQ_STEPS = 0.7, 10.0, 1.01, 20  # hqq's own defaults


@dataclass(frozen=True)
class Stored:
    """Units as a codec holds them: named tensors [..., n, width], all of them with their units on axis -2."""

    parts: dict[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.parts.values())).shape[-2]

    def __getitem__(self, span: slice) -> Stored:
        """A view of some units."""
        return Stored({name: part[..., span, :] for name, part in self.parts.items()})

    def gather(self, keep: Tensor) -> Stored:
        """The units at `keep` [..., m], int64, in that order, in fresh memory."""
        rows = keep[..., None]
        return Stored({
            name: part.gather(-2, rows.expand(*keep.shape, part.shape[-1])) for name, part in self.parts.items()
        })  # fmt: skip

    def write(self, start: int, units: Stored) -> None:
        """Copy `units` to start, start + 1, ..."""
        for name, part in self.parts.items():
            part[..., start : start + len(units), :] = units.parts[name]

    def like(self, parts: dict[str, Tensor]) -> Stored:
        """Other units, held the same way."""
        return Stored(parts)

    def join(self, new: Stored) -> Stored:
        """New units behind these, in fresh memory."""
        return Stored.cat((self, new))

    def replaced(self, other: Tensor, new: Stored) -> Stored:
        """With the units at `other`, bool [..., n, 1], from `new`, in fresh memory."""
        return self.like({name: torch.where(other, new.parts[name], part) for name, part in self.parts.items()})

    @staticmethod
    def cat(pieces: Iterable[Stored]) -> Stored:
        """Pieces of one codec, one behind the other."""
        pieces = list(pieces)
        return Stored({name: torch.cat([piece.parts[name] for piece in pieces], -2) for name in pieces[0].parts})

    @property
    def nbytes(self) -> int:
        """Bytes of these units: codes, scales and zeros."""
        return sum(part.nbytes for part in self.parts.values())


class Codec(Protocol):
    """K or V [..., n, D] to stored units and back, in the dtype it had."""

    @property
    def name(self) -> str: ...

    def encode(self, x: Tensor) -> Stored: ...

    def decode(self, stored: Stored) -> Tensor: ...


@dataclass(frozen=True)
class Dense:
    """Units as they are."""

    name: str = "dense"

    def encode(self, x: Tensor) -> Stored:
        return Stored({"x": x})

    def decode(self, stored: Stored) -> Tensor:
        return stored.parts["x"]


@dataclass(frozen=True)
class Affine:
    """Groupwise asymmetric codes, groups along D within a unit.

    Attributes:
        bits: 2, 4 or 8.
        group_size: channels that share a scale and a zero; default: the largest divisor of D up to `widest`.
        fit: "minmax", or "hqq": the zero is refined for a small p-norm of the error, p = 0.7, with the scale fixed
            (half-quadratic quantisation, mobiusml.github.io/hqq_blog). Then a few numbers may miss by over half a step.
    Raises: ConfigError: other bits or fits, or, at the first `encode`, a group size or width that does not divide D.
    """

    bits: int
    group_size: int | None = None
    fit: str = "minmax"
    widest: int = DEFAULT_GROUP

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.fit not in FITS:
            raise unknown("fit", str(self.fit), FITS)

    @property
    def name(self) -> str:
        kind = "hqq" if self.fit == "hqq" else "int" if self.widest == DEFAULT_GROUP else "quanto"
        return f"{kind}{self.bits}"

    def encode(self, x: Tensor) -> Stored:
        group = group_size(x.shape[-1], self.group_size, self.widest)
        codes, scale, zero = quantise(x.unflatten(-1, (-1, group)), self.bits, self.fit)
        return Stored({"codes": pack(codes.flatten(-2), self.bits), "scale": scale, "zero": zero})

    def decode(self, stored: Stored) -> Tensor:
        codes, scale, zero = (stored.parts[name] for name in ("codes", "scale", "zero"))
        groups = unpack(codes, self.bits).unflatten(-1, (scale.shape[-1], -1))
        return dequantise(groups, scale, zero).flatten(-2)


# ---------------------------------------------------------------------- numbers to codes


def check_bits(bits: int) -> None:
    """Raise a ConfigError unless `bits` is one of BITS."""
    if bits not in BITS:
        raise ConfigError(f"bits is {bits!r}; allowed: {', '.join(map(str, BITS))}")


def group_size(width: int, wanted: int | None, widest: int = DEFAULT_GROUP) -> int:
    """`wanted`, or the largest divisor of `width` up to `widest`.

    Raises: ConfigError: `wanted` does not divide `width`; the divisors are named.
    """
    divisors = [g for g in range(1, width + 1) if width % g == 0]
    if wanted is None:
        return max(g for g in divisors if g <= widest)
    if wanted not in divisors:
        raise ConfigError(f"group_size {wanted!r} does not divide {width}; allowed: {', '.join(map(str, divisors))}")
    return wanted


def quantise(x: Tensor, bits: int, fit: str = "minmax") -> tuple[Tensor, Tensor, Tensor]:
    """Affine codes of groups on the last axis.

    Args:    x: [..., g].
    Returns: codes uint8 [..., g], scale and zero [...] in x's dtype.
    """
    wide = x.double() if x.dtype == torch.float64 else x.float()
    low, high = wide.amin(-1), wide.amax(-1)
    # by a tensor: CUDA divides by a number as it multiplies with its inverse, and codes should be the same everywhere
    scale = _round_up((high - low) / torch.full_like(low, 2**bits - 1), x.dtype)
    zero = low.to(x.dtype)  # exact: the minimum is one of x
    if fit == "hqq":
        zero = _hqq_zero(wide, bits, scale, zero)
    return _codes(wide, bits, scale, zero), scale, zero


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes [..., g] with scale and zero [...] -> numbers [..., g] in the scale's dtype."""
    wide = torch.float64 if scale.dtype == torch.float64 else torch.float32
    return torch.addcmul(zero.to(wide)[..., None], codes.to(wide), scale.to(wide)[..., None]).to(scale.dtype)


def _codes(wide: Tensor, bits: int, scale: Tensor, zero: Tensor) -> Tensor:
    step = scale.to(wide.dtype)
    step = torch.where(step > 0, step, 1.0)[..., None]  # a constant group is its zero, exactly
    return ((wide - zero.to(wide.dtype)[..., None]) / step).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def _round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Non-negative `x` in `dtype`, never below x."""
    rounded = x.to(dtype)
    if dtype == x.dtype:
        return rounded
    bits = rounded.view(torch.int16)  # the next larger positive number has the next larger bit pattern
    return (bits + (rounded.to(x.dtype) < x)).to(torch.int16).view(dtype)


def _hqq_zero(wide: Tensor, bits: int, scale: Tensor, zero: Tensor) -> Tensor:
    """Half-quadratic steps on the zero: split off the large errors, then fit the zero to the rest.

    Of all steps each group keeps the zero with the smallest p-norm, so that it is never worse than the minimum was.
    """
    step = scale.to(wide.dtype)[..., None]
    best, best_error, beta = zero, None, _HQQ_BETA
    for _ in range(_HQQ_STEPS + 1):
        codes = _codes(wide, bits, scale, zero).to(wide.dtype)
        missed = wide - (codes * step + zero.to(wide.dtype)[..., None])
        size = missed.abs()
        error = size.pow(_HQQ_NORM).sum(-1)
        if best_error is None:
            best_error = error
        better = error < best_error
        best, best_error = torch.where(better, zero, best), torch.where(better, error, best_error)
        shrunk = missed.sign() * (size - size.clamp_min(1e-12).pow(_HQQ_NORM - 1) / beta).clamp_min(0)
        zero = (wide - shrunk - codes * step).mean(-1).to(zero.dtype)
        beta *= _HQQ_KAPPA
    return best


# ---------------------------------------------------------------------- codes to bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., D] below 2**bits -> bytes [..., D * bits / 8], in planes: see the top of the file.

    Raises: ConfigError: D codes of `bits` bits do not fill whole bytes.
    """
    planes = 8 // bits
    if codes.shape[-1] % planes:
        raise ConfigError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole bytes; the head dim must be a "
                          f"multiple of {planes}, or take more bits")  # fmt: skip
    first, *others = codes.chunk(planes, -1)
    packed = first.clone()
    for i, plane in enumerate(others, 1):
        packed |= plane << (i * bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """`pack` backwards: bytes [..., D * bits / 8] -> uint8 codes [..., D]."""
    if bits == 8:
        return packed
    mask = 2**bits - 1
    return torch.cat([packed >> shift & mask for shift in range(0, 8, bits)], -1)


# ---------------------------------------------------------------------- by name

QUANTO_GROUP = 64  # of transformers' QuantizedCache with its quanto and hqq backends
CODECS: dict[str, Codec] = {
    "dense": Dense(), "int8": Affine(8), "int4": Affine(4), "int2": Affine(2),
    "quanto4": Affine(4, widest=QUANTO_GROUP), "quanto2": Affine(2, widest=QUANTO_GROUP),
    "hqq8": Affine(8, fit="hqq", widest=QUANTO_GROUP), "hqq4": Affine(4, fit="hqq", widest=QUANTO_GROUP),
    "hqq2": Affine(2, fit="hqq", widest=QUANTO_GROUP),
}  # fmt: skip


def get_codec(name: str) -> Codec:
    """One of `CODECS`.

    Raises: ConfigError: any other name; the nearest is named.
    """
    if name not in CODECS:
        raise unknown("storage", name, CODECS)
    return CODECS[name]


def allocate(
    codec: Codec, *lead: int, units: int, head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Stored:
    """Room for `units` units [*lead, units, ...] of a codec, not filled in."""
    none = codec.encode(torch.zeros(*lead, 0, head_dim, dtype=dtype, device=device))
    return none.like({name: part.new_empty(*lead, units, part.shape[-1]) for name, part in none.parts.items()})


def stored_bytes(codec: Codec, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one unit's K or V, counted from the tensors of one."""
    return codec.encode(torch.zeros(1, head_dim, dtype=dtype)).nbytes
