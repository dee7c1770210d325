"""The decode steps of one reader: replayed (`step.Step`), and what they leave out done later, for many at once.

    in the step       append k, v behind the units; attend over the slots in use; count up
    on the host       count along; when the budget is exceeded, evict (`Reader.evict`)
    seldom, `flush`   scores, positions and flags of the units since the last time, all at once

That scores may wait is a property of the method: each unit's depends on its own token only (`Method.per_token`), so
the queries are stashed until then. Methods that score all units anew when they evict (`Method.memoryless`) stash
nothing. Other methods, layers with windows, units in stores other than 8- and 4-bit codes and evicted caches under
original positions take ordinary steps.

Rows of many readers: `slots`.

Shapes: B rows, L layers, Hkv heads, R stashed steps, D head dim, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from locret.backbone import Backbone
from locret.cache import KVCache, LayerCache, Packed, Units, is_number
from locret.kernels.decode_attention import Codes, Slab
from locret.kernels.scattered import STRETCH, Scattered, addresses
from locret.kernels.sizes import cdiv
from locret.methods.base import ChunkView, Method
from locret.select import finite
from locret.step import Slabs, Stash, Step, can_capture, codes, reads_tables, take
from locret.storage import Affine

if TYPE_CHECKING:
    from locret.prefill import Reader

MOST_STASHED = 64  # steps


class StepGraph:
    """The decode steps of one `Reader`. `step` as long as there is `room`; `flush` before anybody reads the cache."""

    def __init__(self, reader: Reader, *, capture: bool) -> None:
        # not the reader itself, which holds this: a cycle would keep the cache's memory until the collector comes by
        self._backbone, self._method = reader.backbone, reader.method
        self._cache = cache = reader.cache
        self._rope = reader.rope
        scored = reader.method.evicts and reader.method.per_token and reader.plan.budget is not None
        stashed = min(reader.plan.decode_interval, MOST_STASHED) if scored else 0
        kind = (cache.batch, stashed, codec_of(cache.layers[0]))
        self._step = take(reader.backbone, kind, owner=self) if capture else Step(reader.backbone, *kind, capture=False)
        if self._step.stash is not None:
            cache.note_scratch(self._step.stash.nbytes)
        self._by_address = not capture or reads_tables(reader.backbone)
        self._pending = 0
        # whether all scores since the last `flush` are finite, and whether there are any
        self._unlooked = False
        self._good = torch.ones((), dtype=torch.bool, device=reader.backbone.device)
        self._stale = True  # counters and addresses are to be looked at again

    @classmethod
    def of(cls, reader: Reader, *, capture: bool) -> StepGraph | None:
        """None where this reader's steps are not all alike."""
        if capture and not can_capture(reader.backbone):
            return None
        return cls(reader, capture=capture) if alike(reader) else None

    def room(self) -> bool:
        """Whether every slab takes one more unit."""
        return room(self._cache)

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row, [B]; returns logits [B, V]."""
        if self._step.stash is not None and self._pending == len(self._step.stash):
            self.write()
        if self._stale:
            self._refresh()
        logits = self._step.run(tokens).clone()  # the next replay writes over it
        self._pending += 1
        count(self._cache, 1)
        return logits

    def undo(self) -> None:
        """Take back the last step, if nothing was written since: the units that it added are forgotten."""
        assert self._pending, "a step that was flushed stays"
        self._pending -= 1
        self._stale = True
        count(self._cache, -1)

    @torch.inference_mode()
    def flush(self) -> bool:
        """`write`, and whether all scores since the last time are finite; waits for that, if there were any."""
        self.write()
        if not self._unlooked:
            return True
        good, self._unlooked = bool(self._good), False
        self._good.fill_(True)
        return good

    def write(self) -> None:
        """Scores, positions and flags of the units that steps added. Waits for nothing."""
        written, self._pending, self._stale = self._pending, 0, True
        if written:
            self._good &= write(self._backbone, self._method, self._cache, written, self._step.stash)
            self._unlooked = True

    def _refresh(self) -> None:
        """Counters and addresses from the cache; a new capture if the last one was made for others."""
        self._cache.order()  # a prompt that was given up leaves units as they were
        layers, found = self._cache.layers, _slabs(self._cache)
        slabs: Sequence[Slab] = found
        tables = torch.zeros(self._step.tables.shape, dtype=torch.int64)
        seen = [len(held.slab) for held in layers]
        if self._by_address:
            parts = [x for slab in found for x in (slab.parts if isinstance(slab, Codes) else (slab,))]
            tables = addresses(parts).unflatten(0, (len(parts), -1))
            own = self._step.tables.split(len(parts) // len(found))  # every slab's
            if isinstance(found[0], Tensor):  # few sizes, for few captures; the kernel of codes reads no slot too many
                seen = [cdiv(slots, STRETCH) * STRETCH for slots in seen]
            slabs = [_in_table(*of_slab) for of_slab in zip(found, own, [*seen, *seen], strict=True)]
        else:  # sizes, too: the next reader's slabs may begin where the last one's did
            seen += [x.data_ptr() for held in layers for x in _numbers(held.slab)]
        self._rope.grow(max(seen[: len(layers)]) + 1)
        self._step.state.copy_(row_state(self._cache, self._pending, tables), non_blocking=True)
        self._step.prepare(self._backbone, self._rope, _pairs(slabs), seen)
        self._stale = False


def alike(reader: Reader) -> bool:
    """Whether this reader's decode steps are all the same work."""
    backbone, plan = reader.backbone, reader.plan
    if reader.method.evicts and not (reader.method.per_token or reader.method.memoryless):
        return False
    if any(not _plain(held) for held in reader.cache.layers) or getattr(reader.method, "wants_hidden", False):
        return False
    if len({codec_of(held) for held in reader.cache.layers}) > 1:
        return False
    if plan.positions == "original" and plan.budget is not None:
        return False
    return all(reader.rope.angles(i) is not None or not spec.rotated for i, spec in enumerate(backbone.layers))


