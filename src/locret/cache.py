"""KV units in slabs that are allocated once: append, keep, copy, save.

One slab a layer holds at most `capacity` units. While a layer works on a chunk, its old units and the chunk's lie
together in one workspace that all layers share, so that only one layer at a time holds budget + chunk: the peak is
layers * budget + (budget + chunk) units, not layers * (budget + chunk) as in the published code.

Every unit carries its score, its original position and whether the caller protected it; the three move with it.
Keys are stored before RoPE: which angle a unit gets is decided when it is read.

Shapes: B batch, Hkv KV heads, S units, D head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

NAMES = ("k", "v", "score", "position", "protected")


@dataclass
class Units:
    """Units of one layer, in position order. Also the shape of a slab and of the workspace."""

    k: Tensor  # before RoPE, [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, D]
    score: Tensor  # fp32, [B, Hkv, S]
    position: Tensor  # original position, int64, [B, Hkv, S]
    protected: Tensor  # bool, [B, Hkv, S]

    @classmethod
    def empty(
        cls, batch: int, heads: int, units: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Units:
        def make(*tail: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(batch, heads, units, *tail, dtype=dtype, device=device)

        return cls(
            make(head_dim, dtype=dtype), make(head_dim, dtype=dtype), make(dtype=torch.float32),
            make(dtype=torch.int64), make(dtype=torch.bool),
        )  # fmt: skip

    def __len__(self) -> int:
        return self.k.shape[2]

    def __iter__(self) -> Iterator[Tensor]:
        return (getattr(self, name) for name in NAMES)

    def __getitem__(self, span: slice) -> Units:
        """A view of some units."""
        return Units(*(tensor[:, :, span] for tensor in self))

    def write(self, start: int, units: Units) -> None:
        """Copy `units` to start, start + 1, ..."""
        for mine, theirs in zip(self, units, strict=True):
            mine[:, :, start : start + len(units)] = theirs

    def gather(self, keep: Tensor) -> Units:
        """The units at `keep` [B, Hkv, b], in that order, in fresh memory."""
        rows = keep[..., None].expand(*keep.shape, self.k.shape[-1])
        return Units(self.k.gather(2, rows), self.v.gather(2, rows),
                     *(tensor.gather(2, keep) for tensor in (self.score, self.position, self.protected)))  # fmt: skip

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self)


def unit_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one unit: K, V, score, position and flag."""
    return 2 * head_dim * dtype.itemsize + 4 + 8 + 1


@dataclass
class LayerCache:
    """The slab of one layer: `held` of its units are in use."""

    slab: Units
    window: int | None = None  # a sliding-window layer keeps its last window - 1 units and takes no budget
    held: int = 0
    evicted: bool = False  # False: original positions are still 0, 1, 2 ...
    _joined: Units | None = field(default=None, repr=False)  # old units and the chunk's, between append and keep

    def units(self) -> Units:
        """The units in use: a view."""
        return self.slab[slice(0, self.held)]

    def restore(self, *tensors: Tensor, evicted: bool) -> None:
        """Fill an empty slab with saved units."""
        units = Units(*(tensor.to(self.slab.k.device) for tensor in tensors))
        self.slab.write(0, units)
        self.held, self.evicted = len(units), evicted

    def append(self, new: Units, workspace: Units | None) -> Units:
        """Put a chunk behind the held units; returns all of them. They stay where they are until `keep` or `settle`."""
        total = self.held + len(new)
        place = self.slab
        if total > len(self.slab):
            assert workspace is not None, "only slabs of a fixed size overflow"
            assert total <= len(workspace), "the workspace holds capacity + chunk units"
            workspace.write(0, self.units())
            place = workspace
        place.write(self.held, new)
        self._joined = place[slice(0, total)]
        return self._joined

    def keep(self, keep: Tensor) -> None:
        """Of the appended units only those at `keep` [B, Hkv, b] stay."""
        assert self._joined is not None
        self.slab.write(0, self._joined.gather(keep))  # gathered first: source and target may overlap
        self.held, self.evicted, self._joined = keep.shape[-1], True, None

    def keep_last(self, count: int) -> None:
        """Of the appended units only the last `count` stay."""
        assert self._joined is not None
        last = self._joined[slice(len(self._joined) - count, None)]
        self.slab.write(0, Units(*(tensor.clone() for tensor in last)))  # source and target may overlap
        self.held, self.evicted, self._joined = count, True, None

    def settle(self) -> None:
        """All appended units stay; they fit the slab."""
        assert self._joined is not None
        assert len(self._joined) <= len(self.slab)
        self.held, self._joined = len(self._joined), None


