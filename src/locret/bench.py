"""Latency, throughput and memory of locret beside transformers' full cache and beside the floor, in one process.

The floor is the roofline of `plan` with the best copy bandwidth and matmul rate that this process measures, before and
after the rest, so a share of the floor says how much is left to win on this machine, now. Repeats of the engines
alternate; numbers are medians with the least and the most.

    TTFT  from the call to the first token on the host, the cache's allocation included
    TPOT  seconds per decode step of the whole batch, each token read back to the host while the next is computed

Batches larger than 1 decode from copies of one row that has read the prompt.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import platform
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache

import locret
from locret.backbone import Backbone
from locret.cache import out_of_memory
from locret.config import CacheConfig
from locret.engine import LLM
from locret.errors import ConfigError
from locret.evaluate.machine import commit
from locret.heads import HeadsConfig, RetainingHeads
from locret.methods import Method, get_method
from locret.plan import DTYPES, Card, Footprint, Shape, decode_work, footprint, prefill_work, shape_config
from locret.prefill import Reader
from locret.sampling import likeliest, read_back

BAR_LENGTH, BAR = 32_768, 2.0  # issue 4: embedded model on a CPU, tokens and least ratio to transformers
_COPY_BYTES = {"cpu": 2**26, "cuda": 2**30}
OnCase = Callable[[str], object]


@dataclass(frozen=True)
class Spread:
    """Of repeated measurements, in seconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One engine at one length and batch.

    Attributes:
        ttft: at batch 1; other batches are copies.
        peak_bytes: most GPU memory that tensors took, weights included; on a CPU the process's peak resident size.
        kv_bytes: of the cache, all rows.
        failed: why there are no numbers.
    """

    engine: str
    length: int
    batch: int
    ttft: Spread | None = None
    ttft_floor: float | None = None
    tpot: Spread | None = None
    tpot_floor: float | None = None
    peak_bytes: int | None = None
    kv_bytes: int = 0
    failed: str = ""

    def to_dict(self) -> dict[str, Any]:
        """With rates and shares of the floor."""
        values = dataclasses.asdict(self)
        if self.ttft is not None and self.ttft_floor is not None:
            values["prefill_tokens_per_second"] = self.length / self.ttft.median
            values["prefill_of_floor"] = self.ttft_floor / self.ttft.median
        if self.tpot is not None and self.tpot_floor is not None:
            values["decode_tokens_per_second"] = self.batch / self.tpot.median
            values["decode_of_floor"] = self.tpot_floor / self.tpot.median
        return values


@dataclass(frozen=True)
class Report:
    """What `run` measured. `settings` also says which peers there were, and why any was left out."""

    machine: dict[str, Any]
    card: Card
    settings: dict[str, Any]
    rows: list[Row]

    def ratios(self) -> list[dict[str, Any]]:
        """Every peer's seconds over locret's, at each length and batch where both were measured."""
        mine = {(row.length, row.batch): row for row in self.rows if row.engine == "locret"}
        found = []
        for theirs in self.rows:
            own = mine.get((theirs.length, theirs.batch))
            if theirs.engine != "locret" and own is not None:
                ttft, tpot = (_ratio(getattr(theirs, name), getattr(own, name)) for name in ("ttft", "tpot"))
                found.append({"peer": theirs.engine, "length": theirs.length, "batch": theirs.batch, "ttft": ttft,
                              "tpot": tpot, "failed": theirs.failed})  # fmt: skip
        return found

    def bar(self) -> str | None:
        """Issue 4's bar for the embedded model on a CPU, where this run can say something about it."""
        cases = [r for r in self.ratios() if r["peer"] == _Full.name and r["length"] == BAR_LENGTH]
        at = [r["ttft"] for r in cases if r["ttft"] is not None]
        if not at or self.machine["device"] != "cpu" or not self.settings["embedded"]:
            return None
        verdict = "met" if at[0] >= BAR else "missed"
        return f"bar: {BAR_LENGTH:,} tokens >= {BAR:g}x transformers' full cache on a CPU; {at[0]:.2f}x: {verdict}"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "machine": self.machine, "card": dataclasses.asdict(self.card), "settings": self.settings,
            "rows": [row.to_dict() for row in self.rows], "ratios": self.ratios(), "bar": self.bar(),
        }  # fmt: skip


