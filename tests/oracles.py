"""What the tests of the core compare with: slow, plain readings that share no code with `locret`.

`MaskedReference` is the method of the paper without a cache: no unit is ever gathered or moved; every one stays where
it is and a boolean per layer, KV head and unit says who may still be seen. Shapes: B batch, T tokens, S units so far,
Hq/Hkv heads, G = Hq // Hkv, D head dim.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conftest import build_byte_tokenizer, build_tiny_model
from peer_files import write_fastkvzip, write_kvzap
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from locret.backbone import AttentionCall, Backbone
from locret.cache import KVCache, LayerCache, RaggedLayer, Units
from locret.config import CacheConfig
from locret.engine import LLM
from locret.gate import Gate, Gates
from locret.heads import HeadsConfig, RetainingHeads
from locret.kernels.attention import reference_attention
from locret.lococo import ConvMerge, Mergers
from locret.methods import ChunkView, get_method
from locret.methods.base import Joined
from locret.methods.snapkv import SnapKV
from locret.observe import AttentionProbe
from locret.prefill import Reader

# two threads on tensors of a few hundred numbers wait for each other: with both cores busy the tests of the core take
# minutes instead of seconds
torch.set_num_threads(1)

PEERS: dict[str, Callable[..., Path]] = {"kvzap": write_kvzap, "fastkvzip": write_fastkvzip}

Score = Callable[[int, Tensor, Tensor, Tensor, int], Tensor]  # layer, q, k, v (before RoPE), start -> [Hkv, T]


def tokens(length: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    """Random ids [B, T] of the tiny vocabulary, no special ones and, up to 256, none twice.

    The same token twice has the same raw key in layer 0, so its two units tie and either may stay.
    """
    g = torch.Generator().manual_seed(seed)
    if length > 256:
        return torch.randint(8, 264, (batch, length), generator=g)
    return torch.stack([torch.randperm(256, generator=g)[:length] + 8 for _ in range(batch)])


def random_heads(backbone: Backbone, *, seed: int = 0) -> RetainingHeads:
    generator = torch.Generator().manual_seed(seed)
    heads = RetainingHeads(HeadsConfig.of(backbone, hidden_size=32), generator=generator)
    return heads.to(backbone.dtype).requires_grad_(False).eval()


# windows that fit the small chunks of the tests
SMALL: dict[str, dict[str, Any]] = {
    "snapkv": dict(window=8), "pyramidkv": dict(base=SnapKV(window=8), beta=4), "adakv": dict(base=SnapKV(window=8)),
    "csp": dict(window=8), "lagkv": dict(lag=4), "expected_attention": dict(num_future=16), "corm": dict(window=24),
    "nacl": dict(proxy_share=0.1),
}  # fmt: skip


_WEIGHTS = tempfile.TemporaryDirectory()


def small_options(name: str, backbone: Backbone) -> dict[str, Any]:
    """Options that fit tiny models and small chunks; methods that score with published weights get a file of them."""
    if name == "attention_gate":
        return dict(path=str(write_gates(Path(_WEIGHTS.name) / "gates", backbone)))
    if name == "lococo":
        return dict(path=str(write_mergers(Path(_WEIGHTS.name) / "mergers", backbone)))
    if name not in PEERS:
        return SMALL.get(name, {})
    c = backbone.model.config
    sizes = dict(layers=c.num_hidden_layers, hidden=c.hidden_size, heads=backbone.num_kv_heads)
    return dict(path=str(PEERS[name](Path(_WEIGHTS.name) / name, **sizes)))


def write_mergers(path: Path, backbone: Backbone, *, slots: int = 5, mix: float = 0.5, seed: int = 0) -> Path:
    """A file of random LoCoCo mergers for a model; the tiny models' plans leave 8 units and more unpinned."""
    generator = torch.Generator().manual_seed(seed)
    layers = [ConvMerge(backbone.head_dim, slots, kernel_size=5, generator=generator) for _ in backbone.layers]
    for layer in layers:
        layer.mix.data.fill_(mix)
    Mergers(layers, backbone.fingerprint()).save(path)
    return path


