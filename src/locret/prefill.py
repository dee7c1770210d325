"""The chunk loop: read a prompt of any length through a cache of fixed size.

A prompt of n tokens is read in chunks up to its last `local_window` tokens, which come last in a piece of their own.
In every layer, as soon as it is done with a chunk, only the best `budget` units stay:

    pinned = sinks, protected spans, the newest units
    newest = num_stabilizers while prefill goes on, none after the last chunk, the local window after that one

Methods may share the budget out among layers, or among the KV heads of a layer; the total stays. A method that scores
tokens by the model's own logits is asked after the forward pass: its slabs have room for a chunk.

(arXiv:2410.01805, Algorithm 1; there the local window lies outside the budget, here everything is inside it.)

Shapes: B batch, T prompt, C chunk, P cached units, S = P + C, Hq/Hkv heads, D head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from locret.backbone import AttentionCall, Backbone, Rope, model_length
from locret.cache import KVCache, LayerCache, Packed, Units, unit_bytes
from locret.config import LARGEST_CHUNK, CacheConfig, CachePlan
from locret.errors import ConfigError, NumericsError
from locret.graph import MOST_STASHED, StepGraph, alike, can_capture
from locret.kernels.attention import add_prefix, chunk_attention, prefix_causal_attention
from locret.kernels.compact import Candidates, Choice, candidates, kept_beside, others, pin
from locret.kernels.switch import use_triton
from locret.memory import RESERVE, free_bytes, longest_chunk, token_bytes
from locret.methods.base import BIAS, ChunkView, Joined, Method
from locret.observe import AttentionProbe, surprisal
from locret.replay import Race, Replay, has_room
from locret.sampling import read_back
from locret.select import check_pins, finite
from locret.stores import fixed_bytes, layer_stores

WORTH = 8  # chunks that a recorded one must stand for: recording is launching once more

Progress = Callable[[int, int], object]
Check = Callable[[], None]


class Turn(Protocol):
    """`ChunkPass._turning`."""

    def __call__(self, x: Tensor, unit: int, out: Tensor | None = None, slots: Tensor | None = None) -> Tensor: ...


@dataclass
class Reader:
    """A batch of equally long sequences being read: the cache and everything needed to extend it."""

    backbone: Backbone
    method: Method
    plan: CachePlan
    cache: KVCache
    rope: Rope
    num_protected: int = 0
    budgets: list[int] = field(default_factory=list)  # per layer; layers with a window do not read theirs
    last_logits: Tensor | None = None  # [B, V], for methods that want surprisal
    _unchecked: Check | None = field(default=None, init=False, repr=False)  # of the scores of the last pass
    _graph: StepGraph | bool | None = field(default=None, init=False, repr=False)  # False: its steps are not all alike
    _race: Race = field(default_factory=Race, init=False, repr=False)

    @classmethod
    def start(
        cls, backbone: Backbone, method: Method, config: CacheConfig, *, batch: int, prompt_len: int | None,
        new_tokens: int | None = None, num_protected: int = 0, most_chunk: int | None = None,
    ) -> Reader:  # fmt: skip
        """Resolve the options for a prompt and allocate the cache.

        Args:
            prompt_len: tokens; None when the input has no known end.
            new_tokens: how many more will follow at most; None when unknown. A cache that can hold everything is not
                made larger than that.
            num_protected: units the caller will mark.
            most_chunk: tokens that a chunk may have at most, where the options leave its size open; default: as many as
                have room on the device beside the cache.
        """
        windows = [layer.window for layer in backbone.layers]
        heads, width, dtype = backbone.num_kv_heads, backbone.head_dim, backbone.dtype
        held = layer_stores(config.storage, backbone)
        each = [unit_bytes(width, dtype, len(method.state), store) * heads for store in held]
        fixed = sum(fixed_bytes(store, width, dtype) * heads for store in held)
        fixed += sum((w - 1) * size for w, size in zip(windows, each, strict=True) if w is not None)
        budgeted = sum(size for w, size in zip(windows, each, strict=True) if w is None)
        if method.wants_surprisal:
            fixed += budgeted * (config.chunk_size or LARGEST_CHUNK)
        if method.ragged:
            fixed += windows.count(None) * heads * 8  # their lengths
        fixed += budgeted * spare_units(method)
        plan = config.resolve(prompt_len=prompt_len, unit_bytes=budgeted or max(each), fixed_bytes=fixed,
                              num_protected=num_protected)  # fmt: skip
        if not method.evicts:
            plan = dataclasses.replace(plan, budget=None, num_sinks=0, num_stabilizers=0, local_window=0)
        method.check(plan)
        if method.made_for is not None and method.made_for != backbone.fingerprint():
            raise ConfigError(f"the files of method {method.name!r} were made for another model: {method.made_for}, "
                              f"this one is {backbone.fingerprint()}; make them on this model")  # fmt: skip
        total = None if prompt_len is None or new_tokens is None else prompt_len + new_tokens
        reader = cls._allocate(backbone, method, plan, batch, prompt_len, total, num_protected)
        if config.chunk_size is None:
            reader.shorten_chunks(most_chunk)
        return reader

    @classmethod
    def resume(
        cls, backbone: Backbone, method: Method, plan: CachePlan, *, seen: int, num_protected: int,
        rope_length: int,
    ) -> Reader:  # fmt: skip
        """A reader for one saved sequence; the caller fills the cache's layers.

        Args:
            rope_length: what its frequencies were chosen by.
        """
        reader = cls._allocate(backbone, method, plan, 1, seen, None, num_protected, rope_length)
        reader.cache.seen = seen
        return reader

    @classmethod
    def _allocate(
        cls, backbone: Backbone, method: Method, plan: CachePlan, batch: int, prompt_len: int | None,
        total: int | None, num_protected: int, rope_length: int | None = None,
    ) -> Reader:  # fmt: skip
        initial = total or prompt_len or 0
        windows = [layer.window for layer in backbone.layers]
        budgets = _layer_budgets(method, plan, windows, num_protected)
        most = [budget + spare_units(method) for budget in budgets]
        capacity = None if plan.budget is None else [min(units, total or units) for units in most]
        chunk = min(plan.chunk_size, total or plan.chunk_size)
        cache = KVCache(
            windows=windows, batch=batch, num_kv_heads=backbone.num_kv_heads, head_dim=backbone.head_dim,
            capacity=capacity, chunk_size=chunk, dtype=backbone.dtype, device=backbone.device, initial=initial,
            state=len(method.state), ragged=method.ragged, spare=chunk if method.wants_surprisal else 0,
            storage=layer_stores(plan.storage, backbone), joins=_joins(backbone, method),
        )  # fmt: skip
        # families with length-dependent frequencies choose them once, by the longest position they will be shown
        longest, reach = prompt_len or model_length(backbone.model), initial + chunk
        if capacity is not None and plan.positions == "compact":
            reach = max(capacity) + chunk
            longest = min(longest, reach)
        return cls(
            backbone, method, plan, cache, backbone.rope(reach + 1, rope_length or longest), num_protected, budgets
        )

    def shorten_chunks(self, most: int | None = None) -> None:
        """Before anything is read: no chunk is longer than `most`; default: than there is memory for now.

        A cache that was allocated for longer chunks keeps the room for one.
        """
        device, size = self.backbone.device, self.cache.chunk_size
        if most is None:
            free = free_bytes(device)
            if free is None:
                return
            fits = longest_chunk(free - RESERVE - self.layer_bytes, self.token_bytes, size)
            most = self.backbone.shard.least(fits, device)  # processes that share a model read the same chunks
        if most >= size:
            return
        if device.type != "meta":  # that of a plan
            warnings.warn(
                f"prompts are read in chunks of {most} tokens: there is no memory for the activations of longer ones. "
                "Where chunks end decides what is evicted; to get the same results whatever is free, give that number "
                f"(--chunk-size {most}, chunk_size={most})",
                stacklevel=3,  # Python shows a text once for each place that starts readers
            )
        self.plan = dataclasses.replace(self.plan, chunk_size=most)
        self.cache.chunk_size = most
        self.method.check(self.plan)

    @property
    def token_bytes(self) -> int:
        """What one more token in all rows' chunks takes besides the cache."""
        backbone, config, itemsize = self.backbone, self.backbone.model.config, self.backbone.dtype.itemsize
        one = token_bytes(config, backbone.num_q_heads, backbone.num_kv_heads, backbone.head_dim, itemsize)
        return self.cache.batch * (one + (config.vocab_size * itemsize if self.method.wants_surprisal else 0))

    @property
    def layer_bytes(self) -> int:
        """What the units before a chunk take while a layer attends to them, beside slabs and workspace: rotated keys,
        decoded or padded ones, and logits where they are capped (`kernels.attention`, blocks of 256 rows). And where
        units of all layers lie, if they may lie in any order (`LayerCache.slots`)."""
        cache, backbone = self.cache, self.backbone
        units = max(layer.slab.tensors()["score"].numel() for layer in cache.layers)  # of all rows and KV heads
        copies = 3 if cache.stores is not None or self.method.ragged else 1
        found = copies * units * backbone.head_dim * backbone.dtype.itemsize
        if any(call.softcap is not None for call in backbone.calls):
            units += cache.batch * backbone.num_kv_heads * cache.chunk_size
            found += 3 * 256 * 4 * units * backbone.num_q_heads // backbone.num_kv_heads
        if not cache.joins:
            found += sum(4 * layer.slab.tensors()["score"].numel() for layer in cache.layers if layer.window is None)
        return found

    def copy(self) -> Reader:
        """An independent copy; the rotation tables are shared, they only grow."""
        self.settle()
        return dataclasses.replace(self, cache=self.cache.copy())

    def read(
        self, ids: Tensor, *, local_window: int | None = None, more: bool = False, protected: Tensor | None = None,
        on_progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """Prefill [B, T] tokens behind what was read before; returns the logits of the last one, [B, V].

        Args:
            ids: anywhere; a chunk at a time is on the device, so that even they take no memory there.
            local_window: how many of the last tokens are read last and stay; default: the plan's.
            more: text will follow, so stabilizers stay pinned after the last chunk as well.
            protected: bool [T]; units that no eviction may take.
            on_progress: called with (tokens done, tokens in all) after every chunk.
        Raises: NumericsError: scores that are NaN or infinite.
        """
        logits = None
        with self.backbone.seam():
            for done, found in self.chunks(ids, local_window=local_window, more=more, protected=protected):
                logits = found
                if on_progress is not None:
                    on_progress(done, ids.shape[1])
        assert logits is not None
        return logits

    def chunks(
        self, ids: Tensor, *, local_window: int | None = None, more: bool = False, protected: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor | None]]:
        """`read`, a chunk at a time: yields the tokens read so far, and behind the last the logits [B, V]."""
        total = ids.shape[1]
        if total == 0:
            raise ConfigError("the prompt has no tokens; give at least one")
        local = min(self.plan.local_window if local_window is None else local_window, total)
        spans = list(itertools.pairwise(self.edges(total, local)))
        plain = [stop < total - local and stop - start == self.cache.chunk_size for start, stop in spans]
        device = self.backbone.device
        warm, replay, self._race = False, None, Race()
        for i, (start, stop) in enumerate(spans):
            chunk = _sent(ids[:, start:stop], device)
            steady = plain[i] and protected is None and self._is_steady()
            if (
                steady
                and warm
                and (replay or (self._race.lost(device) and sum(plain[i:]) >= WORTH and has_room(device)))
            ):
                replay = replay or self._replay(chunk)
                self._run_again(replay, chunk)
                yield stop, None
                continue
            warm = steady
            last_chunk, is_local = stop == total - local, start >= total - local
            newest = self.plan.num_stabilizers
            if is_local and not more:
                newest = stop - (total - local)
            elif last_chunk and not more:
                newest = 0
            part = None if protected is None else protected[start:stop]
            logits = self._forward(
                chunk, self.plan.budget, newest, part, logits=int(stop == total), unordered=True
            )  # fmt: skip
            last = None if logits is None or stop < total else logits[:, -1]
            if last is not None:
                self.check_scores()
                _check_finite(last)
                self.cache.order()
            yield stop, last

    def step(self, tokens: Tensor) -> Tensor:
        """Decode: read one token a row, [B]; returns logits [B, V].

        When the budget is full, one eviction makes room for `decode_interval` steps; the newest units are pinned. On a
        GPU steps are replayed from a graph: call `settle` before reading the cache.
        """
        graph = self._step_graph()
        if graph is not None and graph.room():
            last = graph.step(tokens)
            if self.overfull:
                graph.write()
                self.evict()
            return last
        logits = self._run(ChunkPass.of_step(self), tokens[:, None], logits=1)
        self.check_scores()
        assert logits is not None
        return logits[:, -1]

    @property
    def can_unread(self) -> bool:
        """Whether `unread` could take back a `step` now: not one that evicts."""
        graph = self._step_graph()
        full = self.plan.budget is not None and any(
            held.held >= budget for held, budget in zip(self.cache.layers, self.budgets, strict=True)
        )
        return graph is not None and graph.room() and not full

    @property
    def overfull(self) -> bool:
        """Whether a replayed step has put a unit into the spare slot, so that `evict` is due."""
        return self.plan.budget is not None and any(
            held.held > budget for held, budget in zip(self.cache.layers, self.budgets, strict=True)
        )

    def evict(self) -> None:
        """What an ordinary step does at its end, after a replayed one: layers above their budget are cut back.

        The units' scores must be there (`StepGraph.write`). Waits for nothing.
        """
        step, whole = ChunkPass.of_step(self), self._whole()
        if whole is not None:
            step.evict_by_scores(0, whole)
            self.cache.cut(whole.held)
            return
        for layer, held in enumerate(self.cache.layers):
            if held.held > self.budgets[layer]:
                step.evict_by_scores(layer, held)

    def _whole(self) -> LayerCache | None:
        """All layers as one, where they are cut back alike and nothing but the kept units takes memory for it."""
        same = len(set(self.budgets)) == 1 and not _chooses(self.method)
        return self.cache.whole() if same and use_triton("compact", next(iter(self.cache.layers[0].slab))) else None

    def unread(self) -> None:
        """Take back the last `step`: the token is not in the cache any more."""
        assert isinstance(self._graph, StepGraph)
        self._graph.undo()

    def settle(self) -> None:
        """Make the cache whole after `step`s: scores and positions of the units that they added.

        Raises: NumericsError: scores that are NaN or infinite.
        """
        if isinstance(self._graph, StepGraph) and not self._graph.flush():
            raise not_finite(self.method, self.cache.seen - MOST_STASHED, self.cache.seen)

    def check_scores(self) -> None:
        """Wait for the scores of the last pass.

        Raises: NumericsError: scores that are NaN or infinite.
        """
        self._check_next(None)

    def _check_next(self, check: Check | None) -> None:
        """`check_scores`, while the device works on the pass that `check` is of, so that it always has work to do."""
        last, self._unchecked = self._unchecked, check
        if last is not None:
            last()

    def _step_graph(self) -> StepGraph | None:
        if self._graph is None:
            on_gpu = self.backbone.device.type == "cuda"
            self._graph = (StepGraph.of(self, capture=True) if on_gpu else None) or False
        return self._graph if isinstance(self._graph, StepGraph) else None

    def follow(self, ids: Tensor) -> Tensor:
        """Read a known text [B, T] behind what was read before; returns the logits after every token, [B, T, V].

        The newest units stay pinned as while prefill goes on. For measures that need more than the last logits.
        """
        pieces = ids.split(self.cache.chunk_size, dim=1)
        parts = [self._forward(p, self.plan.budget, self.plan.num_stabilizers, None, logits=p.shape[1]) for p in pieces]
        self.check_scores()
        return torch.cat([part for part in parts if part is not None], dim=1)

    def edges(self, total: int, local: int) -> list[int]:
        """Where chunks of a prompt of `total` tokens begin and end; the last `local` tokens are chunks of their own."""
        size = self.cache.chunk_size
        return sorted({*range(0, total - local, size), *range(total - local, total, size), total})

    def _forward(
        self, ids: Tensor, target: int | None, newest: int, protected: Tensor | None, *, logits: int,
        unordered: bool = False,
    ) -> Tensor | None:  # fmt: skip
        chunk = ChunkPass(self, target, newest, protected, ids.shape[1], unordered=unordered)
        return self._run(chunk, ids, logits=logits)

    def _is_steady(self) -> bool:
        """Whether chunks are all the same work from now on: every layer is full, and positions decide nothing."""
        layers = zip(self.cache.layers, self.budgets, strict=True)
        same = self.method.evicts and self.method.replayable and not self.cache.joins and can_capture(self.backbone)
        full = all(isinstance(held.slab, Units) and held.held == budget for held, budget in layers)
        return same and full and alike(self)

    def _replay(self, ids: Tensor) -> Replay:
        """Of chunks like ids [B, C], while `_is_steady`."""

        def work(ids: Tensor, at: Tensor) -> Tensor:
            chunk = ChunkPass(
                self, self.plan.budget, self.plan.num_stabilizers, None, ids.shape[1], at=at, unordered=True
            )
            self.backbone.run(ids, chunk, logits=0)
            sound = chunk.is_sound()
            assert sound is not None, "every layer was scored"
            return sound

        angles = [self.rope.angles(layer) for layer in range(self.backbone.num_layers)]
        return Replay(work, ids, [angles, self.cache.layers], capture=ids.is_cuda)

    def _run_again(self, replay: Replay, ids: Tensor) -> None:
        self.settle()
        seen, count = self.cache.seen, ids.shape[1]
        self._check_next(_read_back(self.method, replay.run(ids, seen), seen, seen + count))
        self.cache.seen += count

    def _run(self, chunk: ChunkPass, ids: Tensor, *, logits: int) -> Tensor | None:
        self.settle()
        out = self.backbone.run(ids, chunk, logits=ids.shape[1] if self.method.wants_surprisal else logits)
        self._race.launched()
        chunk.finish(ids, out)
        return out