def random_llm(shape: str, *, device: str, dtype: str, method: str, config: CacheConfig) -> LLM:
    """A model of a named shape (`plan.SHAPES`) with random weights and heads: speed does not depend on them."""
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    kind = DTYPES.get(dtype, torch.bfloat16 if where.type == "cuda" else torch.float32)
    with torch.device(where):
        model: Any = AutoModelForCausalLM.from_config(shape_config(shape), dtype=kind)
    backbone = Backbone(model.eval().requires_grad_(False))
    heads = RetainingHeads(HeadsConfig.of(backbone)) if method == "locret" else None
    return LLM.build(backbone, heads=heads, method=method, config=config)


def run(
    llm: LLM, *, lengths: Sequence[int], batches: Sequence[int] = (1,), new_tokens: int = 16, repeats: int = 3,
    peers: bool = True, embedded: bool = False, on_case: OnCase = lambda _: None,
) -> Report:  # fmt: skip
    """Measure.

    Args:
        peers: also transformers' full cache on the same weights, with its sdpa attention as shipped and held to cuDNN's
            kernel (where there is one).
        embedded: the model is the one that ships with locret; only then `Report.bar` speaks.
        on_case: told what is run next.
    Raises: ConfigError: a number that is not at least 1.
    """
    numbers = (("length", lengths), ("batch", batches), ("new_tokens", [new_tokens]), ("repeats", [repeats]))
    for name, values in numbers:
        if not values or min(values) < 1:
            raise ConfigError(f"{name} is {', '.join(map(str, values)) or 'empty'}; it must be at least 1")
    shape, batches = Shape.of_backbone(llm.backbone), sorted(set(batches), reverse=True)
    on_case("copy bandwidth and matmul rate")
    before = measure_card(llm.backbone, shape, llm.config)
    missing = _without_cudnn(llm.backbone, batches)
    others: list[_Engine] = []
    if peers:
        others = [_Full(llm, shape)] if missing else [_Full(llm, shape), _Cudnn(llm, shape)]
    engines: list[_Engine] = [_Locret(llm, shape), *others]
    cases: list[tuple[_Engine, int, list[_Run]]] = []
    with torch.inference_mode():
        for engine in engines:
            _case(engine, _ids(llm, min(*lengths, 512)), [1], 2)  # warms up
        for length in sorted(set(lengths)):
            runs: list[list[_Run]] = [[] for _ in engines]
            for repeat in range(repeats):
                for engine, found in zip(engines, runs, strict=True):
                    on_case(f"{engine.name}, {length:,} tokens, {repeat + 1} of {repeats}")
                    found.append(_case(engine, _ids(llm, length), engine.rows(batches), new_tokens))
            cases += [(engine, length, found) for engine, found in zip(engines, runs, strict=True)]
    card = _faster(before, measure_card(llm.backbone, shape, llm.config))
    rows = [row for engine, length, found in cases for row in _rows(engine, found, card, length, batches, new_tokens)]
    settings = {
        "model": shape.name, "embedded": embedded, "method": llm.method.name, **dataclasses.asdict(llm.config),
        "dtype": str(llm.backbone.dtype).removeprefix("torch."), "new_tokens": new_tokens, "repeats": repeats,
        "peers": [engine.name for engine in others], "left_out": {_Cudnn.name: missing} if peers and missing else {},
    }  # fmt: skip
    return Report(_machine(llm.backbone), card, settings, rows)


def measure_card(backbone: Backbone, shape: Shape, config: CacheConfig) -> Card:
    """Copy bandwidth (bytes read and written) and the rate of a chunk's largest matmul, in the model's dtype."""
    device, dtype = backbone.device, backbone.dtype
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copying = _least_seconds(lambda: target.copy_(source), device)
    rows = config.chunk_size or 3072
    x = torch.randn(rows, shape.hidden_size, device=device, dtype=dtype)
    w = torch.randn(shape.intermediate_size, shape.hidden_size, device=device, dtype=dtype)
    multiplying = _least_seconds(lambda: x @ w.T, device)
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0
    flop = 2.0 * rows * shape.hidden_size * shape.intermediate_size
    return Card(str(device), memory, 2 * source.nbytes / copying, flop / multiplying, "measured in this run")


