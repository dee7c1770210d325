"""Stored units of which the newest stay as they are: what the stores of KIVI and ThinK have in common.

A unit comes in dense and is encoded once, when it has aged: when `residual` newer tokens have been read. Dense units
lie in a table, and a row number per unit says where, so that evicting, gathering and padding move codes and row
numbers only, and a slab of fixed size does not reserve dense room for every unit. Tables are made anew whenever units
leave them, which waits for the device once.

Shapes: B batch, H heads of the layout (Hkv, or 1 where all heads lie one after the other), n units, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from locret.errors import ConfigError
from locret.storage import Codec, Stored

ROW, TAIL = "row", "tail"


@dataclass(frozen=True)
class TailStored(Stored):
    """Units [B, H, n, ...] whose part "row" (int32, width 1) says where they lie.

    -1 - r: as it is, in row r of the table "tail" [rows, D]. 0 and more: encoded, and the number is the codec's.
    Tables are shared by copies and views, and never written in place.
    """

    tables: dict[str, Tensor] = field(default_factory=dict)

    @property
    def row(self) -> Tensor:
        """[B, H, n]."""
        return self.parts[ROW][..., 0]

    def like(self, parts: dict[str, Tensor], tables: dict[str, Tensor] | None = None) -> TailStored:
        return TailStored(parts, self.tables if tables is None else tables)

    def take_rows(self, indices: Tensor) -> TailStored:
        """Some of the sequences; a table of three dimensions has a row of its own for each."""
        tables = {name: x.index_select(0, indices) if x.dim() == 3 else x for name, x in self.tables.items()}
        return TailStored({name: x.index_select(0, indices) for name, x in self.parts.items()}, tables)

    def join(self, new: Stored) -> TailStored:
        """New units, all of them dense, behind these."""
        new = self._behind(new)
        return TailStored({name: torch.cat((x, new.parts[name]), -2) for name, x in self.parts.items()}, new.tables)

    def replaced(self, other: Tensor, new: Stored) -> TailStored:
        """With the units at `other`, bool [B, H, n, 1], from `new`, which are all dense."""
        new = self._behind(new)
        parts = {name: torch.where(other, new.parts[name], x) for name, x in self.parts.items()}
        return TailStored(parts, new.tables)

    def _behind(self, new: Stored) -> TailStored:
        """`new` with its dense units behind ours in one table."""
        assert isinstance(new, TailStored)
        tail = self.tables[TAIL]
        tables = {**self.tables, TAIL: torch.cat((tail, new.tables[TAIL]))}
        return TailStored({**new.parts, ROW: new.parts[ROW] - len(tail)}, tables)

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(x.nbytes for x in self.tables.values())


@dataclass(frozen=True)
class Aged:
    """Units that are being encoded, in order of sequence, head and position.

    Attributes:
        x: [m, D].
        batch, head: of which sequence and KV head it is, int64 [m].
        num_heads: Hkv.
        queries: of the chunk that came in last, before RoPE, [B, Hq, w, D]; None where nobody kept them.
    """

    x: Tensor
    batch: Tensor
    head: Tensor
    num_heads: int
    queries: Tensor | None


class Tailed(ABC):
    """A codec that leaves the newest units as they are. A frozen dataclass with `residual`: how many at most."""

    residual: int

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def unit_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        """The most that an encoded unit takes, its row number included."""

    def fixed_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        """The most that a KV head takes beside `unit_bytes` of every unit: its dense ones, and tables of its own."""
        return self.residual * head_dim * dtype.itemsize

    @abstractmethod
    def blank(self, x: Tensor) -> dict[str, Tensor]:
        """Parts for units x [..., n, D] that are not encoded yet, "row" aside."""

    def tables(self, x: Tensor) -> dict[str, Tensor]:
        """The codec's own tables for x [B, H, n, D], empty."""
        return {}

    @abstractmethod
    def encode_aged(self, stored: TailStored, aged: Aged) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parts of aged units, [m, w] each and "row" [m, 1] among them, and all tables but the tail."""

    @abstractmethod
    def decode_aged(self, stored: TailStored) -> Tensor:
        """All units [B, Hkv, n, D] as if all were encoded."""

    def due(self, position: Tensor, newest: Tensor | int, dense: Tensor, segment: Tensor) -> Tensor:
        """Which units are to be encoded now, bool [B, H, n].

        Args: position: int32 [B, H, n];  newest: of the token read last, kept or not;  dense: bool [B, H, n];
            segment: a number per sequence and KV head, [B, H, n].
        """
        return dense & (position <= newest - self.residual)

    def encode(self, x: Tensor) -> TailStored:
        """x [B, H, n, D] as it comes in: dense."""
        rows = x.reshape(-1, x.shape[-1])
        row = -1 - torch.arange(len(rows), dtype=torch.int32, device=x.device).view(*x.shape[:-1], 1)
        return TailStored({**self.blank(x), ROW: row}, {TAIL: rows, **self.tables(x)})

    def decode(self, stored: Stored) -> Tensor:
        """All units in the dtype that they had."""
        assert isinstance(stored, TailStored)
        tail, out = stored.tables[TAIL], self.decode_aged(stored)
        if len(tail) == 0:
            return out
        return torch.where(stored.parts[ROW] < 0, tail[(-1 - stored.row).clamp(min=0).long()], out)

    def settle(
        self, stored: TailStored, position: Tensor, *, newest: Tensor | int, heads: Tensor | None, num_heads: int,
        queries: Tensor | None,
    ) -> TailStored:  # fmt: skip
        """Encode what has aged, and drop what no unit needs from the tables.

        Args:
            position: original positions, [B, H, n].
            newest: that of the token read last, kept or not.
            heads: KV head of every unit, [B, 1, n], where they lie one after the other; None: the layout's axis.
            num_heads: Hkv.
        """
        if not len(stored):
            return stored
        batch, layout, _ = position.shape
        device = position.device
        owner = torch.arange(layout, device=device)[:, None].expand_as(position) if heads is None else heads
        sequence = torch.arange(batch, device=device)[:, None, None].expand_as(position)
        dense = stored.row < 0
        due = self.due(position, newest, dense, sequence * num_heads + owner)
        at = due.flatten().nonzero()[:, 0]
        parts = {name: x.flatten(0, -2).clone() for name, x in stored.parts.items()}
        tail, tables = stored.tables[TAIL], {name: x for name, x in stored.tables.items() if name != TAIL}
        if len(at):
            x = tail[-1 - parts[ROW][at, 0].long()]
            aged = Aged(x, sequence.flatten()[at], owner.flatten()[at], num_heads, queries)
            codes, tables = self.encode_aged(stored, aged)
            for name, value in codes.items():
                parts[name][at] = value
        left = parts[ROW][:, 0] < 0
        tail = tail[-1 - parts[ROW][left, 0].long()]
        parts[ROW][left, 0] = -1 - torch.arange(len(tail), dtype=torch.int32, device=device)
        tables = self.needed(parts, tables)
        shaped = {name: x.view(stored.parts[name].shape) for name, x in parts.items()}
        return TailStored(shaped, {TAIL: tail, **tables})

    def needed(self, parts: dict[str, Tensor], tables: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tables without rows that no unit uses; may write `parts["row"]`, [N, 1]."""
        return tables


