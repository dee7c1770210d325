"""KV units in slabs that are allocated once: append, keep, copy, save.

One slab a layer holds at most `capacity` units. While a layer works on a chunk, its old units and the chunk's lie
together in one workspace that all layers share, so that only one layer at a time holds budget + chunk: the peak is
layers * budget + (budget + chunk) units, not layers * (budget + chunk) as in the published code.

Every unit carries its score, its original position, whether the caller protected it and, for methods that ask for
them, numbers of the method's own; all of them move with it. Keys are stored before RoPE: which angle a unit gets is
decided when it is read.

Layers may have budgets of their own. In a `RaggedLayer` the KV heads have too: its units lie head after head in one
flat slab of the same size, and are padded on the left, in memory that lives for one layer's turn, while they are read.

Shapes: B batch, Hkv KV heads, S units, D head dim, N numbers of the method's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NAMES = ("k", "v", "score", "position", "protected", "state")


@dataclass
class Units:
    """Units of one layer, in position order. Also the shape of a slab and of the workspace."""

    k: Tensor  # before RoPE, [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, D]
    score: Tensor  # fp32, [B, Hkv, S]
    position: Tensor  # original position, int64, [B, Hkv, S]
    protected: Tensor  # bool, [B, Hkv, S]

    state: Tensor = None  # type: ignore[assignment]  # the method's own numbers, fp32, [B, Hkv, S, N]; not given: N = 0

    def __post_init__(self) -> None:
        if self.state is None:
            self.state = self.score.new_empty(*self.score.shape, 0, dtype=torch.float32)

    @classmethod
    def empty(
        cls, batch: int, heads: int, units: int, head_dim: int, dtype: torch.dtype, device: torch.device,
        state: int = 0,
    ) -> Units:  # fmt: skip
        def make(*tail: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(batch, heads, units, *tail, dtype=dtype, device=device)

        return cls(
            make(head_dim, dtype=dtype), make(head_dim, dtype=dtype), make(dtype=torch.float32),
            make(dtype=torch.int64), make(dtype=torch.bool), make(state, dtype=torch.float32),
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
        return Units(*(_take(tensor, keep) for tensor in self))

    def flat(self) -> Units:
        """One head that holds the units of all heads, head after head: [B, 1, Hkv * S, ...]."""
        return Units(*(tensor.flatten(1, 2).unsqueeze(1) for tensor in self))

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self)


def _take(tensor: Tensor, keep: Tensor) -> Tensor:
    """tensor [B, H, S, ...] at keep [B, H, b]."""
    tail = tensor.shape[3:]
    return tensor.gather(2, keep.reshape(*keep.shape, *(1 for _ in tail)).expand(*keep.shape, *tail))


def unit_bytes(head_dim: int, dtype: torch.dtype, state: int = 0) -> int:
    """Bytes of one unit: K, V, score, position, flag and the method's own numbers."""
    return 2 * head_dim * dtype.itemsize + 4 + 8 + 1 + 4 * state


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

    @property
    def nbytes(self) -> int:
        """Bytes as allocated."""
        return self.slab.nbytes

    def positions(self) -> Tensor:
        """Original positions of the units in use, ascending, [B, Hkv, S]."""
        return self.units().position

    @property
    def padding(self) -> Tensor | None:
        """Of the appended units: how many at the beginning of each head are none, [B, Hkv]; None: all are units."""
        return None

    @property
    def width(self) -> int:
        """Units of the longest head: what a chunk is put behind."""
        return self.held

    def tensors(self) -> dict[str, Tensor]:
        """What `restore` needs, by name: for files."""
        return dict(zip(NAMES, self.units(), strict=True))

    def restore(self, tensors: dict[str, Tensor], *, evicted: bool) -> None:
        """Fill an empty slab with saved units."""
        units = Units(*(tensors[name].to(self.slab.k.device) for name in NAMES))
        self.slab.write(0, units)
        self.held, self.evicted = len(units), evicted

    def copy(self) -> LayerCache:
        """An independent copy."""
        return dataclasses.replace(self, slab=Units(*(tensor.clone() for tensor in self.slab)))

    def take_rows(self, indices: Tensor) -> None:
        """Only some of the sequences stay. indices: int64, [rows]."""
        self.slab = Units(*(tensor.index_select(0, indices) for tensor in self.slab))

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

    def reopen(self) -> Units:
        """The held units as if they had just been appended, for an eviction after the fact."""
        self._joined = self.units()
        return self._joined