class KVCache:
    """The cache of one batch of equally long sequences.

    Args:
        capacity: units per budgeted layer; None: slabs grow as needed and nothing is evicted.
        chunk_size: the largest number of units appended at once.
        windows: per layer, the sliding window or None.
    """

    def __init__(
        self, *, windows: list[int | None], batch: int, num_kv_heads: int, head_dim: int, capacity: int | None,
        chunk_size: int, dtype: torch.dtype, device: torch.device, initial: int = 0,
    ) -> None:  # fmt: skip
        self.capacity = capacity
        self.chunk_size = chunk_size
        self.seen = 0  # tokens read so far, kept or not
        self._shape = (batch, num_kv_heads)
        self._head_dim, self._dtype, self._device = head_dim, dtype, device
        full = initial if capacity is None else capacity
        self.layers = [LayerCache(self._new(full if w is None else w - 1), w) for w in windows]
        fixed = [len(layer.slab) for layer in self.layers if layer.window is not None or capacity is not None]
        self.workspace = self._new(max(fixed) + chunk_size) if fixed else None
        self.peak_bytes = self.nbytes + self.workspace_bytes

    def append(self, index: int, new: Units) -> Units:
        """Put a chunk behind the units of layer `index`; returns all of them."""
        layer = self.layers[index]
        if self.capacity is None and layer.window is None and layer.held + len(new) > len(layer.slab):
            self._grow(layer, layer.held + len(new))
        return layer.append(new, self.workspace)

    @property
    def batch(self) -> int:
        return self._shape[0]

    @property
    def held(self) -> int:
        """Units held by a layer that takes a budget (all of them hold the same number)."""
        return next((layer.held for layer in self.layers if layer.window is None), 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the slabs as allocated: keys, values, scores, positions and flags."""
        return sum(layer.slab.nbytes for layer in self.layers)

    @property
    def workspace_bytes(self) -> int:
        return 0 if self.workspace is None else self.workspace.nbytes

    def note_scratch(self, scratch_bytes: int) -> None:
        """Count what one layer allocates beside slabs and workspace while it attends and compacts."""
        self.peak_bytes = max(self.peak_bytes, self.nbytes + self.workspace_bytes + scratch_bytes)

    def copy(self) -> KVCache:
        """An independent copy: continuing one does not change the other. The workspace is shared: it holds nothing."""
        twin = object.__new__(KVCache)
        twin.__dict__.update(self.__dict__)
        twin.layers = [
            dataclasses.replace(layer, slab=Units(*(tensor.clone() for tensor in layer.slab))) for layer in self.layers
        ]
        twin.peak_bytes = twin.nbytes + twin.workspace_bytes
        return twin

    def rows(self, indices: Tensor) -> KVCache:
        """A copy with some of the sequences only. indices: int64, [rows]."""
        twin = self.copy()
        twin._shape = (len(indices), self._shape[1])
        for layer in twin.layers:
            layer.slab = Units(*(tensor.index_select(0, indices) for tensor in layer.slab))
        if self.workspace is not None:
            twin.workspace = twin._new(len(self.workspace))
        return twin

    def _new(self, units: int) -> Units:
        return Units.empty(*self._shape, units, self._head_dim, self._dtype, self._device)

    def _grow(self, layer: LayerCache, needed: int) -> None:
        larger = self._new(max(needed, len(layer.slab) + len(layer.slab) // 2))
        larger.write(0, layer.units())
        self.note_scratch(larger.nbytes)  # for a moment the old slab and the new one both exist
        layer.slab = larger
