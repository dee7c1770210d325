"""KV units in slabs that are allocated once: append, keep, copy, save.

One slab a layer holds at most `capacity` units. While a layer works on a chunk, the chunk's units lie beside its old
ones, and as soon as it is done what stays is moved up within the slab: only one layer at a time holds more than its
budget, and nothing is copied that does not move. Methods that look at all units at once want them in one piece; for
those old and new lie together in one workspace that all layers share. The peak is layers * budget + (budget + chunk)
units, not layers * (budget + chunk) as in the published code.

Every unit carries its score, its original position, whether the caller protected it and, for methods that ask for
them, numbers of the method's own; all of them move with it. Keys are stored before RoPE: which angle a unit gets is
decided when it is read.

A slab holds K and V as they are, or as the codecs of a layer store them (`stores`). Then a unit is encoded once, when
it comes in or, where a store leaves the newest as they are, when it has aged (`tail`), and decoded for one layer's
turn; codes are what is gathered and kept, so no unit is ever encoded twice. A chunk's own attention sees its units as
they are, later chunks see them as stored. A unit that others are merged into is a new one.

While a prompt is read behind a full cache, K and V of a chunk's units may take the slots of those that go
(`LayerCache.fill`): then they are the only ones that move. Scores, positions and flags are always in position order,
and `slots` says where the rest of each unit lies, until `order` sorts it.

Layers may have budgets of their own. In a `RaggedLayer` the KV heads have too: its units lie head after head in one
flat slab of the same size, and are padded on the left, in memory that lives for one layer's turn, while they are
read.

Shapes: B batch, Hkv KV heads, S units, D head dim, N numbers of the method's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from locret import stores
from locret.errors import CapacityError
from locret.kernels.compact import Choice, Column, compact, compact_scratch
from locret.kernels.fill import fill
from locret.storage import Affine, Stored, allocate
from locret.stores import Holder, Store, layer_store
from locret.tail import Tailed, TailStored

NAMES = ("k", "v", "score", "position", "protected", "state")


class Table(ABC):
    """Tensors that all have the same units on axis 2, [B, Hkv, S, ...], and move together."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""

    @abstractmethod
    def like(self, tensors: dict[str, Tensor]) -> Self:
        """A table of the same kind with other tensors."""

    @abstractmethod
    def units(self) -> Units:
        """The units decoded; scores, positions, flags and states are the same tensors."""

    @abstractmethod
    def join(self, new: Units) -> tuple[Self, Units]:
        """These units and new ones behind them, in fresh memory: as they are stored, and decoded for reading."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Every tensor changed the same way."""
        return self.like({name: change(tensor) for name, tensor in self.tensors().items()})

    def __len__(self) -> int:
        return next(iter(self)).shape[2]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors().values())

    def __getitem__(self, span: slice) -> Self:
        """A view of some units."""
        return self.map(lambda tensor: tensor[:, :, span])

    def write(self, start: int, units: Self) -> None:
        """Copy `units` to start, start + 1, ..."""
        theirs = units.tensors()
        for name, mine in self.tensors().items():
            mine[:, :, start : start + len(units)] = theirs[name]

    def gather(self, keep: Tensor) -> Self:
        """The units at `keep` [B, Hkv, b], in that order, in fresh memory."""
        return self.map(lambda tensor: _take(tensor, keep))

    def flat(self) -> Self:
        """One head that holds the units of all heads, head after head: [B, 1, Hkv * S, ...]."""
        return self.map(lambda tensor: tensor.flatten(1, 2).unsqueeze(1))

    def take_rows(self, indices: Tensor) -> Self:
        """Some of the sequences, in fresh memory. indices: int64, [rows]."""
        return self.map(lambda tensor: tensor.index_select(0, indices))

    def split_rows(self, count: int) -> list[Self]:
        """Views of `count` sequences each."""
        parts = {name: tensor.split(count) for name, tensor in self.tensors().items()}
        return [self.like(dict(zip(parts, part, strict=True))) for part in zip(*parts.values(), strict=True)]

    def memory(self) -> list[Tensor]:
        """All that it consists of."""
        return list(self)

    @property
    def nbytes(self) -> int:
        return _storage_bytes(self.memory())


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all memory that belongs to these tensors, what several share counted once."""
    stored = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in stored}.values())


@dataclass
class Units(Table):
    """Units of one layer, in position order. Also the shape of a dense slab and of the workspace."""

    k: Tensor  # before RoPE, [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, D]
    score: Tensor  # fp32, [B, Hkv, S]
    position: Tensor  # original position, int32, [B, Hkv, S]
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
        shape = (batch, heads, units)
        k, v = (torch.empty(*shape, head_dim, dtype=dtype, device=device) for _ in range(2))
        # one piece of memory for the rest: allocators round each up, on a GPU by as much as a megabyte
        count = batch * heads * units
        kinds = {"position": torch.int32, "score": torch.float32, "state": torch.float32, "protected": torch.bool}
        sizes = [count * (state if name == "state" else 1) * kind.itemsize for name, kind in kinds.items()]
        parts = torch.empty(sum(sizes), dtype=torch.uint8, device=device).split(sizes)
        rest = {name: part.view(kind) for (name, kind), part in zip(kinds.items(), parts, strict=True)}
        state_of = rest.pop("state").view(*shape, state)
        return cls(k, v, state=state_of, **{name: part.view(shape) for name, part in rest.items()})

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in NAMES}

    def like(self, tensors: dict[str, Tensor]) -> Units:
        return Units(**tensors)

    def units(self) -> Units:
        return self

    def join(self, new: Units) -> tuple[Units, Units]:
        theirs = new.tensors()
        both = self.like({name: torch.cat((mine, theirs[name]), 2) for name, mine in self.tensors().items()})
        return both, both


@dataclass
class Packed(Table):
    """Units whose K and V are as a store holds them. Tables that units share (`tail`) are no tensors of this table."""

    store: Store
    k: Stored
    v: Stored
    rest: dict[str, Tensor]  # score, position, protected, state

    @classmethod
    def empty(
        cls, store: Store, batch: int, heads: int, units: int, head_dim: int, dtype: torch.dtype,
        device: torch.device, state: int = 0,
    ) -> Packed:  # fmt: skip
        rest = Units.empty(batch, heads, units, 0, dtype, device, state).tensors()
        del rest["k"], rest["v"]
        k, v = (allocate(x, batch, heads, units=units, head_dim=head_dim, dtype=dtype, device=device) for x in store)
        return cls(store, k, v, rest)

    def tensors(self) -> dict[str, Tensor]:
        parts = {f"{name}.{part}": x for name in ("k", "v") for part, x in getattr(self, name).parts.items()}
        return parts | self.rest

    def like(self, tensors: dict[str, Tensor]) -> Packed:
        k, v = (x.like({part: tensors[f"{name}.{part}"] for part in x.parts}) for name, x in self._held())
        return Packed(self.store, k, v, {name: tensors[name] for name in self.rest})

    def write(self, start: int, units: Self) -> None:
        super().write(start, units)
        self._share(units.tables())

    def tables(self) -> dict[str, Tensor]:
        """Those that units share, by name."""
        return {f"{name}.table.{key}": table for name, x in self._held() if isinstance(x, TailStored)
                for key, table in x.tables.items()}  # fmt: skip

    def take_rows(self, indices: Tensor) -> Packed:
        taken = self.map(lambda tensor: tensor.index_select(0, indices))
        for name, x in self._held():
            if isinstance(x, TailStored):
                setattr(taken, name, x.take_rows(indices))
        return taken

    def units(self) -> Units:
        return Units(self.store.k.decode(self.k), self.store.v.decode(self.v), **self.rest)

    def join(self, new: Units) -> tuple[Packed, Units]:
        theirs = new.tensors()
        rest = {name: torch.cat((mine, theirs[name]), 2) for name, mine in self.rest.items()}
        k, v = (
            mine.join(codec.encode(theirs[name])) for codec, (name, mine) in zip(self.store, self._held(), strict=True)
        )
        old = self.units()
        dense = Units(torch.cat((old.k, new.k), 2), torch.cat((old.v, new.v), 2), **rest)
        return Packed(self.store, k, v, rest), dense

    @property
    def ages(self) -> bool:
        """Whether units are encoded some time after they came."""
        return any(isinstance(codec, Tailed) for codec in self.store)

    def encoded(self, new: Units) -> Packed:
        """New units as this store holds them; scores, positions, flags and states are the same tensors."""
        rest = {name: tensor for name, tensor in new.tensors().items() if name in self.rest}
        return Packed(self.store, self.store.k.encode(new.k), self.store.v.encode(new.v), rest)

    def settled(self, newest: Tensor, num_heads: int, heads: Tensor | None, queries: Tensor | None) -> Packed:
        """With all aged units encoded (`Tailed.settle`); itself where units are encoded as they come in."""
        if not self.ages:
            return self
        k, v = (
            codec.settle(x, self.rest["position"], newest=newest, heads=heads, num_heads=num_heads, queries=queries)
            if isinstance(codec, Tailed) and isinstance(x, TailStored) else x
            for codec, (_, x) in zip(self.store, self._held(), strict=True)
        )  # fmt: skip
        return Packed(self.store, k, v, self.rest)

    def restore(self, tables: dict[str, Tensor]) -> None:
        """Take saved tables, where this store has any."""
        device = self.rest["score"].device
        self._share({name: tables[name].to(device) for name in self.tables()})

    def memory(self) -> list[Tensor]:
        return [*super().memory(), *self.tables().values()]

    def _held(self) -> tuple[tuple[str, Stored], tuple[str, Stored]]:
        return ("k", self.k), ("v", self.v)

    def _share(self, tables: dict[str, Tensor]) -> None:
        for name, x in self._held():
            if isinstance(x, TailStored):
                setattr(self, name, x.like(x.parts, {key: tables[f"{name}.table.{key}"] for key in x.tables}))


def is_number(name: str) -> bool:
    """Whether a tensor of a table is what K or V consist of."""
    return name.split(".")[0] in ("k", "v")


def _lie_alike(chosen: list[Store] | None) -> bool:
    """Whether the slabs of layers are alike, and each consists of its units and nothing else. None: all are dense."""
    return chosen is None or all(
        isinstance(codec, Affine) and codec == of_first
        for store in chosen for codec, of_first in zip(store, chosen[0], strict=True)
    )  # fmt: skip


def _take(tensor: Tensor, keep: Tensor) -> Tensor:
    """tensor [B, H, S, ...] at keep [B, H, b]."""
    tail = tensor.shape[3:]
    return tensor.gather(2, keep.reshape(*keep.shape, *(1 for _ in tail)).expand(*keep.shape, *tail))


def _write(slab: Units | Packed, start: int, units: Units | Packed) -> None:
    """`slab.write`, of a table of its own kind."""
    assert type(slab) is type(units), "a slab holds what it was made for"
    slab.write(start, units)  # type: ignore[arg-type]


def unit_bytes(head_dim: int, dtype: torch.dtype, state: int = 0, storage: str | Store = "dense") -> int:
    """Bytes of one unit, at most: K and V as stored, score, position, flag and the method's own numbers."""
    store = layer_store(storage) if isinstance(storage, str) else storage
    return stores.unit_bytes(store, head_dim, dtype) + 4 + 4 + 1 + 4 * state


