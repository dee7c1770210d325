"""Decode steps as one replayed CUDA graph: fixed slots at fixed addresses, nothing decided on the host.

In a cache of fixed size every decode step is the same work at the same addresses; only how many units a layer holds
differs, and that is read on the device. So a step is captured once and then replayed: one launch for the whole model.

    in the graph      append k, v behind the units; attend over the slots in use; count up
    on the host       count along; when the budget is full, one ordinary step, which evicts
    seldom, `flush`   scores, positions and flags of the units since the last time, all at once

That scores may wait is a property of the method: each unit's depends on its own token only (`Method.per_token`), so
the queries are stashed until then. Other methods, layers with windows, units in stores other than 8- and 4-bit codes
and evicted caches under original positions take ordinary steps.

Codes (`storage.Affine`) are written and read as such. A step encodes its unit first and attends to it as it is stored,
as every later step does; an ordinary step sees the newest unit, one of all, as it came. Scores are made from exact keys
and values in both, so these are stashed too.

`Step` is the step itself, of rows whose units lie anywhere; `StepGraph` are the steps of one reader, whose rows lie
together. Rows of many readers: `slots`.

Shapes: B rows, L layers, Hq/Hkv heads, R stashed steps, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from locret.backbone import AttentionCall, Backbone, Rope
from locret.cache import KVCache, LayerCache, Packed, Units
from locret.kernels.append import append
from locret.kernels.append_codes import append_codes
from locret.kernels.decode_attention import Angles, Codes, Slab, Span, decode_attention
from locret.methods.base import ChunkView, Method
from locret.select import finite
from locret.storage import Affine, Stored

if TYPE_CHECKING:
    from locret.prefill import Reader

MOST_STASHED = 64
Slabs = Callable[[int], "tuple[Slab, Slab]"]  # K and V of a layer, [B, Hkv, S, D] each


@dataclass(frozen=True)
class Stash:
    """What the scores of units that steps added are made from, until somebody asks for them."""

    q: Tensor  # [L, B, Hq, R, D]
    k: Tensor | None = None  # [L, B, Hkv, R, D]; None: the slabs have K and V as they are
    v: Tensor | None = None

    @classmethod
    def empty(cls, backbone: Backbone, rows: int, steps: int, *, coded: bool) -> Stash:
        """Room for R = `steps`. coded: the slabs hold codes."""

        def make(heads: int) -> Tensor:
            shape = (backbone.num_layers, rows, heads, steps, backbone.head_dim)
            return torch.zeros(shape, dtype=backbone.dtype, device=backbone.device)

        q = make(backbone.num_q_heads)
        return cls(q, make(backbone.num_kv_heads), make(backbone.num_kv_heads)) if coded else cls(q)

    def __len__(self) -> int:
        return self.q.shape[3]

    @property
    def tensors(self) -> list[Tensor]:
        """Those that there are: q, or q, k and v."""
        return [x for x in (self.q, self.k, self.v) if x is not None]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    def row(self, i: int) -> Stash:
        """Of one row, a view."""
        return Stash(*(x[:, i : i + 1] for x in self.tensors))

    def layer(self, i: int) -> list[Tensor]:
        """q, or q, k and v, of a layer."""
        return [x[i] for x in self.tensors]


class Step:
    """One decode step of B rows, in buffers whose addresses never change.

    Everything that differs from step to step and from row to row is in `state`, int64 [4 L + 2, B, Hkv]:

        tables   [2 L]  addresses of the heads' slabs, K of all layers and then V (`Scattered`); 0 if rows lie together
        at       [L]    the slot of the next unit
        stop     [L]    the one behind it
        slot            of the stash
        advance         what a step adds to at, stop and slot: 1; 0 for a row that stands idle

    Args:
        stashed: R; 0: nothing is scored.
        codec: how `slabs` hold units, if in codes.
        capture: replay a CUDA graph; False: run the same step kernel by kernel (on a CPU, and for tests).
    """

    def __init__(
        self, backbone: Backbone, rows: int, stashed: int, slabs: Slabs, *, capture: bool, codec: Affine | None = None
    ) -> None:
        layers, heads, device = backbone.num_layers, backbone.num_kv_heads, backbone.device
        self._backbone, self._slabs, self._codec, self._capture = backbone, slabs, codec, capture
        self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.state = torch.zeros(4 * layers + 2, rows, heads, dtype=torch.int64, device=device)
        self.tables, self._counters, self._advance = self.state.split([2 * layers, 2 * layers + 1, 1])
        self._at, self._stop, slot = self._counters.split([layers, layers, 1])
        self._slot = slot[0]
        self.stash = Stash.empty(backbone, rows, stashed, coded=codec is not None) if stashed else None
        self._angles: list[Angles | None] = []
        self._seen: list[int] = []  # addresses that the captured graph has in it
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def prepare(self, rope: Rope, seen: Sequence[int]) -> None:
        """A new capture if the rotation tables, or what the caller has `seen`, are not what they were."""
        self._angles = [rope.angles(layer) for layer in range(self._backbone.num_layers)]
        now = [*seen, *(angles.cos.data_ptr() for angles in self._angles if angles is not None)]
        if self._capture and now != self._seen:
            self._record()
        self._seen = now

    def run(self, tokens: Tensor) -> Tensor:
        """Read one token a row, [B]; returns logits [B, V] in memory that the next run may write over."""
        self._tokens.copy_(tokens[:, None])
        if self._graph is not None:
            self._graph.replay()
        else:
            self._logits = self._forward()
        assert self._logits is not None
        return self._logits

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """The `LayerContext` of a step."""
        keys, values = self._slabs(layer)
        self._append(layer, (q, k, v), keys, values)
        return decode_attention(
            q, keys, values, scale=call.scale, span=Span(stop=self._stop[layer]), angles=self._angles[layer],
            softcap=call.softcap,
        )  # fmt: skip

    def _append(self, layer: int, new: tuple[Tensor, Tensor, Tensor], keys: Slab, values: Slab) -> None:
        at, stash = self._at[layer], None if self.stash is None else self.stash.layer(layer)
        if isinstance(keys, Codes):
            assert isinstance(values, Codes)
            append_codes(*new, keys, values, at, stash, self._slot, self._encode)
            return
        assert not isinstance(values, Codes)
        append(*new, keys, values, at, None if stash is None else stash[0], self._slot)

    def _encode(self, x: Tensor) -> Codes:
        assert self._codec is not None, "slabs of codes have a codec"
        return codes(self._codec.encode(x), self._codec)

    def _forward(self) -> Tensor:
        logits = self._backbone.run(self._tokens, self)
        self._counters.add_(self._advance)
        assert logits is not None
        return logits[:, -1]

    def _record(self) -> None:
        before = self._counters.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward()  # compiles; what it writes, the first replay writes over
        torch.cuda.current_stream().wait_stream(side)
        self._counters.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._forward()
        self._graph = graph  # only now: a capture that fails, such as for want of memory, leaves the old one


class StepGraph:
    """The decode steps of one `Reader`. `step` as long as there is `room`; `flush` before anybody reads the cache."""

    def __init__(self, reader: Reader, *, capture: bool) -> None:
        # not the reader itself, which holds this: a cycle would keep the cache's memory until the collector comes by
        self._backbone, self._method = reader.backbone, reader.method
        self._cache = cache = reader.cache
        self._rope = reader.rope
        scored = reader.method.evicts and reader.plan.budget is not None
        stashed = min(reader.plan.decode_interval, MOST_STASHED) if scored else 0
        self._step = Step(
            reader.backbone, cache.batch, stashed, _slabs(cache), capture=capture, codec=codec_of(cache.layers[0])
        )
        if self._step.stash is not None:
            cache.note_scratch(self._step.stash.nbytes)
        self._pending = 0
        # whether all scores since the last `flush` are finite
        self._good = torch.ones((), dtype=torch.bool, device=reader.backbone.device)
        self._stale = True  # counters and addresses are to be looked at again

    @classmethod
    def of(cls, reader: Reader, *, capture: bool) -> StepGraph | None:
        """None where this reader's steps are not all alike."""
        if capture and not can_capture(reader.backbone):
            return None
        return cls(reader, capture=capture) if alike(reader) else None

    def room(self) -> bool:
        """Whether every slab takes one more unit without an eviction."""
        return room(self._cache)

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row, [B]; returns logits [B, V]."""
        if self._step.stash is not None and self._pending == len(self._step.stash):
            self._write()
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
        """Write what the steps left out. Returns whether all scores since the last time are finite; waits for that."""
        self._write()
        good = bool(self._good)
        self._good.fill_(True)
        return good

    def _write(self) -> None:
        written, self._pending, self._stale = self._pending, 0, True
        self._good &= write(self._backbone, self._method, self._cache, written, self._step.stash)

    def _refresh(self) -> None:
        """Counters from the cache; a new capture if its slabs lie elsewhere than the graph thinks."""
        layers = self._cache.layers
        self._step.state.copy_(row_state(self._cache, self._pending)[:, None], non_blocking=True)
        self._stale = False
        self._rope.grow(max(len(held.slab) for held in layers) + 1)
        self._step.prepare(self._rope, [x.data_ptr() for held in layers for x in _numbers(held.slab)])


def alike(reader: Reader) -> bool:
    """Whether this reader's decode steps are all the same work."""
    backbone, plan = reader.backbone, reader.plan
    if reader.method.evicts and not reader.method.per_token:
        return False
    if any(not _plain(held) for held in reader.cache.layers) or getattr(reader.method, "wants_hidden", False):
        return False
    if len({codec_of(held) for held in reader.cache.layers}) > 1:
        return False
    if plan.positions == "original" and plan.budget is not None:
        return False
    return all(reader.rope.angles(i) is not None or not spec.rotated for i, spec in enumerate(backbone.layers))