@dataclass
class RaggedLayer(LayerCache):
    """A layer whose KV heads keep different numbers of units; `held` is their mean, the same for every sequence.

    The slab is flat, [B, 1, Hkv * capacity, ...], so it is as large as if all heads kept the same.
    """

    lengths: Tensor = field(kw_only=True)  # units of each head, int64, [B, Hkv]
    longest: int = field(default=0, kw_only=True)

    @property
    def nbytes(self) -> int:
        return self.slab.nbytes + self.lengths.nbytes

    @property
    def heads(self) -> int:
        return self.lengths.shape[1]

    @property
    def width(self) -> int:
        return self.longest

    @property
    def padding(self) -> Tensor:
        return self.longest - self.lengths

    def units(self) -> Units:
        """The units in use, each head padded on the left to the longest one: [B, Hkv, longest, ...].

        What stands in the padding is a copy of some unit, so that every number in it is finite.
        """
        slot = torch.arange(self.longest, device=self.lengths.device) - self.padding[..., None]
        first = self.lengths.cumsum(1) - self.lengths
        index = (first[..., None] + slot.clamp(min=0)).flatten(1)[:, None]  # [B, 1, Hkv * longest]
        padded = self.slab[slice(0, self.heads * self.held)].gather(index)
        return Units(*(tensor[:, 0].unflatten(1, (self.heads, self.longest)) for tensor in padded))

    def positions(self) -> Tensor:
        """As for other layers, [B, Hkv, longest]; padding is -1."""
        valid = torch.arange(self.longest, device=self.lengths.device) >= self.padding[..., None]
        return self.units().position.masked_fill(~valid, -1)

    def append(self, new: Units, workspace: Units | None) -> Units:
        pairs = zip(self.units(), new, strict=True) if self.held else ((tensor[:, :, :0], tensor) for tensor in new)
        self._joined = Units(*(torch.cat((old, fresh), 2) for old, fresh in pairs))
        return self._joined

    def keep(self, keep: Tensor) -> None:
        """Of the appended units only those at `keep` stay: [B, Hkv * b], head * S + index, ascending."""
        self._store(keep)
        self.evicted = True

    def settle(self) -> None:
        assert self._joined is not None
        total = len(self._joined)
        slot = torch.arange(total, device=self.lengths.device).expand(*self.lengths.shape, total)
        real = (slot >= self.padding[..., None]).flatten(1)
        count = self.heads * (self.held + total - self.longest)
        self._store(real.byte().argsort(dim=1, descending=True, stable=True)[:, :count])

    def _store(self, keep: Tensor) -> None:
        assert self._joined is not None
        self.slab.write(0, self._joined.flat().gather(keep[:, None]))
        head = torch.div(keep, len(self._joined), rounding_mode="floor")
        self.lengths = torch.zeros_like(self.lengths).scatter_add_(1, head, torch.ones_like(keep))
        self.longest = int(self.lengths.max())  # waits for the device: the next chunk's shapes depend on it
        self.held, self._joined = keep.shape[1] // self.heads, None

    def tensors(self) -> dict[str, Tensor]:
        flat = self.slab[slice(0, self.heads * self.held)]
        return {**dict(zip(NAMES, flat, strict=True)), "lengths": self.lengths}

    def restore(self, tensors: dict[str, Tensor], *, evicted: bool) -> None:
        super().restore(tensors, evicted=evicted)
        self.held //= self.heads
        self.lengths = tensors["lengths"].to(self.slab.k.device)
        self.longest = int(self.lengths.max())

    def take_rows(self, indices: Tensor) -> None:
        super().take_rows(indices)
        self.lengths = self.lengths.index_select(0, indices)


class KVCache:
    """The cache of one batch of equally long sequences.

    Args:
        capacity: units per budgeted layer, or one number a layer; None: slabs grow as needed and nothing is evicted.
        chunk_size: the largest number of units appended at once.
        windows: per layer, the sliding window or None.
        state: numbers of the method's own per unit.
        ragged: the KV heads of a layer share its capacity and may keep different numbers of units.
        spare: room in every slab for a chunk that is evicted from after the forward pass only.
    """

    def __init__(
        self, *, windows: list[int | None], batch: int, num_kv_heads: int, head_dim: int,
        capacity: int | Sequence[int] | None, chunk_size: int, dtype: torch.dtype, device: torch.device,
        initial: int = 0, state: int = 0, ragged: bool = False, spare: int = 0,
    ) -> None:  # fmt: skip
        self.capacity = capacity
        self.chunk_size = chunk_size
        self.seen = 0  # tokens read so far, kept or not
        self._shape = (batch, num_kv_heads)
        self._head_dim, self._dtype, self._device, self._state = head_dim, dtype, device, state
        each = [initial if capacity is None else capacity] * len(windows) if not isinstance(capacity, Sequence) else (
            capacity)  # fmt: skip
        self.layers: list[LayerCache] = []
        for units, window in zip(each, windows, strict=True):
            if ragged and window is None:
                lengths = torch.zeros(batch, num_kv_heads, dtype=torch.int64, device=device)
                self.layers.append(RaggedLayer(self._new(num_kv_heads * units, heads=1), lengths=lengths))
            else:
                self.layers.append(LayerCache(self._new(units + spare if window is None else window - 1), window))
        fixed = [len(layer.slab) for layer in self.layers
                 if layer.window is not None or (capacity is not None and not ragged and not spare)]  # fmt: skip
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
        """Units per KV head, on average over heads and layers that take a budget, rounded up."""
        counts = [layer.held for layer in self.layers if layer.window is None]
        return -(-sum(counts) // max(1, len(counts)))

    @property
    def nbytes(self) -> int:
        """Bytes of the slabs as allocated: keys, values, scores, positions, flags and the method's own numbers."""
        return sum(layer.nbytes for layer in self.layers)

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
        twin.layers = [layer.copy() for layer in self.layers]
        twin.peak_bytes = twin.nbytes + twin.workspace_bytes
        return twin

    def rows(self, indices: Tensor) -> KVCache:
        """A copy with some of the sequences only. indices: int64, [rows]."""
        twin = self.copy()
        twin._shape = (len(indices), self._shape[1])
        for layer in twin.layers:
            layer.take_rows(indices)
        if self.workspace is not None:
            twin.workspace = twin._new(len(self.workspace))
        return twin

    def _new(self, units: int, heads: int | None = None) -> Units:
        batch, all_heads = self._shape
        return Units.empty(batch, heads or all_heads, units, self._head_dim, self._dtype, self._device, self._state)

    def _grow(self, layer: LayerCache, needed: int) -> None:
        larger = self._new(max(needed, len(layer.slab) + len(layer.slab) // 2))
        larger.write(0, layer.units())
        self.note_scratch(larger.nbytes)  # for a moment the old slab and the new one both exist
        layer.slab = larger