def out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, for torch (on a CPU it says so by a message only) or for a cache of ours."""
    said = ("can't allocate memory", "Storage size calculation overflowed", "Overflow when unpacking long")
    kinds = torch.OutOfMemoryError | MemoryError | CapacityError
    return isinstance(error, kinds) or any(text in str(error) for text in said)


@contextlib.contextmanager
def _allocating(units: int, one: int, device: torch.device) -> Iterator[None]:
    """Raises: CapacityError: there is no room for `units` units (over all rows and KV heads) of `one` bytes."""
    try:
        yield
    except (RuntimeError, TypeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise CapacityError(
            f"no memory on {device} for the cache: {units:,} units of single KV heads x {one:,} B = "
            f"{units * one:,} B; lower the budget or the number of sequences at once, or store K and V in fewer bits "
            "(--storage int8, int4)"
        ) from error.with_traceback(None)  # its frames would keep the tensors alive


@dataclass
class LayerCache:
    """The slab of one layer: `held` of its units are in use."""

    slab: Units | Packed
    window: int | None = None  # a sliding-window layer keeps its last window - 1 units and takes no budget
    held: int = 0
    evicted: bool = False  # False: original positions are still 0, 1, 2 ...
    newest: Tensor | None = None  # position of the token appended last, kept or not
    slots: Tensor | None = None  # where in the slab K and V of each unit lie, int32 [B, Hkv, held]; None: in order
    _joined: Units | None = field(default=None, repr=False)  # old units and the chunk's, between append and keep
    _source: Units | Packed | None = field(default=None, repr=False)  # the same, as stored
    _queries: Tensor | None = field(default=None, repr=False)  # of the chunk, for stores that choose by them
    _beside: dict[str, Column] = field(default_factory=dict, repr=False)  # held units and a chunk's, until `keep`

    def watch(self, q: Tensor) -> None:
        """The chunk's queries before RoPE, [B, Hq, C, D], for the time until its units are settled."""
        self._queries = q if isinstance(self.slab, Packed) else None

    @property
    def watches(self) -> bool:
        """Whether queries are being held."""
        return self._queries is not None

    def units(self) -> Units:
        """The units in use: a view, or decoded."""
        self.order()
        return self.slab[slice(0, self.held)].units()

    @property
    def joined_bytes(self) -> int:
        """What the appended units take in memory of their own, beside slab and workspace."""
        if not isinstance(self._source, Packed) or self._joined is None:
            return 0
        return self._joined.k.nbytes + self._joined.v.nbytes + self._source.nbytes

    def memory(self) -> list[Tensor]:
        """All that it consists of."""
        return self.slab.memory() + ([] if self.slots is None else [self.slots])

    def positions(self) -> Tensor:
        """Original positions of the units in use, int64, ascending, [B, Hkv, S]."""
        return self.slab[slice(0, self.held)].tensors()["position"].long()

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
        self.order()
        return _saved(self.slab[slice(0, self.held)])

    def restore(self, tensors: dict[str, Tensor], *, evicted: bool) -> None:
        """Fill an empty slab with saved units."""
        units = self.slab.like({name: tensors[name].to(mine.device) for name, mine in self.slab.tensors().items()})
        if isinstance(units, Packed):
            units.restore(tensors)
        _write(self.slab, 0, units)
        self.held, self.evicted = len(units), evicted

    def copy(self) -> LayerCache:
        """An independent copy."""
        self.order()
        return dataclasses.replace(self, slab=self.slab.map(torch.clone), slots=None)

    def take_rows(self, indices: Tensor) -> Self:
        """A copy with some of the sequences only. indices: int64, [rows]."""
        self.order()
        return dataclasses.replace(self, slab=self.slab.take_rows(indices), slots=None)

    def append(self, new: Units, workspace: Units | None) -> Units:
        """Put a chunk behind the held units; returns all of them. They stay where they are until `keep` or `settle`."""
        self.order(settled=True)
        total = self.held + len(new)
        if isinstance(self.slab, Packed):
            self._source, self._joined = self.slab[slice(0, self.held)].join(new)
            return self._joined
        place = self.slab
        if total > len(self.slab):
            assert workspace is not None, "only slabs of a fixed size overflow"
            assert total <= len(workspace), "the workspace holds capacity + chunk units"
            workspace.write(0, self.units())
            place = workspace
        place.write(self.held, new)
        self._source = self._joined = place[slice(0, total)]
        return self._joined

    def beside(self, new: Units) -> tuple[Units, Units | Packed]:
        """Instead of `append`: the chunk stays where it is until `keep` or `fill`, and nothing that is held is copied.

        Returns: the held units, decoded, K and V as they lie (`slots`); and the chunk as the slab will hold it.
        """
        assert not self.ages, "units that are encoded later are joined with the others"
        stored = self.slab.encoded(new) if isinstance(self.slab, Packed) else new
        return self._lay(stored).units(), stored

    @property
    def ages(self) -> bool:
        """Whether units are encoded some time after they came (`Tailed`)."""
        return isinstance(self.slab, Packed) and self.slab.ages

    def rewrite(self, k: Tensor, v: Tensor) -> None:
        """The appended units take these keys and values, [B, Hkv, S, D]; codes of units that do not change stay."""
        assert self._joined is not None
        for name, new in (("k", k), ("v", v)):
            mine: Tensor = getattr(self._joined, name)
            if isinstance(self._source, Packed):
                stored: Stored = getattr(self._source, name)
                codec: Holder = getattr(self._source.store, name)
                changed = (new != mine).any(-1, keepdim=True)
                setattr(self._source, name, stored.replaced(changed, codec.encode(new)))
            mine.copy_(new)

    def keep(self, keep: Tensor) -> None:
        """Of the appended units only those at `keep` [B, Hkv, b] stay."""
        if self._beside:
            assert self.slots is None, "in order, or they would be filled"
            compact(list(self._beside.values()), keep)
            self.evicted = True
            self._done(keep.shape[-1])
            return
        assert self._source is not None
        _write(self.slab, 0, self._aged(self._source.gather(keep)))  # gathered first: source and target may overlap
        self.evicted = True
        self._done(keep.shape[-1])

    def fill(self, choice: Choice) -> None:
        """`keep` of as many units as are held: K and V of the new ones take the slots of those that go.

        `slots` stays where it is once it is there, for captured kernels.
        """
        assert choice.dropped is not None
        assert choice.keep.shape[-1] == self.held
        if self.slots is None:
            self.slots = self._in_order()
        large = [column for name, column in self._beside.items() if is_number(name)]
        small = [column for name, column in self._beside.items() if not is_number(name)]
        taken = fill(large, self.slots, choice.keep, choice.dropped)
        compact([*small, Column(self.slots, taken, self.slots)], choice.keep)
        self.evicted = True
        self._done(self.held)

    def order(self, *, settled: bool = False) -> None:
        """Put K and V in position order, too. settled: `fill` will not come again; so far `slots` remains."""
        if self.slots is None:
            return
        slots = self.slots.long()
        for name, column in self.slab[slice(0, self.held)].tensors().items():
            if is_number(name):
                column.copy_(_take(column, slots))
        self.slots = None if settled else self.slots.copy_(self._in_order())

    def _in_order(self) -> Tensor:
        score = self.slab.tensors()["score"]
        own = torch.arange(self.held, dtype=torch.int32, device=score.device)
        return own.expand(*score.shape[:2], self.held).contiguous()

    def keep_last(self, count: int) -> None:
        """Of the appended units only the last `count` stay."""
        assert self._source is not None
        last = self._source[slice(len(self._source) - count, None)]
        _write(self.slab, 0, self._aged(last.map(torch.clone)))  # source and target may overlap
        self.evicted = True
        self._done(count)

    def settle(self) -> None:
        """All appended units stay; they fit the slab."""
        assert self._source is not None
        assert len(self._source) <= len(self.slab)
        if isinstance(self._source, Packed):
            aged = self._aged(self._source)
            start = self.held if aged is self._source else 0  # older units may have become codes
            _write(self.slab, start, aged[slice(start, None)])
        self._done(len(self._source))

    def reopen(self) -> Units:
        """The held units as if they had just been appended, for an eviction after the fact."""
        self.order(settled=True)
        self._source = self.slab[slice(0, self.held)]
        self._joined = self._source.units()
        return self._joined

    def _aged(self, units: Units | Packed, heads: Tensor | None = None) -> Units | Packed:
        """`Packed.settled`. heads: KV head of every unit, [B, 1, n], in a flat slab."""
        if not isinstance(units, Packed):
            return units
        assert self.newest is not None, "KVCache.append notes it"
        return units.settled(self.newest, self.heads, heads, self._queries)

    def revisit(self) -> dict[str, Tensor]:
        """The held units' tensors by name, for an eviction between two passes: `keep` is to follow.

        Of units in codes only where each is encoded once and for all (not `Tailed`).
        """
        self.order(settled=True)
        return self._lay(None).tensors()  # nothing is new: what stays moves up in place

    @property
    def heads(self) -> int:
        return self.slab.tensors()["score"].shape[1]

    def compact_bytes(self, keep: int) -> int:
        """Memory that keeping so many of the units beside each other takes for a moment."""
        return compact_scratch(list(self._beside.values()), keep) if self._beside else 0

    def _lay(self, new: Units | Packed | None) -> Units | Packed:
        """Have `keep` choose among the held units, which are returned, and new ones."""
        held = self.slab[slice(0, self.held)]
        mine, theirs = held.tensors(), {} if new is None else new.tensors()
        slab = self.slab.tensors().items()
        self._beside = {name: Column(mine[name], theirs.get(name), whole) for name, whole in slab if whole.numel()}
        return held

    def _done(self, held: int) -> None:
        self.held, self._source, self._joined, self._beside, self._queries = held, None, None, {}, None