# ---------------------------------------------------------------------- one measurement


@dataclass
class _Run:
    """One repeat: seconds, and per batch seconds a step, bytes, or why not."""

    ttft: float | None = None
    tpot: dict[int, float] = field(default_factory=dict)
    peak: dict[int, int | None] = field(default_factory=dict)
    kv: dict[int, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


class _Engine(ABC):
    name: str
    refusals: tuple[str, ...] = ()  # what torch says where the kernel that it is held to does not take the model

    def __init__(self, llm: LLM, shape: Shape) -> None:
        self.llm, self.shape = llm, shape
        self.method, self.config = self.cached()

    def cached(self) -> tuple[Method, CacheConfig]:
        """What its cache is, for the floor."""
        return self.llm.method, self.llm.config

    def rows(self, batches: Sequence[int]) -> Sequence[int]:
        """The batches that it decodes, of those that are asked for."""
        return batches

    @abstractmethod
    def start(self, ids: Tensor, new_tokens: int) -> Tensor:
        """Read [1, T] from nothing; the logits of the last token, [1, V]."""

    @abstractmethod
    def grow(self, batch: int) -> None:
        """Go on with copies of what was read; for batch 1 with itself, and then nothing is left to copy."""

    @abstractmethod
    def shrink(self) -> None:
        """Let go of the copies of the last `grow`."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Tokens [B] to logits [B, V]."""

    @abstractmethod
    def kv_bytes(self) -> int:
        """Of the cache as allocated."""

    @abstractmethod
    def stop(self) -> None:
        """Let go of all memory."""

    def footprint(self, length: int, new_tokens: int) -> Footprint:
        return footprint(self.shape, self.method, self.config, prompt_len=length, new_tokens=new_tokens,
                         dtype=self.llm.backbone.dtype)  # fmt: skip


class _Locret(_Engine):
    name = "locret"
    _read: Reader | None = None
    _reader: Reader | None = None

    def start(self, ids: Tensor, new_tokens: int) -> Tensor:
        llm = self.llm
        self._read = Reader.start(llm.backbone, llm.method, llm.config, batch=1, prompt_len=ids.shape[1],
                                  new_tokens=new_tokens)  # fmt: skip
        return self._read.read(ids)

    def grow(self, batch: int) -> None:
        assert self._read is not None
        self._reader = self._read
        if batch > 1:
            rows = torch.zeros(batch, dtype=torch.int64, device=self.llm.backbone.device)
            last = self._read.last_logits
            self._reader = dataclasses.replace(
                self._read, cache=self._read.cache.rows(rows), last_logits=None if last is None else last[rows]
            )

    def shrink(self) -> None:
        self._reader = None

    def step(self, tokens: Tensor) -> Tensor:
        assert self._reader is not None
        return self._reader.step(tokens)

    def kv_bytes(self) -> int:
        return 0 if self._reader is None else self._reader.cache.nbytes

    def stop(self) -> None:
        self._read = self._reader = None


class _Full(_Engine):
    """transformers as shipped: one forward pass over the prompt, a DynamicCache, sdpa."""

    name = "transformers"
    _read: Any = None
    _cache: Any = None

    def start(self, ids: Tensor, new_tokens: int) -> Tensor:
        self.llm.backbone.model.set_attn_implementation("sdpa")
        self._read = DynamicCache(config=self.llm.backbone.model.config)
        return self._forward(ids.to(self.llm.backbone.device), self._read)

    def grow(self, batch: int) -> None:
        self._cache = self._read
        if batch > 1:
            self._cache = copy.deepcopy(self._read)
            self._cache.batch_repeat_interleave(batch)

    def shrink(self) -> None:
        self._cache = None

    def step(self, tokens: Tensor) -> Tensor:
        return self._forward(tokens[:, None], self._cache)

    def _forward(self, ids: Tensor, cache: Any) -> Tensor:
        return self.llm.backbone.model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]  # fmt: skip

    def kv_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)

    def stop(self) -> None:
        self._read = self._cache = None

    def cached(self) -> tuple[Method, CacheConfig]:
        return get_method("full"), CacheConfig(chunk_size=self.llm.config.chunk_size)