def write_gates(path: Path, backbone: Backbone, *, seed: int = 0) -> Path:
    """A file of random gates for a model."""
    generator, hidden = torch.Generator().manual_seed(seed), int(backbone.model.config.hidden_size)
    layers = [Gate(hidden, backbone.num_kv_heads, heads=2, width=4, generator=generator) for _ in backbone.layers]
    Gates(layers, backbone.fingerprint()).save(path)
    return path


def method_of(name: str, backbone: Backbone, **options: Any):
    heads = random_heads(backbone) if name == "locret" else None
    return get_method(name, heads=heads, **(small_options(name, backbone) | options))


def joined_of(view: ChunkView, q: Tensor, keys: Tensor, *, units: Units | None = None, ahead: Any = None) -> ChunkView:
    """The view with what methods see that score cached units again."""
    if units is None:
        units = units_of(keys)
    return dataclasses.replace(view, joined=Joined(units, keys, AttentionProbe(q, keys, view.scale), ahead))


def units_of(k: Tensor, *, v: Tensor | None = None, state: int = 0) -> Units:
    """Units of these keys, scores and states 0, positions 0, 1, 2 ..."""
    b, h, s, _ = k.shape
    return Units(k, k if v is None else v, torch.zeros(b, h, s), torch.arange(s).expand(b, h, s),
                 torch.zeros(b, h, s, dtype=torch.bool), torch.zeros(b, h, s, state))  # fmt: skip


def reader_of(backbone: Backbone, method: Any, prompt_len: int | None, *, batch: int = 1, **options: Any) -> Reader:
    if isinstance(method, str):
        method = method_of(method, backbone)
    return Reader.start(backbone, method, CacheConfig(**options), batch=batch, prompt_len=prompt_len)


def llm_of(model: Any = "llama", method: str = "knorm", *, tokenizer: Any = "bytes", **options: Any) -> LLM:
    """An LLM around a tiny model with the byte tokenizer; `options` are those of the cache."""
    if isinstance(model, str):
        model = build_tiny_model(model)
    backbone = Backbone(model, build_byte_tokenizer() if tokenizer == "bytes" else tokenizer)
    heads = random_heads(backbone) if method == "locret" else None
    chosen = small_options(method, backbone)
    return LLM.build(backbone, heads=heads, method=method, method_options=chosen, config=CacheConfig(**options))


def speak(model: Any, alphabet: str = "abcdefghijklmnopqrstuvwxyz ", *, eos: bool = False) -> Any:
    """Make a tiny model write only these characters (and perhaps end): the other rows of its output matrix are zero."""
    tokenizer = build_byte_tokenizer()
    wanted = torch.tensor(sorted({i for c in alphabet for i in tokenizer(c).input_ids} | ({2} if eos else set())))
    weight = torch.zeros_like(model.lm_head.weight)
    weight[wanted] = model.lm_head.weight[wanted]
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def kept(reader: Reader, row: int = 0) -> list[list[list[int]]]:
    """Original positions per layer and KV head."""
    return [[[p for p in head if p >= 0] for head in layer.positions()[row].tolist()] for layer in reader.cache.layers]


# ---------------------------------------------------------------------- scores, naive