@dataclass(frozen=True)
class Newest(Tailed):
    """Any codec of single units, but the newest `residual` stay as they are (KIVI's values)."""

    inner: Codec
    residual: int

    def __post_init__(self) -> None:
        check_residual(self.residual)

    @property
    def name(self) -> str:
        return f"{self.inner.name} behind {self.residual}"

    def unit_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        return self.inner.encode(torch.zeros(1, head_dim, dtype=dtype)).nbytes + 4

    def blank(self, x: Tensor) -> dict[str, Tensor]:
        one = self.inner.encode(x.new_zeros(1, x.shape[-1]))
        return {name: part.new_zeros(*x.shape[:-1], part.shape[-1]) for name, part in one.parts.items()}

    def encode_aged(self, stored: TailStored, aged: Aged) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parts = self.inner.encode(aged.x).parts
        return {**parts, ROW: torch.zeros(len(aged.x), 1, dtype=torch.int32, device=aged.x.device)}, {}

    def decode_aged(self, stored: TailStored) -> Tensor:
        return self.inner.decode(Stored({name: x for name, x in stored.parts.items() if name != ROW}))


def check_residual(residual: int, multiple: int = 1) -> None:
    """Raise a ConfigError unless `residual` is a multiple of `multiple`, and not 0."""
    if not isinstance(residual, int) or residual < 1 or residual % multiple:
        raise ConfigError(f"residual {residual!r} is no multiple of {multiple}; "
                          f"allowed: {multiple}, {2 * multiple}, ...")  # fmt: skip