class _Cudnn(_Full):
    """The same with sdpa held to cuDNN's kernel while it reads the prompt, and to any other in steps: every step is one
    key longer, and cuDNN plans anew for every length, which takes longer than the step.

    Decodes batch 1 only: there the kernel hardly matters, and time is short.
    """

    name = "transformers-cudnn"
    refusals = ("No available kernel", "No viable backend", "cuDNN Frontend error")

    def rows(self, batches: Sequence[int]) -> Sequence[int]:
        return [1] if 1 in batches else []

    def _forward(self, ids: Tensor, cache: Any) -> Tensor:
        others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION] if ids.shape[1] > 1 else others):
            return super()._forward(ids, cache)


def _without_cudnn(backbone: Backbone, batches: Sequence[int]) -> str:
    """Why `_Cudnn` cannot be measured here; empty if it can."""
    if backbone.device.type != "cuda" or not torch.backends.cudnn.is_available():
        return "cuDNN needs a CUDA device"
    if backbone.dtype not in (torch.bfloat16, torch.float16):
        return "cuDNN's attention takes bfloat16 and float16"
    return "" if 1 in batches else "it decodes batch 1 only"


def _case(engine: _Engine, ids: Tensor, batches: Sequence[int], new_tokens: int) -> _Run:
    """One prompt and, from it, one answer at every batch, the largest first."""
    device, run = engine.llm.backbone.device, _Run()
    gc.collect()
    _reset_peak(device)
    try:
        started = time.perf_counter()
        first = engine.start(ids, new_tokens).argmax(-1)
        first.tolist()
        run.ttft = time.perf_counter() - started
        prefill_peak = _peak(device)
        for batch in batches:
            engine.shrink()  # before the peak starts anew: a smaller batch does not pay for a larger one
            _reset_peak(device)
            try:
                engine.grow(batch)
                run.tpot[batch] = _decode(engine, first.expand(batch).contiguous(), new_tokens)
                run.kv[batch] = engine.kv_bytes()
                peaks = [p for p in (_peak(device), prefill_peak if batch == 1 else None) if p is not None]
                run.peak[batch] = max(peaks, default=None)
            except Exception as error:
                run.failed[batch] = _reason(engine, error)
    except Exception as error:
        run.failed = dict.fromkeys(batches, _reason(engine, error))
    finally:
        engine.stop()
    return run


def _reason(engine: _Engine, error: Exception) -> str:
    """Why there are no numbers. Raises: the error, if it is no result but a fault."""
    if out_of_memory(error):
        return "out of memory"
    if any(said in str(error) for said in engine.refusals):
        return "cuDNN does not take this model's attention"
    raise error


def _decode(engine: _Engine, tokens: Tensor, new_tokens: int) -> float:
    """Seconds a step; the first token came with the prompt. The host reads a token while the next is computed."""
    steps = max(1, new_tokens - 1)
    started = time.perf_counter()
    for _ in range(steps):
        wait = read_back(tokens)
        tokens = likeliest(engine.step(tokens))
        wait()
    tokens.tolist()
    return (time.perf_counter() - started) / steps


def _rows(
    engine: _Engine, runs: list[_Run], card: Card, length: int, batches: Sequence[int], new_tokens: int
) -> list[Row]:
    one, dtype = engine.footprint(length, new_tokens), engine.llm.backbone.dtype
    rows = []
    for batch in sorted(engine.rows(batches)):
        tpot = [r.tpot[batch] for r in runs if batch in r.tpot]
        ttft = [r.ttft for r in runs if r.ttft is not None] if batch == 1 else []
        peaks = [p for r in runs if (p := r.peak.get(batch)) is not None]
        failed = next((r.failed[batch] for r in runs if batch in r.failed), "")
        rows.append(Row(
            engine.name, length, batch,
            ttft=Spread.of(ttft) if ttft else None,
            ttft_floor=prefill_work(engine.shape, one, engine.method, dtype).seconds(card) if batch == 1 else None,
            tpot=Spread.of(tpot) if tpot else None,
            tpot_floor=decode_work(engine.shape, one, dtype, rows=batch, prompt_len=length).seconds(card),
            peak_bytes=max(peaks, default=None), kv_bytes=max((r.kv.get(batch, 0) for r in runs), default=0),
            failed=failed,
        ))  # fmt: skip
    return rows