def naive_head_scores(heads: RetainingHeads) -> Score:
    """score[t, j] = (W2 . act(W1 . [q_t | k_t | v_t]))_j in float64; SiLU models only."""

    def score(layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        w1, w2 = (getattr(heads.layers[layer], name).weight.double() for name in ("fc1", "fc2"))
        x = torch.cat([part[0].transpose(0, 1).flatten(1).double() for part in (q, k, v)], 1)  # [T, (Hq + 2 Hkv) D]
        return (functional.silu(x @ w1.T) @ w2.T).T

    return score


def naive_key_norm(layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    return -(k[0].double() ** 2).sum(-1).sqrt()


def naive_recency(layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    return (start + torch.arange(k.shape[2], dtype=torch.float64)).expand(k.shape[1], -1)


# ---------------------------------------------------------------------- the method, never gathering


class MaskedReference:
    """Chunked prefill with eviction, then decoding, for a Llama model in float64, eager and head by head."""

    def __init__(
        self, model: Any, score: Score, *, budget: int, chunk: int, sinks: int, stabilizers: int, local: int,
        interval: int, positions: str, protected: Tensor | None = None,
    ) -> None:  # fmt: skip
        c = model.config
        self.model, self.score = model, score
        self.budget, self.chunk, self.sinks, self.stabilizers = budget, chunk, sinks, stabilizers
        self.local, self.interval, self.positions, self.protected = local, interval, positions, protected
        self.hq, self.hkv, self.d = c.num_attention_heads, c.num_key_value_heads, c.hidden_size // c.num_attention_heads
        layers, self.n = c.num_hidden_layers, 0
        self.k = [torch.zeros(1, self.hkv, 0, self.d, dtype=torch.float64) for _ in range(layers)]
        self.v = [x.clone() for x in self.k]
        self.s = [torch.zeros(self.hkv, 0, dtype=torch.float64) for _ in range(layers)]
        self.alive = [torch.zeros(self.hkv, 0, dtype=torch.bool) for _ in range(layers)]

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits of the last token, [V]."""
        n = ids.shape[1]
        local = min(self.local, n)
        main = n - local
        logits = None
        start = 0
        while start < n:
            end = min(start + self.chunk, main if start < main else n)
            if start >= main:
                newest = end - main
            elif end == main:
                newest = 0
            else:
                newest = self.stabilizers
            logits = self._forward(ids[:, start:end], newest, self.budget)
            start = end
        assert logits is not None
        return logits

    def step(self, token: int) -> Tensor:
        newest = max(self.stabilizers, self.local)
        return self._forward(torch.tensor([[token]]), newest, self.budget - self.interval + 1)

    def kept(self) -> list[list[list[int]]]:
        return [[alive[h].nonzero()[:, 0].tolist() for h in range(self.hkv)] for alive in self.alive]

    def _angle(self, x: Tensor, at: Tensor) -> Tensor:
        """x [T, D] rotated to positions `at` [T]: pairs (i, i + D / 2)."""
        rotary = self.model.model.rotary_emb
        angles = at.double()[:, None] * rotary.inv_freq.double()[None]
        cos, sin = (
            (f(angles.float()) * rotary.attention_scaling).double().repeat(1, 2) for f in (torch.cos, torch.sin)
        )
        half = self.d // 2
        return x * cos + torch.cat((-x[:, half:], x[:, :half]), -1) * sin

    @torch.no_grad()
    def _forward(self, ids: Tensor, newest: int, target: int) -> Tensor:
        base, t = self.model.model, ids.shape[1]
        hidden = base.embed_tokens(ids)
        for i, layer in enumerate(base.layers):
            a, x = layer.self_attn, layer.input_layernorm(hidden)
            q, k, v = (
                proj(x).view(1, t, heads, self.d).transpose(1, 2)
                for proj, heads in ((a.q_proj, self.hq), (a.k_proj, self.hkv), (a.v_proj, self.hkv))
            )
            self.s[i] = torch.cat((self.s[i], self.score(i, q, k, v, self.n)), 1)
            self.k[i], self.v[i] = torch.cat((self.k[i], k), 2), torch.cat((self.v[i], v), 2)
            self.alive[i] = torch.cat((self.alive[i], torch.ones(self.hkv, t, dtype=torch.bool)), 1)
            hidden = hidden + a.o_proj(self._attend(i, q, a.scaling).transpose(1, 2).reshape(1, t, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            for head in range(self.hkv):
                self._evict(i, head, newest, target)
        self.n += t
        self.logits = self.model.lm_head(base.norm(hidden))[0]
        return self.logits[-1]

    def _attend(self, i: int, q: Tensor, scale: float) -> Tensor:
        t, total = q.shape[2], self.k[i].shape[2]
        causal = torch.arange(total)[None] <= torch.arange(total - t, total)[:, None]
        out = torch.zeros_like(q)
        for head in range(self.hq):
            kv = head // (self.hq // self.hkv)
            living = self.alive[i][kv]
            at = living.cumsum(0) - 1 if self.positions == "compact" else torch.arange(total)
            keys = self._angle(self.k[i][0, kv], at)
            queries = self._angle(q[0, head], at[-t:])
            logits = (queries @ keys.T * scale).masked_fill(~(causal & living), -math.inf)
            out[0, head] = logits.softmax(-1) @ self.v[i][0, kv]
        return out

    def _evict(self, i: int, head: int, newest: int, target: int) -> None:
        live = self.alive[i][head].nonzero()[:, 0].tolist()
        if len(live) <= self.budget:
            return
        pinned = {p for p in live if p < self.sinks} | set(live[len(live) - newest :])
        if self.protected is not None:
            pinned |= {p for p in live if p < len(self.protected) and self.protected[p]}
        ranked = sorted(live, key=lambda p: (p not in pinned, -self.s[i][head, p].item()))
        self.alive[i][head, ranked[target:]] = False


# ---------------------------------------------------------------------- looking inside


class Recorder:
    """A `LayerContext` with full attention that writes down what reaches it."""

    def __init__(self, backbone: Backbone, length: int) -> None:
        self.rope, self.length = backbone.rope(length, length), length
        self.q: dict[int, Tensor] = {}
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        self.q[layer], self.k[layer], self.v[layer] = q, k, v
        at = torch.arange(self.length)
        turned = self.rope.rotate(layer, q, at), self.rope.rotate(layer, k, at)
        out = reference_attention(*turned, v, scale=call.scale, softcap=call.softcap, window=call.window)
        return out.to(q.dtype)


class Meter(TorchDispatchMode):
    """Counts every tensor that torch allocates while it is active, temporary ones too.

    Attributes: live, peak: bytes of storages born here and not freed; largest: elements of the largest tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors(args):
            self._count(tensor, born=False)  # existed before: a view of it is no allocation
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out if isinstance(out, tuple | list) else [out]):
            self._count(tensor, born=True)
        return out

    def _count(self, tensor: Tensor, *, born: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes() if born else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size // tensor.element_size())
        self._seen[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.live -= size
        del self._seen[key]


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


class Lengths:
    """What `spy_lengths` saw."""

    def __init__(self) -> None:
        self.joined: list[int] = []  # old units + chunk, while a layer works
        self.held: list[int] = []  # after it is done
        self.kept: list[Tensor] = []  # keep sets, [B, Hkv, b]


@contextmanager
def spy_lengths(monkeypatch: Any):
    """Every length that any layer without a window ever has."""
    seen = Lengths()
    append, keep, settle, store = KVCache.append, LayerCache.keep, LayerCache.settle, RaggedLayer._store

    def spy_append(self, index, new):
        units = append(self, index, new)
        if self.layers[index].window is None:
            seen.joined.append(len(units))
        return units

    def spy_keep(self, indices):
        keep(self, indices)
        seen.kept.append(indices)
        seen.held.append(self.held)

    def spy_store(self, indices):
        store(self, indices)
        seen.held.append(self.held)

    def spy_settle(self):
        settle(self)
        if self.window is None:
            seen.held.append(self.held)

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "append", spy_append)
        patch.setattr(LayerCache, "keep", spy_keep)
        patch.setattr(LayerCache, "settle", spy_settle)
        patch.setattr(RaggedLayer, "_store", spy_store)
        yield seen