def _saved(units: Units | Packed) -> dict[str, Tensor]:
    return units.tensors() | (units.tables() if isinstance(units, Packed) else {})


@dataclass
class RaggedLayer(LayerCache):
    """A layer whose KV heads keep different numbers of units; `held` is their mean, the same for every sequence.

    The slab is flat, [B, 1, Hkv * capacity, ...], so it is as large as if all heads kept the same.
    """

    lengths: Tensor = field(kw_only=True)  # units of each head, int64, [B, Hkv]
    longest: int = field(default=0, kw_only=True)

    def memory(self) -> list[Tensor]:
        return [*super().memory(), self.lengths]

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
        """The units in use, each head padded on the left to the longest one: [B, Hkv, longest, ...]."""
        return self._padded().units()

    def _padded(self) -> Units | Packed:
        """As stored.

        What stands in the padding is a copy of some unit, so that every number in it is finite.
        """
        slot = torch.arange(self.longest, device=self.lengths.device) - self.padding[..., None]
        first = self.lengths.cumsum(1) - self.lengths
        index = (first[..., None] + slot.clamp(min=0)).flatten(1)[:, None]  # [B, 1, Hkv * longest]
        padded = self.slab[slice(0, self.heads * self.held)].gather(index)
        return padded.map(lambda tensor: tensor[:, 0].unflatten(1, (self.heads, self.longest)))

    @property
    def joined_bytes(self) -> int:
        return super().joined_bytes or (0 if self._joined is None else self._joined.nbytes)

    def positions(self) -> Tensor:
        """As for other layers, [B, Hkv, longest]; padding is -1."""
        valid = torch.arange(self.longest, device=self.lengths.device) >= self.padding[..., None]
        return self._padded().tensors()["position"].long().masked_fill(~valid, -1)

    def append(self, new: Units, workspace: Units | None) -> Units:
        old = self._padded() if self.held else self.slab.map(lambda tensor: tensor[:, :, :0].expand(
            -1, self.heads, *(-1 for _ in tensor.shape[2:])))  # fmt: skip
        self._source, self._joined = old.join(new)
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
        assert self._source is not None
        head = torch.div(keep, len(self._source), rounding_mode="floor")
        _write(self.slab, 0, self._aged(self._source.flat().gather(keep[:, None]), head[:, None]))
        self.lengths = torch.zeros_like(self.lengths).scatter_add_(1, head, torch.ones_like(keep))
        self.longest = int(self.lengths.max())  # waits for the device: the next chunk's shapes depend on it
        self._done(keep.shape[1] // self.heads)

    def tensors(self) -> dict[str, Tensor]:
        flat = self.slab[slice(0, self.heads * self.held)]
        return {**_saved(flat), "lengths": self.lengths}

    def restore(self, tensors: dict[str, Tensor], *, evicted: bool) -> None:
        super().restore(tensors, evicted=evicted)
        self.held //= self.heads
        self.lengths = tensors["lengths"].to(self.lengths.device)
        self.longest = int(self.lengths.max())

    def take_rows(self, indices: Tensor) -> Self:
        return dataclasses.replace(super().take_rows(indices), lengths=self.lengths.index_select(0, indices))


class KVCache:
    """The cache of one batch of equally long sequences.

    Args:
        capacity: units per budgeted layer, or one number a layer; None: slabs grow as needed and nothing is evicted.
        chunk_size: the largest number of units appended at once.
        windows: per layer, the sliding window or None.
        state: numbers of the method's own per unit.
        ragged: the KV heads of a layer share its capacity and may keep different numbers of units.
        spare: room in every slab for a chunk that is evicted from after the forward pass only.
        storage: what slabs hold K and V in, the name of a store or one store a layer (`stores.layer_stores`).
        joins: chunks that overflow a slab are put behind its units, in the workspace; False: they stay beside them.
    """

    def __init__(
        self, *, windows: list[int | None], batch: int, num_kv_heads: int, head_dim: int,
        capacity: int | Sequence[int] | None, chunk_size: int, dtype: torch.dtype, device: torch.device,
        initial: int = 0, state: int = 0, ragged: bool = False, spare: int = 0,
        storage: str | Sequence[Store] = "dense", joins: bool = True,
    ) -> None:  # fmt: skip
        chosen = [layer_store(storage)] * len(windows) if isinstance(storage, str) else list(storage)
        self.stores = None if all(store == layer_store("dense") for store in chosen) else chosen
        self.capacity = capacity
        self.joins = joins
        self.chunk_size = chunk_size
        self.seen = 0  # tokens read so far, kept or not
        self._shape = (batch, num_kv_heads)
        self._head_dim, self._dtype, self._device, self._state = head_dim, dtype, device, state
        each = [initial if capacity is None else capacity] * len(windows) if not isinstance(capacity, Sequence) else (
            capacity)  # fmt: skip
        rooms = [units + spare if window is None else window - 1 for units, window in zip(each, windows, strict=True)]
        self._whole: Units | Packed | None = None  # all slabs in one piece, layer after layer
        if (
            capacity is not None
            and not ragged
            and not any(windows)
            and len(set(rooms)) == 1
            and _lie_alike(self.stores)
        ):
            self._whole = self._new(0, rooms[0], rows=batch * len(windows))
            self.layers = [LayerCache(slab) for slab in self._whole.split_rows(batch)]
        else:
            self.layers = [
                RaggedLayer(self._new(index, num_kv_heads * each[index], heads=1),
                            lengths=torch.zeros(batch, num_kv_heads, dtype=torch.int64, device=device))
                if ragged and window is None else LayerCache(self._new(index, rooms[index]), window)
                for index, window in enumerate(windows)
            ]  # fmt: skip
        joins = joins and capacity is not None and not ragged and not spare
        fixed = [len(layer.slab) for layer in self.layers if layer.window is not None or joins]
        self.workspace = self._dense(max(fixed) + chunk_size) if fixed and self.stores is None else None
        self.peak_bytes = self.nbytes + self.workspace_bytes

    def append(self, index: int, new: Units) -> Units:
        """Put a chunk behind the units of layer `index`; returns all of them."""
        layer = self.layers[index]
        layer.newest = new.position[0, 0, -1]
        if self.capacity is None and layer.window is None and layer.held + len(new) > len(layer.slab):
            self._grow(index, layer.held + len(new))
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
        if self._whole is None:
            return _storage_bytes(tensor for layer in self.layers for tensor in layer.memory())
        return self._whole.nbytes + sum(layer.slots.nbytes for layer in self.layers if layer.slots is not None)

    @property
    def workspace_bytes(self) -> int:
        return 0 if self.workspace is None else self.workspace.nbytes

    def note_scratch(self, scratch_bytes: int) -> None:
        """Count what one layer allocates beside slabs and workspace while it attends and compacts."""
        self.peak_bytes = max(self.peak_bytes, self.nbytes + self.workspace_bytes + scratch_bytes)

    def whole(self) -> LayerCache | None:
        """All layers as one, of L B rows, if their slabs lie so and hold equally many units; `cut` takes over what is
        kept of it."""
        if self._whole is None or len({layer.held for layer in self.layers}) > 1:
            return None
        self.order()
        return LayerCache(self._whole, held=self.layers[0].held)

    def cut(self, held: int) -> None:
        """Every layer of the `whole` holds so many units now, what stayed of more."""
        for layer in self.layers:
            layer.held, layer.evicted = held, True

    def order(self) -> None:
        """Put all units in position order, and go on so: the prompt has been read."""
        for layer in self.layers:
            layer.order(settled=True)

    def copy(self) -> KVCache:
        """An independent copy: continuing one does not change the other. The workspace is shared: it holds nothing."""
        return self._moved(None)

    def rows(self, indices: Tensor) -> KVCache:
        """A copy with some of the sequences only. indices: int64, [rows]."""
        twin = self._moved(indices)
        if self.workspace is not None:
            twin.workspace = twin._dense(len(self.workspace))
        return twin

    def _moved(self, indices: Tensor | None) -> KVCache:
        """All sequences, or some of them, in memory of their own."""
        twin = object.__new__(KVCache)
        twin.__dict__.update(self.__dict__)
        if indices is not None:
            twin._shape = (len(indices), self._shape[1])
        if self._whole is None:
            twin.layers = [layer.copy() if indices is None else layer.take_rows(indices) for layer in self.layers]
        else:
            for layer in self.layers:
                layer.order()
            layers, (rows, _) = len(self.layers), self._shape
            taken = torch.arange(rows, device=self._device) if indices is None else indices
            every = (torch.arange(layers, device=taken.device)[:, None] * rows + taken).flatten()
            twin._whole = self._whole.take_rows(every)
            slabs = twin._whole.split_rows(twin.batch)
            twin.layers = [dataclasses.replace(layer, slab=slabs[i], slots=None) for i, layer in enumerate(self.layers)]
        twin.peak_bytes = twin.nbytes + twin.workspace_bytes
        return twin

    def _new(self, index: int, units: int, heads: int | None = None, rows: int | None = None) -> Units | Packed:
        if self.stores is None:
            return self._dense(units, heads, rows)
        batch, all_heads = rows or self._shape[0], heads or self._shape[1]
        store = self.stores[index]
        one = unit_bytes(self._head_dim, self._dtype, self._state, store)
        with _allocating(batch * all_heads * units, one, self._device):
            return Packed.empty(store, batch, all_heads, units, self._head_dim, self._dtype, self._device, self._state)

    def _dense(self, units: int, heads: int | None = None, rows: int | None = None) -> Units:
        batch, all_heads = rows or self._shape[0], heads or self._shape[1]
        with _allocating(batch * all_heads * units, unit_bytes(self._head_dim, self._dtype, self._state), self._device):
            return Units.empty(batch, all_heads, units, self._head_dim, self._dtype, self._device, self._state)

    def _grow(self, index: int, needed: int) -> None:
        layer = self.layers[index]
        larger = self._new(index, max(needed, len(layer.slab) + len(layer.slab) // 2))
        _write(larger, 0, layer.slab[slice(0, layer.held)])
        self.note_scratch(larger.nbytes)  # for a moment the old slab and the new one both exist
        layer.slab = larger