def can_capture(backbone: Backbone) -> bool:
    """Under tensor parallelism a step talks to other processes; transformers' modules may wait for the device."""
    return backbone.fused is not None and backbone.device.type == "cuda" and backbone.shard.size == 1


def room(cache: KVCache) -> bool:
    """Whether every slab takes one more unit without an eviction."""
    return all(held.held < len(held.slab) for held in cache.layers)


def count(cache: KVCache, steps: int) -> None:
    """Units that steps added, on the host."""
    for held in cache.layers:
        held.held += steps
    cache.seen += steps


def row_state(cache: KVCache, pending: int, tables: Tensor | None = None) -> Tensor:
    """A row of `Step.state` for a cache whose last `pending` units are stashed, [4 L + 2, Hkv], on the host."""
    heads = cache.layers[0].heads
    held = [layer.held for layer in cache.layers]
    numbers = torch.tensor([*held, *(n + 1 for n in held), pending, 1])[:, None].expand(-1, heads)
    return torch.cat((torch.zeros(2 * len(held), heads, dtype=torch.int64) if tables is None else tables, numbers))


def write(backbone: Backbone, method: Method, cache: KVCache, pending: int, stash: Stash | None) -> Tensor:
    """Scores, positions and flags of the pending units, the last ones of every layer.

    Args:
        stash: what they are scored by; None: they are not.
    Returns: whether all scores are finite, bool [], on the device.
    """
    good, seen = torch.ones((), dtype=torch.bool, device=backbone.device), cache.seen
    for layer, held in enumerate(cache.layers if pending else []):
        units = held.slab[slice(held.held - pending, held.held)].tensors()
        units["position"].copy_(torch.arange(seen - pending, seen, device=units["position"].device))
        units["protected"].fill_(False)
        units["state"].zero_()
        units["score"].zero_()
        if stash is not None:
            q, *exact = (x[:, :, :pending] for x in stash.layer(layer))
            k, v = exact or (units["k"], units["v"])
            view = ChunkView(layer, q, k, v, seen - pending, backbone.calls[layer].scale)
            units["score"].copy_(method.score(view))
            good &= finite(units["score"]).to(good.device)
    return good


