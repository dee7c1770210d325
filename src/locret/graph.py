"""Decode steps as one replayed CUDA graph: fixed slots at fixed addresses, nothing decided on the host.

In a cache of fixed size every decode step is the same work at the same addresses; only how many units a layer holds
differs, and that is read on the device. So a step is captured once and then replayed: one launch for the whole model.

    in the graph      append k, v behind the units; attend over the slots in use; count up
    on the host       count along; when the budget is full, one ordinary step, which evicts
    seldom, `flush`   scores, positions and flags of the units since the last time, all at once

That scores may wait is a property of the method: each unit's depends on its own token only (`Method.per_token`), so
the queries are stashed until then. Other methods, layers with windows, units stored as codes and evicted caches under
original positions take ordinary steps.

Shapes: B rows, L layers, Hq/Hkv heads, R stashed steps, D head dim, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from locret.backbone import AttentionCall
from locret.cache import LayerCache, Units
from locret.kernels.append import append
from locret.kernels.decode_attention import Angles, Span, decode_attention
from locret.methods.base import ChunkView
from locret.select import finite

if TYPE_CHECKING:
    from locret.prefill import Reader

MOST_STASHED = 64


class StepGraph:
    """The decode steps of one `Reader`. `step` as long as there is `room`; `flush` before anybody reads the cache.

    Args:
        capture: replay a CUDA graph; False: run the same step kernel by kernel (on a CPU, and for tests).
    """

    def __init__(self, reader: Reader, angles: list[Angles | None], *, capture: bool) -> None:
        # not the reader itself, which holds this: a cycle would keep the cache's memory until the collector comes by
        self._backbone, self._method = reader.backbone, reader.method
        self._cache, self._rope = reader.cache, reader.rope
        self._angles, self._capture = angles, capture
        backbone, cache = reader.backbone, reader.cache
        rows, heads, layers = cache.batch, backbone.num_kv_heads, backbone.num_layers
        device = backbone.device
        self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        # the slot of the next unit, the one behind it, and the slot of the stash: counted up together
        self._counters = torch.zeros(2 * layers * rows * heads + 1, dtype=torch.int64, device=device)
        ends = self._counters[:-1].view(2, layers, rows, heads)
        self._at, self._stop, self._slot = ends[0], ends[1], self._counters[-1:]
        self._stash: Tensor | None = None
        if reader.method.evicts and reader.plan.budget is not None:
            steps = min(reader.plan.decode_interval, MOST_STASHED)
            self._stash = torch.zeros(layers, rows, backbone.num_q_heads, steps, backbone.head_dim,
                                      dtype=backbone.dtype, device=device)  # fmt: skip
            cache.note_scratch(self._stash.nbytes)
        self._pending = 0
        self._good = torch.ones((), dtype=torch.bool, device=device)  # all scores written since the last `flush`
        self._addresses: list[int] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._stale = True  # counters and addresses are to be looked at again

    @classmethod
    def of(cls, reader: Reader, *, capture: bool) -> StepGraph | None:
        """None where this reader's steps are not all alike."""
        backbone, plan = reader.backbone, reader.plan
        if reader.method.evicts and not reader.method.per_token:
            return None
        if any(not _plain(held) for held in reader.cache.layers) or getattr(reader.method, "wants_hidden", False):
            return None
        if plan.positions == "original" and plan.budget is not None:
            return None
        if capture and (backbone.fused is None or backbone.device.type != "cuda" or backbone.shard.size > 1):
            return None  # under tensor parallelism a step talks to other processes
        angles = [reader.rope.angles(layer) for layer in range(backbone.num_layers)]
        if any(found is None and spec.rotated for found, spec in zip(angles, backbone.layers, strict=True)):
            return None
        return cls(reader, angles, capture=capture)

    def room(self) -> bool:
        """Whether every slab takes one more unit without an eviction."""
        return all(held.held < len(held.slab) for held in self._cache.layers)

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row, [B]; returns logits [B, V]."""
        if self._stash is not None and self._pending == self._stash.shape[3]:
            self._write()
        if self._stale:
            self._refresh()
        self._tokens.copy_(tokens[:, None])
        if self._graph is not None:
            self._graph.replay()
        else:
            self._logits = self._forward()
        self._pending += 1
        for held in self._cache.layers:
            held.held += 1
        self._cache.seen += 1
        assert self._logits is not None
        return self._logits.clone()  # the next replay writes over it

    def undo(self) -> None:
        """Take back the last step, if nothing was written since: the units that it added are forgotten."""
        assert self._pending, "a step that was flushed stays"
        self._pending -= 1
        self._stale = True
        for held in self._cache.layers:
            held.held -= 1
        self._cache.seen -= 1

    @torch.inference_mode()
    def flush(self) -> bool:
        """Write what the steps left out. Returns whether all scores since the last time are finite; waits for that."""
        self._write()
        good = bool(self._good)
        self._good.fill_(True)
        return good

    def _write(self) -> None:
        """Scores, positions and flags of the pending units."""
        self._stale = True
        count, self._pending = self._pending, 0
        seen = self._cache.seen
        for layer, held in enumerate(self._cache.layers if count else []):
            units = held.slab[slice(held.held - count, held.held)].units()
            units.position.copy_(torch.arange(seen - count, seen, device=units.position.device))
            units.protected.fill_(False)
            units.state.zero_()
            units.score.zero_()
            if self._stash is not None:
                call = self._backbone.calls[layer]
                view = ChunkView(layer, self._stash[layer][:, :, :count], units.k, units.v, seen - count, call.scale)
                units.score.copy_(self._method.score(view))
                self._good &= finite(units.score).to(self._good.device)

    # ------------------------------------------------------------------ the step

    def _forward(self) -> Tensor:
        logits = self._backbone.run(self._tokens, self)
        self._counters.add_(1)
        assert logits is not None
        return logits[:, -1]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """The `LayerContext` of a step."""
        slab = self._cache.layers[layer].slab
        assert isinstance(slab, Units)
        stash = None if self._stash is None else self._stash[layer]
        append(q, k, v, slab.k, slab.v, self._at[layer], stash, self._slot)
        return decode_attention(
            q, slab.k, slab.v, scale=call.scale, span=Span(stop=self._stop[layer]), angles=self._angles[layer],
            softcap=call.softcap,
        )  # fmt: skip

    def _refresh(self) -> None:
        """Counters from the cache; a new capture if slabs or tables lie elsewhere than the graph thinks."""
        layers = self._cache.layers
        for index, held in enumerate(layers):
            self._at[index].fill_(held.held)
        self._stop.copy_(self._at + 1)
        self._slot.fill_(self._pending)
        self._stale = False
        self._rope.grow(max(len(held.slab) for held in layers) + 1)
        self._angles = [self._rope.angles(layer) for layer in range(len(layers))]
        tables = [angles.cos.data_ptr() for angles in self._angles if angles is not None]
        addresses = [*(held.slab.tensors()["k"].data_ptr() for held in layers), *tables]
        if self._capture and addresses != self._addresses:
            self._record()
        self._addresses = addresses

    def _record(self) -> None:
        before = self._counters.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward()  # compiles; what it writes, the first replay writes over
        torch.cuda.current_stream().wait_stream(side)
        self._counters.copy_(before)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._forward()


def _plain(held: LayerCache) -> bool:
    return type(held) is LayerCache and held.window is None and isinstance(held.slab, Units)
