"""What a run will take, before it runs: bytes from the engine's own allocation, seconds from a roofline.

Bytes are not a second formula: the plan lets `Reader.start` allocate its cache on torch's "meta" device, which takes no
memory, and reads the sizes off. Weights are counted the same way, from the model's config. What no allocation names
(activations of a chunk, the CUDA context) is estimated and says so.

Seconds are a bound: max(FLOP / matmul rate, bytes / bandwidth) of every chunk and of a decode step.

    prefill FLOP of a chunk = 2 C W + 4 C Hq D sum over layers (P + (C + 1) / 2) + 2 C heads
    decode bytes of a step  = weights + rows * sum over layers (units held * Hkv * bytes of their K and V)

Shapes: C chunk, P units cached before it, W numbers in the layers' matrices (of a mixture: the active experts').
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from locret.backbone import AttentionCall, Backbone, LayerSpec
from locret.cache import unit_bytes
from locret.config import LARGEST_CHUNK, CacheConfig, CachePlan
from locret.errors import BackboneError, ConfigError, HeadsError, unknown
from locret.memory import RESERVE, longest_chunk, mlp_width
from locret.methods import Method, find_method
from locret.prefill import Reader, spare_units
from locret.stores import Store, fixed_bytes, layer_stores, widest_part
from locret.stores import unit_bytes as stored_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEADS_SIZE = 256  # d_R of retaining heads that are not there yet: the default of `locret train`
RUNTIME_BYTES = 256 * 2**20 + RESERVE  # CUDA context and libraries, and what a run sets aside: an estimate
# of a card's data sheet, what large copies and matmuls reach; measured on one H200: 4.3 of 4.8 TB/s, 700 of 989 TFLOP/s
ATTAINED_BANDWIDTH, ATTAINED_FLOPS = 0.9, 0.7


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that bytes and FLOP follow from.

    Attributes:
        windows: per layer, its sliding window or None.
        parameters: all numbers of the model.
        matmul: numbers in the layers' matrices that one token meets: multiply-adds a token.
        output: numbers in the output matrix.
        max_length: the longest input the model was trained for.
        softcap: of attention's logits; such attention takes a layer's units in one piece.
        mlp_width: numbers that a token has at once in an MLP (`memory`); 0: the intermediate size.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    windows: tuple[int | None, ...]
    parameters: int
    matmul: int
    output: int
    max_length: int
    softcap: float | None = None
    mlp_width: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @property
    def heads_parameters(self) -> int:
        """Numbers in retaining heads of the default width."""
        inputs = (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim
        return self.num_layers * HEADS_SIZE * (inputs + self.num_kv_heads)

    @classmethod
    def of(cls, config: Any, name: str = "") -> Shape:
        """From a transformers config; the model is built without memory, its parameters counted."""
        with torch.device("meta"):
            return cls._count(AutoModelForCausalLM.from_config(config), config, name)

    @classmethod
    def of_backbone(cls, backbone: Backbone) -> Shape:
        """Of a model that is loaded: what its probe saw."""
        counted = cls._count(backbone.model, backbone.model.config, "")
        return dataclasses.replace(
            counted, windows=tuple(layer.window for layer in backbone.layers), num_q_heads=backbone.num_q_heads,
            num_kv_heads=backbone.num_kv_heads, head_dim=backbone.head_dim,
        )  # fmt: skip

    @classmethod
    def _count(cls, model: Any, config: Any, name: str) -> Shape:
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
        active = (getattr(config, "num_experts_per_tok", None) or 1) / experts
        matrices = [(key, p.numel()) for key, p in model.base_model.layers.named_parameters() if p.dim() > 1]
        heads = config.num_attention_heads
        return cls(
            name=name or type(model).__name__, hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size, num_q_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size, windows=_windows(config),
            parameters=sum(p.numel() for p in model.parameters()),
            matmul=sum(int(n * active) if ".experts." in f".{key}" else n for key, n in matrices),
            output=model.get_output_embeddings().weight.numel(),
            max_length=int(getattr(config, "max_position_embeddings", 0) or 0),
            softcap=getattr(config, "attn_logit_softcapping", None), mlp_width=mlp_width(config),
        )  # fmt: skip

    @classmethod
    def load(cls, name_or_path: str) -> Shape:
        """From a folder or hub id: the config only, no weights.

        Raises: BackboneError: there is none, or not of a causal language model.
        """
        try:
            return cls.of(AutoConfig.from_pretrained(name_or_path), name_or_path)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise BackboneError(f"no causal language model's config at {name_or_path!r}: {error}; give a folder with "
                                "config.json, a hub id that this machine can reach, or --shape") from error  # fmt: skip


def _llama(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, **options: Any) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=options.pop("tied", False),
        max_position_embeddings=131_072, **options,
    )  # fmt: skip


# published dimensions, as a Llama of that shape; for random weights and for plans without a download
_SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "llama-3.1-8b": ((32, 4096, 14336, 32, 8, 128_256), {}),
    "llama-3.2-1b": ((16, 2048, 8192, 32, 8, 128_256), dict(tied=True)),
    "llama-3.1-70b": ((80, 8192, 28672, 64, 8, 128_256), {}),
    "phi-3-mini": ((32, 3072, 8192, 32, 32, 32_064), {}),
    "qwen3-8b": ((36, 4096, 12288, 32, 8, 151_936), dict(head_dim=128)),
}
SHAPES = tuple(_SHAPES)


def shape_config(name: str) -> LlamaConfig:
    """The config of a named shape, or of LAYERSxHIDDENxINNERxHEADSxKVHEADSxVOCAB ("8x384x1024x6x3x8192")."""
    parts = name.split("x")
    if len(parts) == 6 and all(part.isdigit() and int(part) > 0 for part in parts):
        numbers, options = tuple(map(int, parts)), dict[str, Any]()
        if numbers[1] % numbers[3] or numbers[3] % numbers[4]:
            raise ConfigError(f"shape {name!r}: hidden {numbers[1]} must be a multiple of {numbers[3]} heads, and "
                              f"those of {numbers[4]} KV heads")  # fmt: skip
    elif name in _SHAPES:
        numbers, options = _SHAPES[name]
    else:
        raise unknown("shape", name, [*SHAPES, "LAYERSxHIDDENxINNERxHEADSxKVHEADSxVOCAB"])
    return _llama(*numbers, **options)


def _windows(config: Any) -> tuple[int | None, ...]:
    """As `backbone.probe` finds them."""
    window, length = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", 0) or 0
    if window is not None and length and window >= length:
        window = None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


# ---------------------------------------------------------------------- cards


@dataclass(frozen=True)
class Card:
    """What a device holds and how fast it is: bytes, bytes per second, FLOP per second of dense bf16 matmuls."""

    name: str
    memory: int
    bandwidth: float
    flops: float
    source: str


def _sheet(name: str, gigabytes: float, terabytes: float, teraflops: float) -> Card:
    return Card(
        name, int(gigabytes * 10**9), ATTAINED_BANDWIDTH * terabytes * 1e12, ATTAINED_FLOPS * teraflops * 1e12,
        f"{ATTAINED_BANDWIDTH:g} x {terabytes:g} TB/s and {ATTAINED_FLOPS:g} x {teraflops:g} TFLOP/s of its data sheet",
    )  # fmt: skip


# data sheets: dense bf16 with fp32 accumulation
_CARDS = {card.name: card for card in (
    _sheet("h200", 141, 4.8, 989), _sheet("h100", 80, 3.35, 989), _sheet("a100-80gb", 80, 2.04, 312),
    _sheet("a100-40gb", 40, 1.555, 312), _sheet("l40s", 48, 0.864, 362), _sheet("rtx-5090", 32, 1.79, 210),
    _sheet("rtx-4090", 24, 1.008, 165), _sheet("rtx-3090", 24, 0.936, 71),
)}  # fmt: skip
CARDS = tuple(_CARDS)


def get_card(
    name: str, *, memory: int | None = None, bandwidth: float | None = None, flops: float | None = None
) -> Card:
    """A card of the table, with what the caller knows better (taken as it is, not scaled)."""
    if name not in _CARDS:
        raise unknown("card", name, CARDS)
    named = {"memory": memory, "bandwidth": bandwidth, "flops": flops}
    given = {key: value for key, value in named.items() if value is not None}
    for key, value in given.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{key} is {value}; it must be positive")
    card = dataclasses.replace(_CARDS[name], **given)  # type: ignore[arg-type]
    return dataclasses.replace(card, source=f"{card.source}; given: {', '.join(given)}") if given else card


# ---------------------------------------------------------------------- bytes and FLOP of one sequence


@dataclass(frozen=True)
class Footprint:
    """One sequence's cache, as `Reader.start` allocates it.

    Attributes:
        slabs: bytes of the kept units, metadata included: `Stats.kv_bytes`.
        workspace: one layer's units with a chunk behind them; one for all sequences.
        scratch: that layer's rotated keys, and what a codec unpacks for its turn.
        rope: rotation tables.
        units: per layer, the most units that it holds between two passes.
        room: per layer, the units that its slab has room for.
        chunks: the prompt's, in tokens.
        token: bytes of activations that a token of a chunk takes: `Reader.token_bytes`.
        layer: what a layer's turn takes on a GPU however short the chunk is: `Reader.layer_bytes`.
    """

    plan: CachePlan
    slabs: int
    workspace: int
    scratch: int
    rope: int
    units: tuple[int, ...]
    room: tuple[int, ...]
    chunks: tuple[int, ...]
    token: int
    layer: int

    @property
    def peak(self) -> int:
        """`Stats.peak_kv_bytes`."""
        return self.slabs + self.workspace + self.scratch


def footprint(
    shape: Shape, method: Method, config: CacheConfig, *, prompt_len: int, new_tokens: int | None, dtype: torch.dtype,
    num_protected: int = 0, most_chunk: int = LARGEST_CHUNK,
) -> Footprint:  # fmt: skip
    """What a prompt of `prompt_len` tokens and an answer of at most `new_tokens` take.

    most_chunk: as for `Reader.start`; as it is, chunks of the default size fit.
    Not counted: a second look at attention (methods that score cached units again), and heads that keep different
    numbers of units are taken to keep the same.
    Raises: ConfigError: the options do not go together; the message of the engine itself.
    """
    reader = _allocate(shape, method, config, prompt_len, new_tokens, dtype, num_protected, most_chunk)
    total = prompt_len + (new_tokens or 1)
    full = reader.plan.budget is None
    units = tuple(
        total if window is None and full else window - 1 if window is not None else min(budget, total)
        for window, budget in zip(shape.windows, reader.budgets, strict=True)
    )
    room = tuple(
        held if full or window is not None else min(held + spare_units(method), total)
        for held, window in zip(units, shape.windows, strict=True)
    )
    edges = reader.edges(prompt_len, min(reader.plan.local_window, prompt_len))
    coded = config.storage != "dense"
    joins = reader.cache.joins or method.ragged or any(layer.ages for layer in reader.cache.layers)
    joined = max(
        _most_rotated(held, total if joins or window is not None else slots, edges, total)
        for held, slots, window in set(zip(units, room, shape.windows, strict=True))
    )
    stores = _stores(shape, config.storage, dtype)
    numbers = 2 * shape.head_dim * dtype.itemsize
    budgeted = {held for held, window in zip(units, shape.windows, strict=True) if window is None}
    each = shape.num_kv_heads * (
        numbers // 2  # rotated keys
        + (numbers + _unit(shape, method, dtype, stores) if coded and joins else 0)
        + (_unit(shape, method, dtype, stores) if method.ragged and not coded else 0)
    )
    beside = 0
    if not joins and coded:
        beside = shape.num_kv_heads * max(
            (_coded_beside(shape, method, dtype, stores, held, slots, edges, total)
             for held, slots, window in set(zip(units, room, shape.windows, strict=True)) if window is None),
            default=0,
        )  # fmt: skip
    elif not reader.cache.joins:
        beside = _moved(budgeted, edges, total) * shape.num_kv_heads * numbers // 2
    waiting = max(fixed_bytes(store, shape.head_dim, dtype) for store in stores)  # and a chunk that is not encoded yet
    scratch = joined * each + shape.num_kv_heads * (waiting + (reader.cache.chunk_size * numbers if waiting else 0))
    reach = max(units) + reader.cache.chunk_size + 1 if reader.plan.positions == "compact" else total + 1
    return Footprint(
        plan=reader.plan, slabs=_slabs(shape, method, reader, stores, dtype), workspace=reader.cache.workspace_bytes,
        scratch=max(scratch, beside),
        rope=2 * reach * shape.head_dim * dtype.itemsize, units=units, room=room,
        chunks=tuple(stop - start for start, stop in itertools.pairwise(edges)),
        token=reader.token_bytes, layer=reader.layer_bytes,
    )  # fmt: skip


def _allocate(
    shape: Shape, method: Method, config: CacheConfig, prompt_len: int, new_tokens: int | None, dtype: torch.dtype,
    num_protected: int, most_chunk: int,
) -> Reader:  # fmt: skip
    """The engine's own allocation, on a device that has no memory."""
    stand_in: Any = SimpleNamespace(
        layers=[LayerSpec(True, window, None) for window in shape.windows], num_kv_heads=shape.num_kv_heads,
        num_q_heads=shape.num_q_heads, num_layers=shape.num_layers, head_dim=shape.head_dim, dtype=dtype,
        calls=[AttentionCall(1.0, shape.softcap, None)], attention_modules=None,
        device=torch.device("meta"), rope=lambda length, prompt_len: None,
        model=SimpleNamespace(config=SimpleNamespace(
            max_position_embeddings=shape.max_length, hidden_size=shape.hidden_size,
            intermediate_size=shape.mlp_width or shape.intermediate_size, vocab_size=shape.vocab_size,
        )),
    )  # fmt: skip
    return Reader.start(
        cast(Backbone, stand_in), method, config, batch=1, prompt_len=prompt_len, new_tokens=new_tokens,
        num_protected=num_protected, most_chunk=most_chunk,
    )  # fmt: skip


