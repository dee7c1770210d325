"""KIVI's keys (arXiv:2402.02750): quantised per channel over groups of units. Its values are `tail.Newest`.

Outliers of keys sit in a few channels, so a group is `group_size` units that follow each other in one KV head, and
every channel of it has a scale and a zero. Keys are encoded `residual` tokens at a time, once all of them have been
read, and never again; how they came in, in chunks or one by one, makes no difference. Of tokens that were evicted
first the others form the groups; what is left over waits, as it is, for the next `residual` tokens.

What it costs: a group's scales outlive all but the last of its units. Every unit's row number names its group, so
that an eviction changes no other unit's value, and rows that nobody needs are dropped; but where few units of each
group stay, their scales weigh more than their codes. Under eviction per-unit groups (`storage.Affine`) take fewer
bytes; docs/storage.md has numbers.

Shapes: n units, m of them newly aged, D head dim, g group size, b bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from locret.storage import check_bits, dequantise, pack, quantise, unpack
from locret.tail import ROW, Aged, Tailed, TailStored, check_residual


@dataclass(frozen=True)
class KiviKeys(Tailed):
    """Options, with the published code's defaults. An encoded unit's row number is its group's row of scale and zero.

    Attributes:
        bits: 2, 4 or 8.
        group_size: units that share a key channel's scale.
        residual: tokens that are encoded together; a multiple of `group_size`.
    """

    bits: int = 2
    group_size: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_residual(self.residual, self.group_size)

    @property
    def name(self) -> str:
        return f"kivi{self.bits}"

    def unit_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        """A group of its own for every unit: what eviction may leave in the worst case."""
        return head_dim * self.bits // 8 + 4 + 2 * head_dim * dtype.itemsize

    def fixed_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        return (self.residual + self.group_size) * head_dim * dtype.itemsize

    def blank(self, x: Tensor) -> dict[str, Tensor]:
        return {"codes": pack(torch.zeros_like(x, dtype=torch.uint8), self.bits)}

    def tables(self, x: Tensor) -> dict[str, Tensor]:
        none = x.new_empty(0, x.shape[-1])
        return {"scale": none, "zero": none}

    def due(self, position: Tensor, newest: Tensor | int, dense: Tensor, segment: Tensor) -> Tensor:
        """Tokens of residuals that are complete, as many of each head as fill groups, the oldest first."""
        whole = (newest + 1) // self.residual * self.residual
        aged = dense & (position < whole)
        flat, of = aged.flatten().long(), segment.flatten()
        counts = torch.zeros(int(of.max()) + 1, dtype=torch.int64, device=of.device).scatter_add_(0, of, flat)
        rank = flat.cumsum(0) - 1 - (counts.cumsum(0) - counts)[of]  # within the head: heads lie in order
        return aged & (rank < (counts // self.group_size * self.group_size)[of]).view_as(aged)

    def encode_aged(self, stored: TailStored, aged: Aged) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        columns = aged.x.unflatten(0, (-1, self.group_size)).mT  # [groups, D, g]
        codes, scale, zero = quantise(columns, self.bits)
        first = len(stored.tables["scale"])
        row = torch.arange(first, first + len(scale), device=scale.device, dtype=torch.int32)
        tables = {"scale": torch.cat((stored.tables["scale"], scale)), "zero": torch.cat((stored.tables["zero"], zero))}
        parts = {"codes": pack(codes.mT.flatten(0, 1), self.bits), ROW: row.repeat_interleave(self.group_size)[:, None]}
        return parts, tables

    def decode_aged(self, stored: TailStored) -> Tensor:
        codes = unpack(stored.parts["codes"], self.bits)
        scale, zero = stored.tables["scale"], stored.tables["zero"]
        if not len(scale):
            return torch.zeros_like(codes, dtype=scale.dtype)
        row = stored.row.clamp(min=0).long()
        return dequantise(codes[..., None], scale[row], zero[row])[..., 0]

    def needed(self, parts: dict[str, Tensor], tables: dict[str, Tensor]) -> dict[str, Tensor]:
        encoded = parts[ROW][:, 0] >= 0
        used, row = parts[ROW][encoded, 0].unique(return_inverse=True)  # both sorted: rows keep their order
        parts[ROW][encoded, 0] = row.int()
        return {name: x[used.long()] for name, x in tables.items()}
