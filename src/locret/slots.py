"""The decode steps of many requests as one: a row of `graph.Step` each, and rows come and go without a new capture.

Every reader keeps its own cache. Which slabs a row reads and writes stands in a table on the device; entering, leaving
and evicting change one row of it. A row that nobody has, or whose request waits in this round, stands idle: it works on
a slab of one unit, and nobody looks at what comes out. Caches that hold codes take no row.

What a row gets does not depend on the others: products have one shape, whoever is there; attention cuts every row at
the same slots; scores are written a row at a time, when its own stash is full.

Shapes: B rows, L layers, Hkv KV heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from locret.backbone import Backbone, Rope, model_length
from locret.graph import MOST_STASHED, alike, codec_of, count, dense_slabs, room, row_state, write
from locret.kernels.scattered import Scattered, addresses
from locret.kernels.sizes import cdiv
from locret.methods.base import Method
from locret.prefill import Reader
from locret.step import Step, can_capture, reads_tables

_BLOCK = 1024  # the longest slab that launches are made for is rounded up to these


class SlotsGraph:
    """One decode step for up to B readers of one sequence each.

    Args:
        rows: B.
        capture: replay a CUDA graph; False: run the same step kernel by kernel (on a CPU, and for tests).

    Attributes:
        ahead: the device works while the host does: a step may be launched before it is known who goes on.
    """

    def __init__(self, backbone: Backbone, method: Method, rows: int, *, capture: bool) -> None:
        self._backbone, self._method = backbone, method
        self.ahead = capture
        layers, device = backbone.num_layers, backbone.device
        self._dummy = torch.zeros(1, backbone.num_kv_heads, 1, backbone.head_dim, dtype=backbone.dtype, device=device)
        self._filler = torch.zeros((), dtype=torch.int64, device=device)
        self._slabs = [[self._dummy] * rows for _ in range(2 * layers)]  # K of all layers, then V
        self._scattered: list[Scattered] = []
        self._step = Step(backbone, rows, MOST_STASHED if method.evicts and method.per_token else 0, capture=capture)
        idle = [*[0] * layers, *[1] * layers, 0, 0]  # at, stop, slot, advance
        self._idle = torch.cat((addresses([self._dummy] * 2 * layers),
                                torch.tensor(idle)[:, None].expand(-1, backbone.num_kv_heads)))  # fmt: skip
        # as for the longest prompt: of families whose frequencies depend on the length, the others' readers stay out
        self._rope = backbone.rope(_BLOCK + 1, model_length(backbone.model))
        self._longest = self._reached = 0  # slots of the longest slab so far; what launches are made for
        self._readers: list[Reader | None] = [None] * rows
        self._pending = [0] * rows
        self._running: list[bool | None] = [None] * rows  # what the device has; None: to be looked at again
        self._good = torch.ones(rows + 1, dtype=torch.bool, device=device)  # the last one stands for no row

    @classmethod
    def of(cls, backbone: Backbone, method: Method, rows: int) -> SlotsGraph | None:
        """None where no reader's steps are alike by method or model, or where they cannot be captured on a GPU."""
        if (method.evicts and not (method.per_token or method.memoryless)) or any(
            layer.window is not None for layer in backbone.layers
        ):
            return None
        on_gpu = backbone.device.type != "cpu"
        if on_gpu and not (can_capture(backbone) and reads_tables(backbone)):
            return None
        return cls(backbone, method, rows, capture=on_gpu)

    def enter(self, reader: Reader) -> int | None:
        """Give a reader a row; None: its steps are not like the others'."""
        if reader.cache.batch != 1 or not alike(reader) or not self._same_angles(reader.rope):
            return None
        if any(codec_of(held) is not None for held in reader.cache.layers):
            return None
        row = self._readers.index(None)
        self._readers[row], self._pending[row] = reader, 0
        self._good[row].fill_(True)
        if self._step.stash is not None:
            reader.cache.note_scratch(self._step.stash.row(row).nbytes)
        return row

    def leave(self, row: int) -> None:
        """Nothing of the reader is held any more, and nothing is written to its cache."""
        self._readers[row], self._pending[row], self._running[row] = None, 0, None
        for slabs in self._slabs:
            slabs[row] = self._dummy

    def room(self, row: int) -> bool:
        """Whether the row's cache takes one more unit."""
        return room(self._reader(row).cache)

    def step(self, tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Read one token, int64 [] on the device, in each of some rows that have `room`; whoever is above its budget
        then evicts. Waits for nothing.

        Returns: logits [1, V] of these rows, in memory that the next step writes over.
        """
        for row, reader in enumerate(self._readers):
            full = self._step.stash is not None and self._pending[row] == len(self._step.stash)
            if reader is not None and (full or row not in tokens):
                self.settle(row)
            if self._running[row] != (row in tokens):
                self._write_row(row, running=row in tokens)
        self._reach()
        logits = self._step.run(torch.stack([tokens.get(row, self._filler) for row in range(len(self._readers))]))
        for row in tokens:
            self._pending[row] += 1
            count(self._reader(row).cache, 1)
            if self._reader(row).overfull:
                self.settle(row)
                self._reader(row).evict()
                self._running[row] = None
        return {row: logits[row : row + 1] for row in tokens}

    def settle(self, row: int) -> None:
        """Make the row's cache whole: scores and positions of the units that steps added. Waits for nothing."""
        reader, pending = self._reader(row), self._pending[row]
        if not pending:
            return
        stash = None if self._step.stash is None or reader.plan.budget is None else self._step.stash.row(row)
        self._good[row] &= write(self._backbone, self._method, reader.cache, pending, stash)
        self._pending[row], self._running[row] = 0, None

    def good(self, rows: Sequence[int | None]) -> Tensor:
        """Whether all scores written so far are finite: bool, one a row given, on the device; True for None."""
        return torch.stack([self._good[-1 if row is None else row] for row in rows])

    # ------------------------------------------------------------------ rows

    def _reader(self, row: int) -> Reader:
        reader = self._readers[row]
        assert reader is not None, f"nobody has row {row}"
        return reader

    def _layer(self, layer: int) -> tuple[Scattered, Scattered]:
        return self._scattered[layer], self._scattered[layer + self._backbone.num_layers]

    def _write_row(self, row: int, *, running: bool) -> None:
        """Tell the device where the row's slabs lie and how full they are, or that it stands idle."""
        numbers, slabs = self._idle, [self._dummy] * len(self._slabs)
        if running:
            cache = self._reader(row).cache
            slabs = dense_slabs(cache)
            numbers = row_state(cache, self._pending[row], addresses(slabs)[:, None])[:, 0]
            self._longest = max(self._longest, *(slab.shape[2] for slab in slabs))
        for own, slab in zip(self._slabs, slabs, strict=True):
            own[row] = slab
        self._step.state[:, row].copy_(numbers, non_blocking=True)
        self._running[row] = running

    def _reach(self) -> None:
        """Launches and rotation tables for the longest slab; a new capture if they were made for shorter ones."""
        if self._longest <= self._reached:
            return
        wanted = cdiv(max(self._longest, self._reached * 5 // 4), _BLOCK) * _BLOCK
        self._rope.grow(wanted + 1)
        tables = self._step.tables
        self._scattered = [Scattered(slabs, table, wanted) for slabs, table in zip(self._slabs, tables, strict=True)]
        self._step.prepare(self._backbone, self._rope, self._layer, [wanted])
        self._reached = wanted

    def _same_angles(self, rope: Rope) -> bool:
        """Whether a reader's rotation tables begin as the common ones do, or the other way round."""
        kinds = {spec.rope_type: layer for layer, spec in enumerate(self._backbone.layers) if spec.rotated}
        for layer in kinds.values():
            mine, theirs = self._rope.angles(layer), rope.angles(layer)
            if mine is None or theirs is None or mine.interleaved != theirs.interleaved:
                return False
            shared = min(len(mine.cos), len(theirs.cos))
            for a, b in ((mine.cos, theirs.cos), (mine.sin, theirs.sin)):
                if not torch.equal(a[:shared], b[:shared]):
                    return False
        return True