def _stores(shape: Shape, storage: str, dtype: torch.dtype) -> list[Store]:
    """Of a model without weights, as `_allocate` has them."""
    stand_in: Any = SimpleNamespace(
        num_kv_heads=shape.num_kv_heads, num_layers=shape.num_layers, head_dim=shape.head_dim, dtype=dtype,
        device=torch.device("meta"), attention_modules=None,
    )  # fmt: skip
    return layer_stores(storage, cast(Backbone, stand_in))


def _unit(shape: Shape, method: Method, dtype: torch.dtype, stores: list[Store]) -> int:
    """Of the layer where a unit takes most."""
    return max(unit_bytes(shape.head_dim, dtype, len(method.state), store) for store in stores)


def _slabs(shape: Shape, method: Method, reader: Reader, stores: list[Store], dtype: torch.dtype) -> int:
    """The cache as allocated and, where a store has tables that grow (`tail`), the most that they can come to."""
    total = reader.cache.nbytes
    for layer, store in zip(reader.cache.layers, stores, strict=True):
        most = layer.slab.tensors()["score"].numel() * unit_bytes(shape.head_dim, dtype, len(method.state), store)
        most += shape.num_kv_heads * fixed_bytes(store, shape.head_dim, dtype)
        total += max(0, most - layer.slab.nbytes)
    return total


