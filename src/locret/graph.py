"""Decode steps as one replayed CUDA graph: fixed slots at fixed addresses, nothing decided on the host.

In a cache of fixed size every decode step is the same work at the same addresses; only how many units a layer holds
differs, and that is read on the device. So a step is captured once and then replayed: one launch for the whole model.

    in the graph      append k, v behind the units; attend over the slots in use; count up
    on the host       count along; when the budget is exceeded, evict (`Reader.evict`)
    seldom, `flush`   scores, positions and flags of the units since the last time, all at once

That scores may wait is a property of the method: each unit's depends on its own token only (`Method.per_token`), so
the queries are stashed until then. Other methods, layers with windows, units stored as codes and evicted caches under
original positions take ordinary steps.

`Step` is the step itself, of rows whose units lie anywhere; `StepGraph` are the steps of one reader, whose rows lie
together. Rows of many readers: `slots`.

Shapes: B rows, L layers, Hq/Hkv heads, R stashed steps, D head dim, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from locret.backbone import AttentionCall, Backbone, Rope
from locret.cache import KVCache, LayerCache, Units
from locret.kernels.append import append
from locret.kernels.decode_attention import MOST_ROWS, Angles, Span, decode_attention
from locret.kernels.scattered import STRETCH, Scattered, addresses
from locret.kernels.switch import use_triton
from locret.methods.base import ChunkView, Method
from locret.select import finite

if TYPE_CHECKING:
    from locret.prefill import Reader

MOST_STASHED = 64
Slabs = Callable[[int], "tuple[Tensor | Scattered, Tensor | Scattered]"]  # K and V of a layer, [B, Hkv, S, D] each
_KEPT_BYTES = 64 << 20  # of a step's stash, up to which it waits for the next reader
_KEPT = 8  # steps that wait at most


class Step:
    """One decode step of B rows, in buffers whose addresses never change.

    Everything that differs from step to step and from row to row is in `state`, int64 [4 L + 2, B, Hkv]:

        tables   [2 L]  addresses of the heads' slabs, K of all layers and then V (`Scattered`)
        at       [L]    the slot of the next unit
        stop     [L]    the one behind it
        slot            of the stash
        advance         what a step adds to at, stop and slot: 1; 0 for a row that stands idle

    Args:
        stashed: R; 0: nothing is scored.
        capture: replay a CUDA graph; False: run the same step kernel by kernel (on a CPU, and for tests).
    """

    def __init__(self, backbone: Backbone, rows: int, stashed: int, *, capture: bool) -> None:
        layers, heads, device = backbone.num_layers, backbone.num_kv_heads, backbone.device
        self._backbone: Backbone | None = backbone
        self._slabs: Slabs | None = None
        self._capture = capture
        self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.state = torch.zeros(4 * layers + 2, rows, heads, dtype=torch.int64, device=device)
        self.tables, self._counters, self._advance = self.state.split([2 * layers, 2 * layers + 1, 1])
        self._at, self._stop, slot = self._counters.split([layers, layers, 1])
        self._slot = slot[0]
        self.stash: Tensor | None = None
        if stashed:
            self.stash = torch.zeros(layers, rows, backbone.num_q_heads, stashed, backbone.head_dim,
                                     dtype=backbone.dtype, device=device)  # fmt: skip
        self._rope: Rope | None = None
        self._angles: list[Angles | None] = []
        self._seen: list[int] = []  # addresses and sizes that the captured graph has in it
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def prepare(self, backbone: Backbone, rope: Rope, slabs: Slabs, seen: Sequence[int]) -> None:
        """A new capture if the rotation tables, or what the caller has `seen`, are not what they were.

        Args:
            slabs: of all rows.
            seen: what of the slabs a capture has in it.
        """
        self._backbone, self._slabs, self._rope = backbone, slabs, rope
        self._angles = [rope.angles(layer) for layer in range(backbone.num_layers)]
        now = [*seen, *(angles.cos.data_ptr() for angles in self._angles if angles is not None)]
        if self._capture and now != self._seen:
            self._record()
        self._seen = now

    def let_go(self) -> None:
        """Hold on to what was captured, and to nothing of whom it was captured for."""
        self._backbone = self._slabs = None

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
        assert self._slabs is not None
        keys, values = self._slabs(layer)
        append(q, k, v, keys, values, self._at[layer], None if self.stash is None else self.stash[layer], self._slot)
        return decode_attention(
            q, keys, values, scale=call.scale, span=Span(stop=self._stop[layer]), angles=self._angles[layer],
            softcap=call.softcap,
        )  # fmt: skip

    def _forward(self) -> Tensor:
        assert self._backbone is not None
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


# Steps that no reader has at the moment, by rows and stash: the next one replays what was captured for the last.
_IDLE: WeakKeyDictionary[Backbone, dict[tuple[int, int], Step]] = WeakKeyDictionary()


def _take(backbone: Backbone, rows: int, stashed: int) -> Step:
    idle = _IDLE.get(backbone, {})
    return idle.pop((rows, stashed), None) or Step(backbone, rows, stashed, capture=True)


def _give(step: Step, backbone: weakref.ref[Backbone], rows: int, stashed: int) -> None:
    step.let_go()  # not the model either, which would never be freed
    owner = backbone()
    if owner is not None and (step.stash is None or step.stash.nbytes <= _KEPT_BYTES):
        idle = _IDLE.setdefault(owner, {})
        idle.pop((rows, stashed), None)
        idle[rows, stashed] = step
        if len(idle) > _KEPT:
            del idle[next(iter(idle))]  # the one that has waited longest


class StepGraph:
    """The decode steps of one `Reader`. `step` as long as there is `room`; `flush` before anybody reads the cache."""

    def __init__(self, reader: Reader, *, capture: bool) -> None:
        # not the reader itself, which holds this: a cycle would keep the cache's memory until the collector comes by
        self._backbone, self._method = reader.backbone, reader.method
        self._cache = cache = reader.cache
        self._rope = reader.rope
        scored = reader.method.evicts and reader.method.per_token and reader.plan.budget is not None
        stashed = min(reader.plan.decode_interval, MOST_STASHED) if scored else 0
        if capture:
            self._step = _take(reader.backbone, cache.batch, stashed)
            weakref.finalize(self, _give, self._step, weakref.ref(reader.backbone), cache.batch, stashed).atexit = False
        else:
            self._step = Step(reader.backbone, cache.batch, stashed, capture=False)
        if self._step.stash is not None:
            cache.note_scratch(self._step.stash.nbytes)
        self._by_address = not capture or reads_tables(reader.backbone)
        self._scattered: list[Scattered] = []  # K of all layers, then V
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
        """Whether every slab takes one more unit."""
        return room(self._cache)

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row, [B]; returns logits [B, V]."""
        if self._step.stash is not None and self._pending == self._step.stash.shape[3]:
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
        """`write`, and whether all scores since the last time are finite; waits for that."""
        self.write()
        good = bool(self._good)
        self._good.fill_(True)
        return good

    def write(self) -> None:
        """Scores, positions and flags of the units that steps added. Waits for nothing."""
        written, self._pending, self._stale = self._pending, 0, True
        self._good &= write(self._backbone, self._method, self._cache, written, self._step.stash)

    def _refresh(self) -> None:
        """Counters and addresses from the cache; a new capture if launches were made for slabs of other sizes."""
        slabs = _slabs_of(self._cache)
        state = row_state(self._cache, self._pending, addresses(slabs).unflatten(0, (len(slabs), -1)))
        self._step.state.copy_(state, non_blocking=True)
        self._stale = False
        sizes = [-(-slab.shape[2] // STRETCH) * STRETCH for slab in slabs]  # few sizes, so that few captures are made
        self._rope.grow(max(sizes) + 1)
        seen = sizes if self._by_address else [slab.data_ptr() for slab in slabs]
        self._scattered = [Scattered(slab.split(1), table, slots, stretch=None)
                           for slab, table, slots in zip(slabs, self._step.tables, sizes, strict=True)]  # fmt: skip
        self._step.prepare(self._backbone, self._rope, _pairs(self._scattered if self._by_address else slabs), seen)


def alike(reader: Reader) -> bool:
    """Whether this reader's decode steps are all the same work."""
    backbone, plan = reader.backbone, reader.plan
    if reader.method.evicts and not (reader.method.per_token or reader.method.memoryless):
        return False
    if any(not _plain(held) for held in reader.cache.layers) or getattr(reader.method, "wants_hidden", False):
        return False
    if plan.positions == "original" and plan.budget is not None:
        return False
    return all(reader.rope.angles(i) is not None or not spec.rotated for i, spec in enumerate(backbone.layers))


def can_capture(backbone: Backbone) -> bool:
    """Under tensor parallelism a step talks to other processes; transformers' modules may wait for the device."""
    return backbone.fused is not None and backbone.device.type == "cuda" and backbone.shard.size == 1


def room(cache: KVCache) -> bool:
    """Whether every slab takes one more unit."""
    return all(held.held < len(held.slab) for held in cache.layers)


def count(cache: KVCache, steps: int) -> None:
    """Units that steps added, on the host."""
    for held in cache.layers:
        held.held += steps
    cache.seen += steps


def row_state(cache: KVCache, pending: int, tables: Tensor) -> Tensor:
    """`Step.state` of the rows of a cache whose last `pending` units are stashed, int64 on the host, [4 L + 2, B, Hkv].

    tables: `addresses` of its slabs, [2 L, B, Hkv].
    """
    held = [layer.held for layer in cache.layers]
    numbers = torch.tensor([*held, *(n + 1 for n in held), pending, 1])
    return torch.cat((tables, numbers[:, None, None].expand(-1, *tables.shape[1:])))


def reads_tables(backbone: Backbone) -> bool:
    """Whether kernels find the rows. The torch paths go by the list of slabs: a capture would never see it change."""
    like = torch.empty(0, dtype=backbone.dtype, device=backbone.device)
    groups = backbone.num_q_heads // backbone.num_kv_heads
    fits = groups <= MOST_ROWS and backbone.dtype != torch.float64
    return fits and use_triton("append", like) and use_triton("decode_attention", like)


def write(backbone: Backbone, method: Method, cache: KVCache, pending: int, stash: Tensor | None) -> Tensor:
    """Scores, positions and flags of the pending units, the last ones of every layer.

    Args:
        stash: their queries, [L, B, Hq, R, D]; None: they are not scored.
    Returns: whether all scores are finite, bool [], on the device.
    """
    good, seen = torch.ones((), dtype=torch.bool, device=backbone.device), cache.seen
    for layer, held in enumerate(cache.layers if pending else []):
        units = held.slab[slice(held.held - pending, held.held)].units()
        units.position.copy_(torch.arange(seen - pending, seen, device=units.position.device))
        units.protected.fill_(False)
        units.state.zero_()
        units.score.zero_()
        if stash is not None:
            scale = backbone.calls[layer].scale
            view = ChunkView(layer, stash[layer][:, :, :pending], units.k, units.v, seen - pending, scale)
            units.score.copy_(method.score(view))
            good &= finite(units.score).to(good.device)
    return good


def _slabs_of(cache: KVCache) -> list[Tensor]:
    """K of all layers and then V, wherever they lie by now."""
    held = [layer.slab for layer in cache.layers]
    return [getattr(slab, name) for name in ("k", "v") for slab in held]


def _pairs(slabs: Sequence[Tensor | Scattered]) -> Slabs:
    layers = len(slabs) // 2
    return lambda layer: (slabs[layer], slabs[layer + layers])


def _plain(held: LayerCache) -> bool:
    return type(held) is LayerCache and held.window is None and isinstance(held.slab, Units)
