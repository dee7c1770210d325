"""The chunk loop: read a prompt of any length through a cache of fixed size.

A prompt of n tokens is read in chunks up to its last `local_window` tokens, which come last in a piece of their own.
In every layer, as soon as it is done with a chunk, only the best `budget` units stay:

    pinned = sinks, protected spans, the newest units
    newest = num_stabilizers while prefill goes on, none after the last chunk, the local window after that one

(arXiv:2410.01805, Algorithm 1; there the local window lies outside the budget, here everything is inside it.)

Shapes: B batch, T prompt, C chunk, P cached units, S = P + C, Hq/Hkv heads, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from locret.backbone import AttentionCall, Backbone, Rope, model_length
from locret.cache import KVCache, LayerCache, Units, unit_bytes
from locret.config import CacheConfig, CachePlan
from locret.errors import ConfigError, NumericsError
from locret.kernels.attention import prefix_causal_attention
from locret.methods.base import ChunkView, Method
from locret.select import check_pins, finite, pin, select

Progress = Callable[[int, int], object]


@dataclass
class Reader:
    """A batch of equally long sequences being read: the cache and everything needed to extend it."""

    backbone: Backbone
    method: Method
    plan: CachePlan
    cache: KVCache
    rope: Rope
    num_protected: int = 0

    @classmethod
    def start(
        cls, backbone: Backbone, method: Method, config: CacheConfig, *, batch: int, prompt_len: int | None,
        new_tokens: int | None = None, num_protected: int = 0,
    ) -> Reader:  # fmt: skip
        """Resolve the options for a prompt and allocate the cache.

        Args:
            prompt_len: tokens; None when the input has no known end.
            new_tokens: how many more will follow at most; None when unknown. A cache that can hold everything is not
                made larger than that.
            num_protected: units the caller will mark.
        """
        windows = [layer.window for layer in backbone.layers]
        each = unit_bytes(backbone.head_dim, backbone.dtype) * backbone.num_kv_heads
        fixed = sum((w - 1) * each for w in windows if w is not None)
        plan = config.resolve(prompt_len=prompt_len, unit_bytes=max(1, windows.count(None)) * each, fixed_bytes=fixed,
                              num_protected=num_protected)  # fmt: skip
        if not method.evicts:
            plan = CachePlan(None, plan.chunk_size, 0, 0, 0, plan.positions, plan.decode_interval)
        total = None if prompt_len is None or new_tokens is None else prompt_len + new_tokens
        return cls._allocate(backbone, method, plan, batch, prompt_len, total, num_protected)

    @classmethod
    def resume(cls, backbone: Backbone, method: Method, plan: CachePlan, *, seen: int, num_protected: int) -> Reader:
        """A reader for one saved sequence; the caller fills the cache's layers."""
        reader = cls._allocate(backbone, method, plan, 1, seen, None, num_protected)
        reader.cache.seen = seen
        return reader

    @classmethod
    def _allocate(
        cls, backbone: Backbone, method: Method, plan: CachePlan, batch: int, prompt_len: int | None,
        total: int | None, num_protected: int,
    ) -> Reader:  # fmt: skip
        initial = total or prompt_len or 0
        capacity = None if plan.budget is None else min(plan.budget, total or plan.budget)
        chunk = min(plan.chunk_size, total or plan.chunk_size)
        cache = KVCache(
            windows=[layer.window for layer in backbone.layers], batch=batch, num_kv_heads=backbone.num_kv_heads,
            head_dim=backbone.head_dim, capacity=capacity, chunk_size=chunk, dtype=backbone.dtype,
            device=backbone.device, initial=initial,
        )  # fmt: skip
        # families with length-dependent frequencies choose them once, by the longest position they will be shown
        longest, reach = prompt_len or model_length(backbone.model), initial + chunk
        if capacity is not None and plan.positions == "compact":
            reach = capacity + chunk
            longest = min(longest, reach)
        return cls(backbone, method, plan, cache, backbone.rope(reach + 1, longest), num_protected)

    def copy(self) -> Reader:
        """An independent copy; the rotation tables are shared, they only grow."""
        return Reader(self.backbone, self.method, self.plan, self.cache.copy(), self.rope, self.num_protected)

    def read(
        self, ids: Tensor, *, local_window: int | None = None, more: bool = False, protected: Tensor | None = None,
        on_progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """Prefill [B, T] tokens behind what was read before; returns the logits of the last one, [B, V].

        Args:
            local_window: how many of the last tokens are read last and stay; default: the plan's.
            more: text will follow, so stabilizers stay pinned after the last chunk as well.
            protected: bool [T]; units that no eviction may take.
            on_progress: called with (tokens done, tokens in all) after every chunk.
        Raises: NumericsError: scores that are NaN or infinite.
        """
        total = ids.shape[1]
        if total == 0:
            raise ConfigError("the prompt has no tokens; give at least one")
        local = min(self.plan.local_window if local_window is None else local_window, total)
        edges = self._edges(total, local)
        logits = None
        with self.backbone.seam():
            for start, stop in itertools.pairwise(edges):
                last_chunk, is_local = stop == total - local, start >= total - local
                newest = self.plan.num_stabilizers
                if is_local and not more:
                    newest = stop - (total - local)
                elif last_chunk and not more:
                    newest = 0
                part = None if protected is None else protected[start:stop]
                logits = self._forward(ids[:, start:stop], self.plan.budget, newest, part, logits=int(stop == total))
                if on_progress is not None:
                    on_progress(stop, total)
        assert logits is not None
        return logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        """Decode: read one token a row, [B]; returns logits [B, V].

        When the budget is full, one eviction makes room for `decode_interval` steps; the newest units are pinned.
        """
        newest = max(self.plan.num_stabilizers, self.plan.local_window)
        logits = self._forward(tokens[:, None], self.plan.decode_target, newest, None, logits=1)
        assert logits is not None
        return logits[:, -1]

    def follow(self, ids: Tensor) -> Tensor:
        """Read a known text [B, T] behind what was read before; returns the logits after every token, [B, T, V].

        The newest units stay pinned as while prefill goes on. For measures that need more than the last logits.
        """
        pieces = ids.split(self.cache.chunk_size, dim=1)
        parts = [self._forward(p, self.plan.budget, self.plan.num_stabilizers, None, logits=p.shape[1]) for p in pieces]
        return torch.cat([part for part in parts if part is not None], dim=1)

    def _edges(self, total: int, local: int) -> list[int]:
        size = self.cache.chunk_size
        return sorted({*range(0, total - local, size), *range(total - local, total, size), total})

    def _forward(
        self, ids: Tensor, target: int | None, newest: int, protected: Tensor | None, *, logits: int
    ) -> Tensor | None:
        chunk = _ChunkPass(self, target, newest, protected)
        out = self.backbone.run(ids, chunk, logits=logits)
        if not bool(chunk.finite):
            raise NumericsError(
                f"method {self.method.name!r} gave NaN or infinite scores between tokens {self.cache.seen} and "
                f"{self.cache.seen + ids.shape[1]}; the heads or the model's weights are broken, or the dtype "
                "overflows (try --dtype float32)"
            )
        self.cache.seen += ids.shape[1]
        return out


class _ChunkPass:
    """The `LayerContext` of one chunk or one decode step."""

    def __init__(self, reader: Reader, target: int | None, newest: int, protected: Tensor | None) -> None:
        self.reader, self.cache, self.plan = reader, reader.cache, reader.plan
        self.target, self.newest, self.protected = target, newest, protected
        self.start = reader.cache.seen
        self.wants_hidden = reader.method.wants_hidden
        self.finite: Tensor | bool = True

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        held = self.cache.layers[layer]
        window = held.window
        before = held.held
        scores = self._early_scores(layer, q, k, v, call) if window is None else k.new_zeros(k.shape[:3])
        units = self.cache.append(layer, self._new_units(k, v, scores))
        q_rotated, keys = self._rotate(layer, held, q, units.k, before)
        self.cache.note_scratch(keys.nbytes)
        out = prefix_causal_attention(q_rotated, keys, units.v, scale=call.scale, softcap=call.softcap, window=window)
        if window is not None:
            self._keep_window(held, len(units), window)
            return out
        if self.reader.method.rescoring:
            view = ChunkView(layer, q, k, v, self.start, call.scale, call.hidden, q_rotated, keys,
                             units.score[..., :before])  # fmt: skip
            units.score.copy_(self.reader.method.score(view))
        self._evict(held, units, layer)
        return out

    def _early_scores(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        method = self.reader.method
        if method.rescoring or not method.evicts:
            return k.new_zeros(k.shape[:3])
        return method.score(ChunkView(layer, q, k, v, self.start, call.scale, call.hidden))

    def _new_units(self, k: Tensor, v: Tensor, scores: Tensor) -> Units:
        b, h, c, _ = k.shape
        position = torch.arange(self.start, self.start + c, device=k.device).expand(b, h, c)
        if self.protected is None:
            protected = torch.zeros((), dtype=torch.bool, device=k.device).expand(b, h, c)
        else:
            protected = self.protected.to(k.device).expand(b, h, c)
        return Units(k, v, scores, position, protected)

    def _rotate(self, layer: int, held: LayerCache, q: Tensor, keys: Tensor, before: int) -> tuple[Tensor, Tensor]:
        """Queries and all keys at the angles that the position policy gives them.

        Kept whole or re-numbered, units lie at first, first + 1, ...; only an evicted cache under "original" has gaps,
        and other ones in every head.
        """
        rope, count, c = self.reader.rope, keys.shape[2], q.shape[2]
        original = self.plan.positions == "original"
        if original:
            rope.grow(self.start + c)
        if original and held.evicted and held.window is None:
            assert held._joined is not None
            at = torch.arange(self.start, self.start + c, device=q.device)
            return rope.rotate(layer, q, at), rope.rotate(layer, keys, held._joined.position)
        first = self.start - before if original else 0
        rope.grow(first + count)
        at = torch.arange(first, first + count, device=q.device)
        return rope.rotate(layer, q, at[before:]), rope.rotate(layer, keys, at)

    def _keep_window(self, held: LayerCache, count: int, window: int) -> None:
        if count > window - 1:
            held.keep_last(window - 1)
        else:
            held.settle()

    def _evict(self, held: LayerCache, units: Units, layer: int) -> None:
        if self.reader.method.evicts:
            self.finite = finite(units.score) & self.finite
        budget = self.plan.budget
        if budget is None or self.target is None or len(units) <= budget:
            held.settle()
            return
        pinned = pin(units.protected, num_sinks=self.plan.num_sinks, num_newest=self.newest, positions=units.position)
        check_pins(self.plan.num_sinks + self.reader.num_protected + self.newest, self.target)
        held.keep(select(units.score, self.target, pinned))