def _most_rotated(capacity: int, room: int, edges: list[int], total: int) -> int:
    """Units whose rotated keys lie in scratch at the moment when a layer has most of them.

    room: with more than so many, a chunk stays beside the slab, and the keys of one part are rotated at a time.
    """

    def rotated(old: int, new: int) -> int:
        return old + new if old + new <= room else max(old, new)

    return max(rotated(old, new) for old, new in _passes(capacity, edges, total))


def _passes(capacity: int, edges: list[int], total: int) -> list[tuple[int, int]]:
    """Held units and new ones of every chunk, and of the last decode step."""
    chunks = [(min(start, capacity), stop - start) for start, stop in itertools.pairwise(edges)]
    return [*chunks, (min(total - 2, capacity), 1)]


def _coded_beside(
    shape: Shape, method: Method, dtype: torch.dtype, stores: list[Store], capacity: int, room: int, edges: list[int],
    total: int,
) -> int:  # fmt: skip
    """The most bytes that a KV head needs beside its slab of codes.

    With a chunk that it has room for: all units as stored and decoded, and rotated keys. With any other: the held units
    decoded, keys of one part rotated, and the chunk's codes; or these and what moves when units have been chosen.
    """
    number = shape.head_dim * dtype.itemsize
    found = [0]
    for old, new in _passes(capacity, edges, total):
        for store in stores:
            if old + new <= room:
                unit = unit_bytes(shape.head_dim, dtype, len(method.state), store)
                found.append((old + new) * (3 * number + unit))
                continue
            codes = new * stored_bytes(store, shape.head_dim, dtype)
            widest = max(8, 4 * len(method.state), widest_part(store, shape.head_dim, dtype))  # 8: positions
            found += [2 * old * number + max(old, new) * number + codes, (old + new + capacity) * widest + codes]
    return max(found)


