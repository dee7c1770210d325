"""KIVI's layout (arXiv:2402.02750): keys per channel over groups of units, values per unit, a dense tail of each.

Outliers of keys sit in a few channels, so a group is `group_size` consecutive units in one channel. Keys are quantised
`residual` at a time, when the tail is that long; of the values all but the newest `residual`, one by one as they age.
Nothing is ever quantised twice, and how the units came in, in chunks or one by one, makes no difference.

What it costs: a group's scales outlive all but the last of its units. `gather` keeps every unit's decoded value, by an
index into the tables, and drops the rows that nobody needs; but where few units of each group stay, their scales weigh
more than their codes. Under eviction per-unit groups (`storage.Affine`) take fewer bytes; docs/storage.md has numbers.

MiniKV (arXiv:2411.18077) is this with 2 bits and groups of 16 behind an eviction by column sums with pyramid budgets.

Shapes: n units, of which m are quantised and r are in the tail, D head dim, g group size, b bits.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from locret.errors import ConfigError
from locret.storage import Affine, Stored, check_bits, dequantise, pack, quantise, unpack


@dataclass(frozen=True)
class Kivi:
    """Options, with the published code's defaults.

    Attributes:
        bits: 2, 4 or 8.
        group_size: units that share a key channel's scale, and channels that share a value's.
        residual: units that stay dense at most; a multiple of `group_size`.
    """

    bits: int = 2
    group_size: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group_size < 1 or self.residual < 1 or self.residual % self.group_size:
            raise ConfigError(f"residual {self.residual} is no multiple of group_size {self.group_size}; "
                              f"allowed: {self.group_size}, {2 * self.group_size}, ...")  # fmt: skip

    def keys(self, x: Tensor) -> KiviKeys:
        """Keys [..., n, D], stored."""
        lead, d = x.shape[:-2], x.shape[-1]
        codes = x.new_empty(*lead, 0, d * self.bits // 8, dtype=torch.uint8)
        group = x.new_empty(*lead, 0, dtype=torch.int32)
        empty = x[..., :0, :]
        return KiviKeys(self, codes, group, empty, empty, empty).append(x)

    def values(self, x: Tensor) -> KiviValues:
        """Values [..., n, D], stored."""
        empty = x[..., :0, :]
        return KiviValues(self, Affine(self.bits, self.group_size).encode(empty), empty).append(x)


@dataclass(frozen=True)
class KiviKeys:
    """Keys of one layer; `append` and `gather` return new ones."""

    options: Kivi
    codes: Tensor  # packed, [..., m, D * b / 8]
    group: Tensor  # which row of the tables a unit uses, int32 [..., m]
    scale: Tensor  # [..., rows, D]
    zero: Tensor  # [..., rows, D]
    tail: Tensor  # the newest units, [..., r, D], r < residual

    def __len__(self) -> int:
        return self.codes.shape[-2] + self.tail.shape[-2]

    def append(self, x: Tensor) -> KiviKeys:
        """Put keys [..., c, D] behind; what fills whole residuals is quantised."""
        tail = torch.cat((self.tail, x), -2)
        size, g = self.options.residual, self.options.group_size
        full = tail.shape[-2] // size * size
        if full == 0:
            return dataclasses.replace(self, tail=tail)
        columns = tail[..., :full, :].unflatten(-2, (-1, g)).mT  # [..., groups, D, g]
        codes, scale, zero = quantise(columns, self.options.bits)
        first = self.scale.shape[-2]
        group = torch.arange(first, first + full // g, device=x.device, dtype=torch.int32).repeat_interleave(g)
        return dataclasses.replace(
            self,
            codes=torch.cat((self.codes, pack(codes.mT.flatten(-3, -2), self.options.bits)), -2),
            group=torch.cat((self.group, group.expand(*x.shape[:-2], -1)), -1),
            scale=torch.cat((self.scale, scale), -2),
            zero=torch.cat((self.zero, zero), -2),
            tail=tail[..., full:, :].clone(),
        )

    def gather(self, keep: Tensor) -> KiviKeys:
        """Of the quantised units those at `keep` [..., k] stay, and the whole tail, which is why `keep` cannot name it.

        Rows of the tables that no unit of any sequence and head uses are dropped: one host synchronisation.
        """
        group = self.group.gather(-1, keep)
        used, row = group.unique(return_inverse=True)  # both sorted: rows keep their order
        codes = self.codes.gather(-2, keep[..., None].expand(*keep.shape, self.codes.shape[-1]))
        index = used.long()
        return dataclasses.replace(
            self, codes=codes, group=row.int(), scale=self.scale[..., index, :], zero=self.zero[..., index, :]
        )

    def decode(self) -> Tensor:
        """Keys [..., n, D] in the dtype they came in."""
        d = self.tail.shape[-1]
        row = self.group.long()[..., None].expand(*self.group.shape, d)
        scale, zero = self.scale.gather(-2, row), self.zero.gather(-2, row)
        codes = unpack(self.codes, self.options.bits)
        old = dequantise(codes[..., None], scale, zero)[..., 0]
        return torch.cat((old, self.tail), -2)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.group, self.scale, self.zero, self.tail))


@dataclass(frozen=True)
class KiviValues:
    """Values of one layer: groups along D, the newest `residual` units dense."""

    options: Kivi
    old: Stored
    tail: Tensor  # [..., r, D], r <= residual

    def __len__(self) -> int:
        return len(self.old) + self.tail.shape[-2]

    def append(self, x: Tensor) -> KiviValues:
        """Put values [..., c, D] behind; those older than the newest `residual` are quantised."""
        tail = torch.cat((self.tail, x), -2)
        aged = max(0, tail.shape[-2] - self.options.residual)
        if aged == 0:
            return dataclasses.replace(self, tail=tail)
        old = Stored.cat((self.old, self._codec.encode(tail[..., :aged, :])))
        return dataclasses.replace(self, old=old, tail=tail[..., aged:, :].clone())

    def gather(self, keep: Tensor) -> KiviValues:
        """Of the quantised units those at `keep` [..., k] stay, and the whole tail."""
        return dataclasses.replace(self, old=self.old.gather(keep))

    def decode(self) -> Tensor:
        """Values [..., n, D] in the dtype they came in."""
        return torch.cat((self._codec.decode(self.old), self.tail), -2)

    @property
    def nbytes(self) -> int:
        return self.old.nbytes + self.tail.nbytes

    @property
    def _codec(self) -> Affine:
        return Affine(self.options.bits, self.options.group_size)