def _ids(llm: LLM, length: int) -> Tensor:
    """Random tokens, the same ones at every call."""
    generator = torch.Generator().manual_seed(length)
    vocab = llm.backbone.model.config.vocab_size
    return torch.randint(0, vocab, (1, length), generator=generator)


def _ratio(theirs: Spread | None, mine: Spread | None) -> float | None:
    return None if theirs is None or mine is None else theirs.median / mine.median


def _faster(a: Card, b: Card) -> Card:
    """A floor is what the machine can do: on a busy one, the better of two looks."""
    return dataclasses.replace(a, bandwidth=max(a.bandwidth, b.bandwidth), flops=max(a.flops, b.flops))


def _least_seconds(call: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    times = []
    for i in range(repeats + 2):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        if i >= 2:
            times.append(time.perf_counter() - started)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again at what is resident now
    except OSError:
        return


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else None


def _machine(backbone: Backbone) -> dict[str, Any]:
    device = backbone.device
    return {
        "device": device.type, "threads": torch.get_num_threads(),
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__, "transformers": transformers.__version__, "locret": locret.__version__,
        "python": platform.python_version(), "commit": commit(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


# ---------------------------------------------------------------------- the plot


def svg(report: Report) -> str:
    """TTFT at batch 1 and TPOT of every batch over the prompt's length, both axes logarithmic; dashed: the floor."""
    panels = [_panel(report, "ttft", 0, "seconds to the first token"), _panel(report, "tpot", 430, "seconds a step")]
    title = f"{report.settings['model']}, {report.settings['method']}, {report.machine['name']}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="860" height="340" font-family="sans-serif" font-size="12">'
        f'<rect width="860" height="340" fill="white"/><text x="20" y="20">{_escape(title)}</text>'
        + "".join(panels) + "</svg>\n"
    )  # fmt: skip


_COLOURS = {"locret": "#0b6e4f", "transformers": "#b5482a", "transformers-cudnn": "#2a5db0"}
_LINE = 13  # pixels between two names


def _panel(report: Report, what: str, left: int, label: str) -> str:
    lines: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    for row in report.rows:
        value, floor = getattr(row, what), getattr(row, f"{what}_floor")
        if value is not None:
            lines.setdefault((row.engine, row.batch, ""), []).append((row.length, value.median))
            lines.setdefault((row.engine, row.batch, "floor"), []).append((row.length, floor))
    points = [p for line in lines.values() for p in line]
    if not points:
        return f'<text x="{left + 20}" y="60">no numbers: {label}</text>'
    across = _axis([x for x, _ in points], left + 60, left + 410)
    up = _axis([y for _, y in points], 300, 50)
    parts = [f'<text x="{left + 60}" y="42">{label}</text>']
    for low_high in (min(points)[0], max(points)[0]):
        parts.append(f'<text x="{across(low_high):.0f}" y="318" text-anchor="middle">{low_high:,.0f}</text>')
    for value in (min(y for _, y in points), max(y for _, y in points)):
        parts.append(f'<text x="{left + 54}" y="{up(value) + 4:.0f}" text-anchor="end">{value:.3g}</text>')
    names: list[tuple[float, float, str, int]] = []
    for (engine, batch, kind), line in lines.items():
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line)
        dash = ' stroke-dasharray="4 3" opacity="0.6"' if kind else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_COLOURS[engine]}" stroke-width="2"{dash}/>')
        if not kind:
            x, y = line[-1]
            names.append((up(y) - 6, across(x) - 4, engine, batch))
            parts += [
                f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{_COLOURS[engine]}"/>' for x, y in line
            ]
    free = 300.0
    for y, x, engine, batch in sorted(names, reverse=True):  # from below; lines that end close together push names up
        y = min(y, free)
        free = y - _LINE
        parts.append(f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="end" fill="{_COLOURS[engine]}">'
                     f"{engine}, batch {batch}</text>")  # fmt: skip
    return "".join(parts)


def _axis(values: Sequence[float], start: float, stop: float) -> Callable[[float], float]:
    """A logarithmic scale from numbers to pixels."""
    low, high = math.log(min(values)), math.log(max(values))
    return lambda value: start + (stop - start) * ((math.log(value) - low) / (high - low) if high > low else 0.5)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