def _moved(capacities: set[int], edges: list[int], total: int) -> int:
    """Units that lie in scratch when a layer moves those that stay: all there are, and the ones that stay."""
    found = [0]
    for capacity in capacities:
        joined = [min(start, capacity) + stop - start for start, stop in itertools.pairwise(edges)]
        joined.append(min(total - 1, capacity) + 1)
        found += [count + capacity for count in joined if count > capacity]
    return max(found)


@dataclass(frozen=True)
class Work:
    """FLOP and bytes moved, of things that run one after the other."""

    parts: tuple[tuple[float, float], ...]

    def seconds(self, card: Card) -> float:
        """The roofline's bound."""
        return sum(max(flop / card.flops, moved / card.bandwidth) for flop, moved in self.parts)

    @property
    def flop(self) -> float:
        return sum(flop for flop, _ in self.parts)

    @property
    def bytes(self) -> float:
        return sum(moved for _, moved in self.parts)


def prefill_work(shape: Shape, one: Footprint, method: Method, dtype: torch.dtype) -> Work:
    """Reading the prompt, chunk by chunk."""
    heads = shape.heads_parameters if method.name == "locret" else 0
    weights = (shape.matmul + heads) * dtype.itemsize
    parts, read = [], 0
    for chunk in one.chunks:
        seen = sum(min(read, held) + (chunk + 1) / 2 for held in one.units)
        flop = 2 * chunk * (shape.matmul + heads) + 4 * chunk * shape.num_q_heads * shape.head_dim * seen
        moved = sum(min(read, held) for held in one.units) * _kv(shape, one.plan.storage, dtype)
        parts.append((flop, weights + moved))
        read += chunk
    return Work(tuple(parts))