def room(cache: KVCache) -> bool:
    """Whether every slab takes one more unit."""
    return all(held.held < len(held.slab) for held in cache.layers)


def count(cache: KVCache, steps: int) -> None:
    """Units that steps added, on the host."""
    for held in cache.layers:
        held.held += steps
    cache.seen += steps


def row_state(cache: KVCache, pending: int, tables: Tensor) -> Tensor:
    """`Step.state` of the rows of a cache whose last `pending` units are stashed, int64 on the host.

    tables: `addresses` of its slabs, [2 L P, B, Hkv].
    """
    held, rows = [layer.held for layer in cache.layers], (cache.batch, cache.layers[0].heads)
    numbers = torch.tensor([*held, *(n + 1 for n in held), pending, 1])[:, None, None].expand(-1, *rows)
    return torch.cat((tables, numbers))


def write(backbone: Backbone, method: Method, cache: KVCache, pending: int, stash: Stash | None) -> Tensor:
    """Scores, positions and flags of the pending units, the last ones of every layer.

    Args:
        stash: what they are scored by; None: they are not.
    Returns: whether all scores are finite, bool [], on the device.
    """
    first, whole = cache.seen - pending, cache.whole()
    at = torch.arange(first, cache.seen, device=backbone.device, dtype=torch.int32)
    # the device waits for the host here, so that little is done layer by layer
    parts = cache.layers if whole is None else [whole]
    units = [held.slab[slice(held.held - pending, held.held)].tensors() for held in parts]
    position, protected, score = ([own[name] for own in units] for name in ("position", "protected", "score"))
    torch._foreach_copy_(position, [at.expand_as(x) for x in position])
    torch._foreach_zero_([*protected, *(own["state"] for own in units if own["state"].numel())])
    if stash is None:
        torch._foreach_zero_(score)
        return torch.ones((), dtype=torch.bool, device=backbone.device)
    scores = _scores(backbone, method, stash, units, pending, first)
    if whole is not None:
        scores = [scores.flatten(0, 1) if isinstance(scores, Tensor) else torch.cat(scores)]
    torch._foreach_copy_(score, list(scores))
    return finite(torch.stack([most.to(at.device) for most in torch._foreach_norm(list(scores), math.inf)]))


def _scores(
    backbone: Backbone, method: Method, stash: Stash, units: Sequence[dict[str, Tensor]], pending: int, first: int
) -> Tensor | list[Tensor]:
    """Scores of the pending units, [L, B, Hkv, n], or a list of [B, Hkv, n].

    Args:
        units: of every layer, or of all as one.
        first: position of the first.
    """
    q, *exact = (x[:, :, :, :pending] for x in stash.tensors)
    k, v = exact or ([own[name] for own in units] for name in ("k", "v"))
    if not exact and len(units) == 1:
        k, v = (own[0].unflatten(0, (-1, q.shape[1])) for own in (k, v))
    found = method.score_layers(q, k, v) if isinstance(k, Tensor) and isinstance(v, Tensor) else None
    if found is not None:
        return found
    return [
        method.score(ChunkView(layer, q[layer], k[layer], v[layer], first, call.scale))
        for layer, call in enumerate(backbone.calls)
    ]


def codec_of(held: LayerCache) -> Affine | None:
    """How a layer's slab is quantised; None: not at all, or in another way."""
    store = held.slab.store if isinstance(held.slab, Packed) else None
    return store.k if store is not None and isinstance(store.k, Affine) and store.k == store.v else None


def dense_slabs(cache: KVCache) -> list[Tensor]:
    """K of all layers and then V, wherever they lie by now; of a cache that holds numbers."""
    return [slab for slab in _slabs(cache) if isinstance(slab, Tensor)]


def _slabs(cache: KVCache) -> list[Tensor | Codes]:
    """K of all layers and then V, wherever they lie by now."""

    def of(held: LayerCache, name: str) -> Tensor | Codes:
        stored, codec = getattr(held.slab, name), codec_of(held)
        return stored if codec is None else codes(stored, codec)

    return [of(held, name) for name in ("k", "v") for held in cache.layers]


def _in_table(slab: Tensor | Codes, table: Tensor, slots: int) -> Slab:
    """A slab that kernels find by addresses in a table, [1, B, Hkv] or, of codes, [3, B, Hkv]."""
    if isinstance(slab, Codes):
        return dataclasses.replace(slab, table=table)
    return Scattered(slab.split(1), table[0], slots, stretch=None)


def _pairs(slabs: Sequence[Slab]) -> Slabs:
    layers = len(slabs) // 2
    return lambda layer: (slabs[layer], slabs[layer + layers])


def _numbers(slab: Units | Packed) -> list[Tensor]:
    """What K and V consist of."""
    return [x for name, x in slab.tensors().items() if is_number(name)]


def _plain(held: LayerCache) -> bool:
    """Whether units lie in slots of a slab, as they are or in codes that kernels read."""
    if type(held) is not LayerCache or held.window is not None:
        return False
    codec = codec_of(held)
    return isinstance(held.slab, Units) or (codec is not None and codec.bits in (8, 4) and codec.fit == "minmax")