class ChunkPass:
    """The `LayerContext` of one chunk or one decode step; `finish` ends it when the model has run."""

    def __init__(
        self, reader: Reader, target: int | None, newest: int, protected: Tensor | None, chunk: int, *,
        at: Tensor | None = None, unordered: bool = False,
    ) -> None:  # fmt: skip
        """
        Args:
            at: positions of the chunk's tokens, [C], where they are not known on the host.
            unordered: K and V may lie in any order afterwards (`LayerCache.fill`).
        """
        self.reader, self.cache, self.plan = reader, reader.cache, reader.plan
        self.target, self.newest, self.protected = target, newest, protected
        self.start, self.chunk, self.at = reader.cache.seen, chunk, at
        self.unordered = unordered
        self.wants_hidden = reader.method.wants_hidden
        self.sound: list[Tensor] = []  # of each layer: finite where its scores are
        self._marked: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        method, held = self.reader.method, self.cache.layers[layer]
        if layer == self.reader.backbone.num_layers - 1 and self.at is None:  # nobody asks while a chunk is recorded
            self.reader._race.last_layer(q.device)
        window = held.window
        view = ChunkView(layer, q, k, v, self.start, call.scale, call.hidden)
        if window is None and self._overflows(held, k.shape[2]) and not self.cache.joins:
            return self._attend_beside(held, view)
        early = window is None and method.evicts and not method.rescoring and not method.wants_surprisal
        units = self.cache.append(
            layer, self._new_units(k, v, method.score(view) if early else k.new_zeros(k.shape[:3]))
        )
        held.watch(q)
        padding = held.padding
        turn = self._turning(held, view, [units], padding)
        q_rotated, keys = self._turned(held, view, turn, len(units) - k.shape[2]), turn(units.k, 0)
        bias = self._bias(units, padding) if window is None else None
        out = prefix_causal_attention(
            q_rotated, keys, units.v, scale=call.scale, softcap=call.softcap, window=window, bias=bias
        )
        scratch = keys.nbytes + held.joined_bytes
        if window is not None:
            self._keep_window(held, len(units), window)
        elif method.wants_surprisal:
            held.settle()  # scored and evicted when the logits are there
        else:
            probe = AttentionProbe(q_rotated, keys, call.scale, call.softcap, bias)
            if method.rescoring or method.reduces:
                ahead = functools.partial(self._ahead, layer, len(units))
                view = dataclasses.replace(view, joined=Joined(units, keys, probe, ahead))
            if method.rescoring and (not method.memoryless or self._exceeds(held, layer, len(units))):
                units.score.copy_(method.score(view))
            scratch += self._evict(held, units, view) + probe.scratch_bytes
        self.cache.note_scratch(scratch)
        return out

    def _overflows(self, held: LayerCache, count: int) -> bool:
        return type(held) is LayerCache and not held.ages and held.held + count > len(held.slab)

    def _attend_beside(self, held: LayerCache, view: ChunkView) -> Tensor:
        """`attend` where the layer will evict and its old units and the chunk's need not lie together."""
        before, scale, fills = held.held, view.scale, self._fills(held, view)
        new = self._new_units(view.k, view.v, self.reader.method.score(view))
        if not fills:
            held.order(settled=True)
        old, stored = held.beside(new)
        pieces = [Candidates(x.score, x.position, x.protected) for x in (old, new)]
        choice = self._choose(view, *pieces, drops=fills)
        turn = self._turning(held, view, [old, new], None)
        q = self._turned(held, view, turn, before)
        own = chunk_attention(q, turn(new.k, before), new.v, scale=scale)
        out = add_prefix(own, q, turn(old.k, 0, slots=held.slots), old.v, scale=scale)  # in any order, but both in one
        rotated = max(old.k.nbytes, new.k.nbytes)  # of one part at a time
        decoded, encoded = 0, 0
        if isinstance(stored, Packed):
            decoded, encoded = old.k.nbytes + old.v.nbytes, stored.k.nbytes + stored.v.nbytes
        self.cache.note_scratch(rotated + decoded + encoded)
        del old, turn
        self.cache.note_scratch(held.compact_bytes(choice.keep.shape[-1]) + encoded)
        if fills:
            held.fill(choice)
        else:
            held.keep(choice.keep)
        return out

    def _fills(self, held: LayerCache, view: ChunkView) -> bool:
        """Whether new units may take the slots of those that go: as many stay as are held, and kernels find them."""
        same = self.unordered and self.plan.positions == "compact" and held.held == self._target(view.layer)
        fast = same and use_triton("compact", view.k) and use_triton("rotate", view.k)
        return fast and self.reader.rope.kernel_angles(view.layer, view.k) is not None

    def _choose(self, view: ChunkView, old: Candidates, new: Candidates, *, drops: bool = False) -> Choice:
        """Which units stay, of old and new ones, and if `drops` which go."""
        method, target = self.reader.method, self._target(view.layer)
        pins = dict(num_sinks=self.plan.num_sinks, num_newest=self.newest)
        if _chooses(method):  # here and now: it may look at queries, which are rotated in place next
            self._note(new.score)
            score, pinned = candidates(old, new, **pins)
            keep = method.select(score, target, pinned, view)
            return Choice(keep, others(keep, score.shape[2]) if drops else None)
        choice, sound = kept_beside(old, new, target, **pins, drops=drops)
        self.sound.append(sound)
        return choice

    def evict_by_scores(self, layer: int, held: LayerCache) -> None:
        """Cut a layer, or `held` of all layers that are like it, back to its target by the scores that units have."""
        units = held.revisit()
        nothing = units["score"].new_empty(0)  # whoever scores by the token alone chooses by scores alone
        view = ChunkView(layer, nothing, nothing, nothing, self.start, 1.0)
        old, new = (
            Candidates(*(units[name][:, :, part] for name in Candidates._fields))
            for part in (slice(0, -1), slice(-1, None))
        )
        keep = self._choose(view, old, new).keep
        self.cache.note_scratch(held.compact_bytes(keep.shape[-1]))
        held.keep(keep)

    def _target(self, layer: int) -> int:
        """Units that an eviction leaves in a layer."""
        assert self.plan.budget is not None
        assert self.target is not None
        target = self.reader.budgets[layer] - (self.plan.budget - self.target)
        check_pins(self.plan.num_sinks + self.reader.num_protected + self.newest, target)
        return target

    def _bias(self, units: Units, padding: Tensor | None) -> Tensor | None:
        """What is added to every unit's logits, [B, Hkv, S]: the method's, and -inf on what pads a ragged head."""
        state = self.reader.method.state
        own = units.state[..., state.index(BIAS)] if BIAS in state else None
        if padding is None:
            return own
        pad = torch.arange(len(units), device=padding.device) < padding[..., None]
        return (units.score.new_zeros(pad.shape) if own is None else own).masked_fill(pad, float("-inf"))

    @classmethod
    def of_step(cls, reader: Reader) -> ChunkPass:
        """That of a decode step."""
        plan = reader.plan
        return cls(reader, plan.decode_target, max(plan.num_stabilizers, plan.local_window), None, 1)

    def finish(self, ids: Tensor, logits: Tensor | None) -> None:
        """After the forward pass over ids [B, C]: what needs its logits [B, C, V], and the count of tokens seen.

        Raises: NumericsError: scores of the pass before are NaN or infinite; `Reader.check_scores` is for this one's.
        """
        reader, seen = self.reader, self.cache.seen
        if reader.method.wants_surprisal:
            assert logits is not None
            self.score_tokens(surprisal(logits, ids, reader.last_logits))
            reader.last_logits = logits[:, -1]
        sound = self.is_sound()
        reader._check_next(None if sound is None else _read_back(reader.method, sound, seen, seen + ids.shape[1]))
        self.cache.seen += ids.shape[1]

    def _note(self, scores: Tensor) -> None:
        """Remember to look at a layer's scores: one kernel that keeps NaN."""
        self.sound.append(torch.linalg.vector_norm(scores, math.inf, dim=-1))

    def is_sound(self) -> Tensor | None:
        """Whether all scores are numbers: bool [], on the device; None: there are none."""
        home = self.reader.backbone.device
        return finite(torch.stack([scores.to(home) for scores in self.sound])) if self.sound else None

    def score_tokens(self, nats: Tensor) -> None:
        """After the forward pass: score every layer's units by the surprisal of their tokens, and evict."""
        for layer, held in enumerate(self.cache.layers):
            if held.window is None:
                units = held.reopen()
                old = units.score[..., : len(units) - nats.shape[1]]
                evicting = len(units) > self.reader.budgets[layer]
                units.score.copy_(self.reader.method.score_tokens(old, nats, evicting=evicting))
                view = ChunkView(layer, units.k, units.k, units.v, self.start, 1.0)
                self._evict(held, units, view)

    def _new_units(self, k: Tensor, v: Tensor, scores: Tensor) -> Units:
        b, h, c, _ = k.shape
        position, protected = (mark.expand(b, h, c) for mark in self._marks(k.device))
        state = k.new_zeros(b, h, c, len(self.reader.method.state), dtype=torch.float32)
        return Units(k, v, scores, position, protected, state)

    def _marks(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Position and protection of the chunk's tokens, [C], the same for all layers on a device."""
        if device not in self._marked:
            span = self.start, self.start + self.chunk
            at = torch.arange(*span, dtype=torch.int32, device=device) if self.at is None else self.at.int()
            none = torch.zeros(self.chunk, dtype=torch.bool, device=device)
            self._marked[device] = at, none if self.protected is None else self.protected.to(device)
        return self._marked[device]

    def _turning(self, held: LayerCache, view: ChunkView, parts: list[Units], padding: Tensor | None) -> Turn:
        """RoPE at the angles that the position policy gives a layer's units, and its queries as the last ones.

        Kept whole or re-numbered, units lie at first, first + 1, ...; only an evicted cache under "original" has gaps,
        and other ones in every head. Ragged heads are numbered each from its own first unit.

        parts: all units, in order.
        Returns: a function of x [B, H, n, D], which of the units is its first, where to put it, and in which slots of
            both its units lie, [B, H, n].
        """
        rope, layer, device = self.reader.rope, view.layer, view.k.device
        count = sum(len(part) for part in parts)
        original = self.plan.positions == "original"
        first = self.start + self.chunk - count if original else 0
        rope.grow(first + count)
        if original and held.window is None and (held.evicted or padding is not None):
            own = torch.cat([part.position for part in parts], 2).long()
        elif padding is not None:
            own = (torch.arange(first, first + count, device=device) - padding[..., None]).clamp(min=0)  # [B, Hkv, S]
        else:
            return lambda x, unit, out=None, slots=None: rope.run(layer, x, first + unit, out, slots)

        def turn(x: Tensor, unit: int, out: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
            assert slots is None, "units with positions of their own lie in order"
            at = own[:, :, unit : unit + x.shape[2]]
            return rope.rotate(layer, x, at.repeat_interleave(x.shape[1] // at.shape[1], 1), out)

        return turn

    def _turned(self, held: LayerCache, view: ChunkView, turn: Turn, before: int) -> Tensor:
        """The queries, rotated where they are if nobody will ask how they were: they are as large as the chunk's hidden
        states."""
        return turn(view.q, before, None if self._looks_back(held) else view.q)

    def _looks_back(self, held: LayerCache) -> bool:
        """Whether anybody looks at a layer's queries after they were rotated."""
        method = self.reader.method
        return method.rescoring or method.reduces or _chooses(method) or held.watches

    def _ahead(self, layer: int, count: int, x: Tensor) -> Tensor:
        """x [B, H, T, D] at the angles of the T positions behind a layer's newest unit."""
        first = self.start + self.chunk if self.plan.positions == "original" else count
        self.reader.rope.grow(first + x.shape[2])
        return self.reader.rope.rotate(layer, x, torch.arange(first, first + x.shape[2], device=x.device))

    def _keep_window(self, held: LayerCache, count: int, window: int) -> None:
        if count > window - 1:
            held.keep_last(window - 1)
        else:
            held.settle()

    def _exceeds(self, held: LayerCache, layer: int, appended: int) -> bool:
        """Whether a layer with so many `appended` units, padding included, is cut back."""
        if self.plan.budget is None or self.target is None:
            return False
        return appended - (held.width - held.held) > self.reader.budgets[layer]

    def _evict(self, held: LayerCache, units: Units, view: ChunkView) -> int:
        """Cut a layer back to its budget; returns the bytes of the units that were made of others meanwhile."""
        method = self.reader.method
        if method.evicts:
            self._note(units.score)
        if not self._exceeds(held, view.layer, len(units)):
            held.settle()
            return 0
        padding = held.padding
        target = self._target(view.layer)
        pinned = pin(units.protected, num_sinks=self.plan.num_sinks, num_newest=self.newest, positions=units.position)
        scores = units.score
        if padding is not None:
            pad = torch.arange(len(units), device=padding.device) < padding[..., None]
            pinned, scores = pinned & ~pad, scores.masked_fill(pad, float("-inf"))
        if not method.reduces:
            held.keep(method.select(scores, target, pinned, view))
            return 0
        keep, merged = method.reduce(scores, target, pinned, view)
        held.rewrite(merged.k, merged.v)
        if BIAS in method.state:
            units.state[..., method.state.index(BIAS)] = merged.bias
        held.keep(keep)
        return merged.k.nbytes + merged.v.nbytes


def spare_units(method: Method) -> int:
    """Units of a slab beyond the budget: a replayed step writes its unit before anybody is evicted for it."""
    return int(method.evicts and method.per_token)


def _joins(backbone: Backbone, method: Method) -> bool:
    """Whether chunks must lie behind the cached units, in one piece, to be attended to or chosen from."""
    looks = method.rescoring or method.reduces or method.wants_surprisal or not method.evicts or BIAS in method.state
    return looks or any(call.softcap is not None for call in backbone.calls)


def _chooses(method: Method) -> bool:
    """Whether it has a selection of its own, that may look at anything."""
    return type(method).select is not Method.select


def _sent(ids: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what it is working on."""
    if ids.device.type == "cpu" and device.type == "cuda":
        return ids.pin_memory().to(device, non_blocking=True)
    return ids.to(device)


def _read_back(method: Method, sound: Tensor, first: int, last: int) -> Check:
    """Begin to read back whether the scores of tokens first .. last - 1 are numbers."""
    wait = read_back(sound[None])

    def check() -> None:
        if not wait()[0]:
            raise not_finite(method, first, last)

    return check


def _check_finite(logits: Tensor) -> None:
    """Of the prompt's last token. Raises: NumericsError: no row could be answered from."""
    if not finite(logits.amax(-1)):  # single tokens may be ruled out by -inf
        raise NumericsError(
            "the model's logits are NaN or infinite after the prompt; its weights are broken, or the dtype overflows "
            "(try --dtype float32)"
        )


def not_finite(method: Method, first: int, last: int) -> NumericsError:
    """For scores of tokens first .. last that are NaN or infinite."""
    return NumericsError(
        f"method {method.name!r} gave NaN or infinite scores between tokens {max(0, first)} and {last}; the heads or "
        "the model's weights are broken, or the dtype overflows (try --dtype float32)"
    )


def _layer_budgets(method: Method, plan: CachePlan, windows: list[int | None], num_protected: int) -> list[int]:
    """Units per layer: what is pinned fits every one, and the method shares out the rest."""
    if plan.budget is None:
        return [0] * len(windows)
    newest = max(plan.num_stabilizers, plan.local_window)
    pinned = min(plan.budget, plan.num_sinks + num_protected + newest + plan.decode_interval)
    method.check_free(plan.budget - pinned)
    shares = method.budgets(plan.budget - pinned, windows.count(None))
    assert sum(shares) == (plan.budget - pinned) * windows.count(None), "layers share one total"
    left = iter(shares)
    return [plan.budget if window is not None else pinned + next(left) for window in windows]