def decode_work(shape: Shape, one: Footprint, dtype: torch.dtype, *, rows: int, prompt_len: int) -> Work:
    """One step of `rows` sequences, each behind such a prompt; weights are read once."""
    weights = (shape.matmul + shape.output) * dtype.itemsize
    held = sum(min(prompt_len + 1, units) for units in one.units)
    flop = 2 * rows * (shape.matmul + shape.output) + 4 * rows * shape.num_q_heads * shape.head_dim * held
    return Work(((flop, weights + rows * held * _kv(shape, one.plan.storage, dtype)),))


def _kv(shape: Shape, storage: str, dtype: torch.dtype) -> int:
    """Bytes of K and V of one unit in all KV heads of a layer, on average over layers."""
    stores = _stores(shape, storage, dtype)
    return shape.num_kv_heads * sum(stored_bytes(store, shape.head_dim, dtype) for store in stores) // len(stores)


# ---------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Item:
    """One line of the memory: its name, bytes, and how they come about."""

    name: str
    bytes: int
    arithmetic: str


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found."""

    shape: Shape
    card: Card
    method: str
    dtype: str
    storage: str
    context: int
    new_tokens: int
    users: int
    budget: int | None
    chunk_size: int
    items: tuple[Item, ...]
    full_cache_bytes: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def kv_bytes(self) -> int:
        """Slabs and rotation tables of one user."""
        return self.items[1].bytes // self.users

    @property
    def peak_bytes(self) -> int:
        return sum(item.bytes for item in self.items)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.card.memory

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "model": self.shape.name, "parameters": self.shape.parameters, "card": dataclasses.asdict(self.card),
            "method": self.method, "dtype": self.dtype, "storage": self.storage, "context": self.context,
            "new_tokens": self.new_tokens, "users": self.users, "budget": self.budget, "chunk_size": self.chunk_size,
            "kv_bytes": self.kv_bytes, "kv_bytes_full": self.full_cache_bytes, "peak_bytes": self.peak_bytes,
            "fits": self.fits, "free_bytes": self.card.memory - self.peak_bytes,
            "items": [dataclasses.asdict(item) for item in self.items],
            "prefill_seconds": self.prefill_seconds, "prefill_tokens_per_second": self.context / self.prefill_seconds,
            "decode_seconds": self.decode_seconds, "decode_tokens_per_second": self.users / self.decode_seconds,
        }  # fmt: skip


def make_plan(
    shape: Shape, card: Card, *, context: int, users: int = 1, new_tokens: int = 256, method: str = "locret",
    dtype: str = "bfloat16", budget: int | str | None = None, **cache_options: Any,
) -> Plan:  # fmt: skip
    """The plan for `users` sequences of `context` tokens at once, prompts read one chunk at a time.

    Args:
        budget: as in `CacheConfig`; None: the most units that fit the card beside chunks of the default size, or, where
            none do, beside shorter ones.
        **cache_options: the other fields of `CacheConfig`.
    Raises: ConfigError: a number or a name that cannot be used.
    """
    for name, value in (("context", context), ("users", users), ("new_tokens", new_tokens)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)

    def of(budget: int | str, *, shorten: bool = True) -> Plan:
        config = CacheConfig.from_dict({**cache_options, "budget": budget})
        return _plan(shape, card, stand_in_method(method), config, context, users, new_tokens, dtype, shorten)

    def largest(*, shorten: bool) -> Plan:
        def holds(budget: int) -> Plan | None:
            """None: less than what is pinned."""
            try:
                return of(budget, shorten=shorten)
            except ConfigError:
                return None

        low, high = 0, context + new_tokens  # a larger budget than that holds nothing more
        best, plan = None, holds(high) or of(max(high, _PLENTY), shorten=shorten)
        if plan.fits:
            return plan
        while high - low > 1:
            middle = (low + high) // 2
            found = holds(middle)
            if found is not None and not found.fits:
                high, plan = middle, found
            else:
                low, best = middle, found or best
        return best or plan

    if budget is not None:
        return of(budget)
    plan = largest(shorten=False)  # with short chunks a few more units would fit, and prompts would be slow
    return plan if plan.fits else largest(shorten=True)


_PLENTY = 4096  # units: more than what is pinned by default, for prompts that are shorter than that


def stand_in_method(name: str) -> Method:
    """A method for its bytes and budgets: one that needs weights comes without them."""
    cls = find_method(name)
    try:
        return cls()
    except (TypeError, ConfigError, HeadsError):
        return cls.__new__(cls)


def _plan(
    shape: Shape, card: Card, method: Method, config: CacheConfig, context: int, users: int, new_tokens: int,
    dtype: str, shorten: bool,
) -> Plan:  # fmt: skip
    """shorten: chunks where they do not fit otherwise, as a run on the card does."""
    kind = DTYPES[dtype]
    size = kind.itemsize
    heads = shape.heads_parameters if method.name == "locret" else 0
    weights, logits = (shape.parameters + heads) * size, 6 * users * shape.vocab_size

    def of(most: int) -> Footprint:
        return footprint(shape, method, config, prompt_len=context, new_tokens=new_tokens, dtype=kind, most_chunk=most)

    one = of(LARGEST_CHUNK)
    if shorten:
        scratch = max(one.scratch, one.layer)
        others = weights + users * (one.slabs + one.rope) + one.workspace + scratch + logits + RUNTIME_BYTES
        one = of(longest_chunk(card.memory - others, one.token, min(one.plan.chunk_size, context + new_tokens)))
    chunk = max(one.chunks)
    stores = _stores(shape, config.storage, kind)
    units = [unit_bytes(shape.head_dim, kind, len(method.state), store) for store in stores]
    dense = _unit(shape, method, kind, _stores(shape, "dense", kind))
    kept = f"{sum(units) / len(units):g} B a unit" + (
        ", and the newest as they are; at most" if any(fixed_bytes(x, shape.head_dim, kind) for x in stores) else ""
    )
    widest = max(one.units)
    items = (
        Item("weights", weights,
             f"{shape.parameters:,} parameters" + (f" + {heads:,} of retaining heads" if heads else "")
             + f" x {size} B"),
        Item("KV cache", users * (one.slabs + one.rope),
             f"{users:,} users x ({_units_text(one.room)} units x {shape.num_kv_heads} KV heads x {kept} "
             f"= {one.slabs:,}, + rotation tables {one.rope:,})"),
        Item("workspace", one.workspace,
             f"({widest:,} units + chunk {chunk:,}) x {shape.num_kv_heads} KV heads x {dense} B, one for all layers"
             if one.workspace else "none: units are joined in scratch"),
        Item("scratch", max(one.scratch, one.layer), "rotated keys of one layer" + (
            "" if config.storage == "dense" else f", and its {config.storage} units unpacked")
             + ("; a second look at attention, at most 32 MiB, comes on top" if method.rescoring else "")),
        Item("activations", chunk * one.token + logits, f"estimate: chunk {chunk:,} x {one.token:,} B, and logits"),
        Item("runtime", RUNTIME_BYTES, "estimate: CUDA context, libraries' workspaces and the allocator's slack"),
    )  # fmt: skip
    full = sum(context + new_tokens if w is None else min(context + new_tokens, w) for w in shape.windows)
    return Plan(
        shape, card, method.name, dtype, config.storage, context, new_tokens, users, one.plan.budget,
        one.plan.chunk_size, items, full * shape.num_kv_heads * 2 * shape.head_dim * size,
        prefill_work(shape, one, method, kind).seconds(card),
        decode_work(shape, one, kind, rows=users, prompt_len=context).seconds(card),
    )  # fmt: skip


def _units_text(units: tuple[int, ...]) -> str:
    """ "32 layers x 6,000" or, where layers differ, the sum."""
    if len(set(units)) == 1:
        return f"{len(units)} layers x {units[0]:,}"
    return f"{len(units)} layers, together {sum(units):,}"