def codec_of(held: LayerCache) -> Affine | None:
    """How a layer's slab is quantised; None: not at all, or in another way."""
    store = held.slab.store if isinstance(held.slab, Packed) else None
    return store.k if store is not None and isinstance(store.k, Affine) and store.k == store.v else None


def codes(stored: Stored, codec: Affine) -> Codes:
    """Stored units, [B, Hkv, S, D], as attention reads them."""
    return Codes(stored.parts["codes"], stored.parts["scale"], stored.parts["zero"], codec.bits)


def _slabs(cache: KVCache) -> Slabs:
    """The slabs of one cache, wherever they lie by then."""

    def slabs(layer: int) -> tuple[Slab, Slab]:
        held = cache.layers[layer]
        if isinstance(held.slab, Units):
            return held.slab.k, held.slab.v
        codec = codec_of(held)
        assert codec is not None
        return codes(held.slab.k, codec), codes(held.slab.v, codec)

    return slabs


def _numbers(slab: Units | Packed) -> list[Tensor]:
    """What K and V consist of."""
    return [x for name, x in slab.tensors().items() if name.split(".")[0] in ("k", "v")]


def _plain(held: LayerCache) -> bool:
    """Whether units lie in slots of a slab, as they are or in codes that kernels read."""
    if type(held) is not LayerCache or held.window is not None:
        return False
    codec = codec_of(held)
    return isinstance(held.slab, Units) or (codec is not None and codec.bits in (8, 4) and codec.fit == "minmax")
