"""Every Triton kernel against its torch path on the device at hand: right, how fast, how near to the memory's speed.

    python benchmarks/kernel_speed.py --output benchmarks/results/kernels.json # a CUDA device; under a minute
    python benchmarks/kernel_speed.py --sweep prefill --output FILE  # instead: fused prefill kernels
    TRITON_INTERPRET=1 python benchmarks/kernel_speed.py --tiny  # does the script run? no timings

Llama-3.1-8B's attention: 32 query and 8 KV heads of 128 channels, bf16. Every call is captured in a CUDA graph, so that
Python's launches are not timed, and replayed after a write over the L2 cache, as 31 other layers would. `share` is the
bytes that must move, over the median, over the bandwidth that copying a gigabyte reaches here. `wins` is what
docs/kernels.md asks for before a kernel becomes the default: right, and faster than every torch path at every shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from common import provenance
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from locret.files import write_text
from locret.kernels.attention import PARTS, Part, prefix_causal_attention
from locret.kernels.choice import KERNELS, present
from locret.kernels.compact import Column, others, reference_compact, reference_kept
from locret.kernels.compact_triton import compact_triton, kept_triton
from locret.kernels.decode_attention import (
    EVERYTHING,
    Angles,
    Codes,
    Span,
    reference_decode_attention,
    torch_decode_attention,
)
from locret.kernels.decode_attention_triton import Tile, decode_attention_triton, default_tile
from locret.kernels.fill import reference_fill
from locret.kernels.fill_triton import fill_triton
from locret.storage import Affine

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SCALE = 128**-0.5
TOLERANCE = 1.5e-2  # of decode attention, relative to its largest value: bf16 rounds keys and weights to 8 bits
Run = Callable[[], Any]
Row = dict[str, Any]


# budgets in units that take the bytes of the largest one in bfloat16: codes alone, scales and zeros take a quarter more
EQUAL_BYTES = {"int8": 2, "int4": 4}
SWEEP = [(32, 4, 2), (32, 4, 4), (64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3), (128, 4, 2), (128, 8, 2), (128, 8, 3)]


CODES_SWEEP = [  # slots at once, slots of a program, warps, registers of a thread
    (64, None, 4, 168), (64, None, 4, 128), (64, 1024, 4, 128), (32, None, 2, 168), (32, None, 2, 144),
    (16, None, 1, 168), (16, None, 1, 144),  # one warp waits for no other
]  # fmt: skip


PREFILL = [  # head dim, query rows, prefix
    *((128, rows, 16_384) for rows in (256, 512, 1024, 2048, 3072, 8192)), (128, 3072, 6000),
    (64, 1024, 16_384), (64, 3072, 16_384), (256, 1024, 16_384), (256, 3072, 16_384),
]  # fmt: skip
FLEX = [(128, 1024, 16_384), (128, 3072, 16_384)]  # FlexAttention is compiled for each shape and part: these only


class Shape:
    """The published model's, or one that the interpreter can take."""

    def __init__(self, tiny: bool) -> None:
        self.hq, self.hkv, self.dim, self.chunk = (4, 2, 64, 20) if tiny else (32, 8, 128, 3072)
        self.budgets, self.batches = ((50,), (1, 2)) if tiny else ((6000, 16_384), (1, 8, 32))
        self.repeats = 1 if tiny else 30


# ---------------------------------------------------------------------- timing


def timed(run: Run, repeats: int, flush: Tensor) -> dict[str, float]:
    """Median and spread in microseconds."""
    run()  # compiles
    if not CUDA:
        start = time.perf_counter()
        run()
        return spread([(time.perf_counter() - start) * 1e6])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats + 3)]
    for start, stop in events:
        flush.zero_()
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return spread([start.elapsed_time(stop) * 1e3 for start, stop in events[3:]])


def spread(times: list[float]) -> dict[str, float]:
    times = sorted(times)
    ends = times[len(times) // 10], times[-1 - len(times) // 10]
    return {"median_us": round(statistics.median(times), 2), "p10_us": round(ends[0], 2), "p90_us": round(ends[1], 2)}


def copy_bandwidth(repeats: int, flush: Tensor) -> float:
    """GB/s of reading and writing, as a kernel reaches them: a captured copy would take the slower copy engine."""
    source = torch.ones((1 << 28) if CUDA else (1 << 18), device=DEVICE)
    target = torch.empty_like(source)
    run = functools.partial(torch.add, source, 1.0, out=target)
    return 2 * source.nbytes / timed(run, repeats, flush)["median_us"] / 1e3


def row(name: str, shape: dict[str, Any], wrong: float, allowed: float, nbytes: int, kernel: Run, paths: dict[str, Run],
        bench: Bench) -> Row:  # fmt: skip
    mine = timed(kernel, bench.shape.repeats, bench.flush)
    theirs = {path: timed(run, bench.shape.repeats, bench.flush) for path, run in paths.items()}
    fastest = min(path["median_us"] for path in theirs.values())
    gbps = nbytes / mine["median_us"] / 1e3
    return dict(
        kernel=name, **shape, error=wrong, right=wrong <= allowed, bytes=nbytes, **mine, gbps=round(gbps, 1),
        share=round(gbps / bench.gbps, 3), torch=theirs, speedup=round(fastest / mine["median_us"], 3),
    )  # fmt: skip


class Bench:
    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.flush = torch.empty((256 if CUDA else 1) << 20, dtype=torch.uint8, device=DEVICE)
        self.gbps = copy_bandwidth(shape.repeats, self.flush)

    # ------------------------------------------------------------------ the kernels

    def kept(self, batch: int, budget: int) -> Row:
        s = budget + self.shape.chunk
        scores = torch.randn(batch, self.shape.hkv, s, device=DEVICE)
        pinned = torch.zeros_like(scores, dtype=torch.bool)
        pinned[..., -s // 10 :] = True
        got = kept_triton(scores, pinned, budget)
        wrong = float((got != reference_kept(scores, pinned, budget)).sum())
        paths = {
            "counts": lambda: reference_kept(scores, pinned, budget),
            "top-k and sort": lambda: scores.masked_fill(pinned, torch.inf).topk(budget).indices.sort().values,
        }
        nbytes = scores.nbytes + pinned.nbytes + got.nbytes
        return row("kept", dict(batch=batch, budget=budget), wrong, 0, nbytes,
                   lambda: kept_triton(scores, pinned, budget), paths, self)  # fmt: skip

    def columns(self, batch: int, budget: int, storage: str, place: bool) -> list[Column]:
        heads, chunk, dim = self.shape.hkv, self.shape.chunk, self.shape.dim

        def numbers(units: int) -> list[Tensor]:
            x = torch.randn(batch, heads, units, dim, device=DEVICE).bfloat16()
            kinds = [x] if storage == "dense" else list(Affine(int(storage[3:])).encode(x).parts.values())
            kinds = kinds + [part.clone() for part in kinds]  # V
            position = torch.randint(0, 1 << 30, (batch, heads, units), dtype=torch.int32, device=DEVICE)
            return [*kinds, torch.rand(batch, heads, units, device=DEVICE), position, position > 1 << 29]

        old, new = numbers(budget), numbers(chunk)
        return [Column(a, b, a if place else torch.empty_like(a)) for a, b in zip(old, new, strict=True)]

    def random_keep(self, batch: int, budget: int) -> Tensor:
        keep = torch.rand(batch, self.shape.hkv, budget + self.shape.chunk, device=DEVICE)
        return keep.argsort(-1)[..., :budget].sort(-1).values

    def fill(self, budget: int, storage: str) -> Row:
        """K and V of the new units; beside it what the others do not move for any more."""
        columns = self.columns(1, budget, storage, True)[:-3]
        keep = self.random_keep(1, budget)
        dropped = others(keep, budget + self.shape.chunk)
        slots = torch.rand(keep.shape, device=DEVICE).argsort(-1).int()
        twin = [Column(old, new, out.clone()) for old, new, out in columns]
        reference_fill(twin, slots, keep, dropped)
        fill_triton(columns, slots, keep, dropped)
        wrong = float(sum((mine.out != theirs.out).sum() for mine, theirs in zip(columns, twin, strict=True)))
        unit = sum(column.out.nbytes for column in columns) // (self.shape.hkv * budget)
        return row("fill", dict(batch=1, budget=budget, storage=storage), wrong, 0,
                   2 * unit * int((keep >= budget).sum()), lambda: fill_triton(columns, slots, keep, dropped),
                   {"gather and copy all": lambda: reference_compact(columns, keep)}, self)  # fmt: skip

    def compact(self, batch: int, budget: int, storage: str, place: bool) -> Row:
        """storage "none": scores, positions and flags only, and slots, as `fill` leaves them."""
        columns = self.columns(batch, budget, "dense" if storage == "none" else storage, place)
        if storage == "none":
            columns = [*columns[-3:], columns[-2]._replace(old=(slots := columns[-2].old.clone()), out=slots)]
        keep = self.random_keep(batch, budget)
        twin = [Column(old.clone(), new, old.clone()) for old, new, _ in columns]
        reference_compact(twin, keep)
        compact_triton(columns, keep)
        wrong = float(sum((mine.out != theirs.out).sum() for mine, theirs in zip(columns, twin, strict=True)))
        moved = keep.numel() - int((keep == torch.arange(budget, device=DEVICE)).sum()) if place else keep.numel()
        unit = sum(column.out.nbytes for column in columns) // (batch * self.shape.hkv * budget)
        return row("compact", dict(batch=batch, budget=budget, storage=storage, in_place=place), wrong, 0,
                   2 * moved * unit, lambda: compact_triton(columns, keep),
                   {"gather and copy": lambda: reference_compact(columns, keep)}, self)  # fmt: skip

    def decode(self, batch: int, budget: int, storage: str, ragged: bool, tile: Tile | None = None) -> Row:
        heads, dim = self.shape.hkv, self.shape.dim
        theta = torch.arange(budget, device=DEVICE)[:, None] * 500_000 ** -(torch.arange(dim // 2, device=DEVICE) /
                                                                            (dim // 2))  # fmt: skip
        angles = Angles(theta.cos().bfloat16(), theta.sin().bfloat16())
        q = torch.randn(batch, self.shape.hq, 1, dim, device=DEVICE).bfloat16()
        k, v = (torch.randn(batch, heads, budget, dim, device=DEVICE).bfloat16() for _ in range(2))
        units, span = batch * heads * budget, EVERYTHING
        if ragged:  # heads of half to full length, so three quarters of the bytes
            lengths = torch.randint(budget // 2, budget + 1, (batch, heads), device=DEVICE)
            units, span = int(lengths.sum()), Span(first_unit=budget - lengths)
        pair: list[Tensor | Codes] = [k, v]
        if storage != "dense":
            bits = int(storage[3:])
            parts = [Affine(bits).encode(x).parts for x in (k, v)]
            pair = [Codes(x["codes"], x["scale"], x["zero"], bits) for x in parts]
        given = dict(span=span, angles=angles, softcap=None, bias=None)

        def kernel() -> Tensor:
            return decode_attention_triton(q, pair[0], pair[1], SCALE, **given, tile=tile)

        wrong = self.decode_error(q, pair, given, kernel())
        if tile is not None:
            shape = dict(batch=batch, budget=budget, storage=storage, tile=dataclasses.asdict(tile), error=wrong)
            return shape | timed(kernel, self.shape.repeats, self.flush)
        paths: dict[str, Run] = {
            "decode, rotate, attend": lambda: torch_decode_attention(q, *pair, scale=SCALE, **given)
        }
        if storage == "dense" and not ragged:
            paths["attend, keys rotated before"] = lambda: prefix_causal_attention(q, k, v, scale=SCALE)
        whole = sum(
            x.nbytes if isinstance(x, Tensor) else x.codes.nbytes + x.scale.nbytes + x.zero.nbytes for x in pair
        )
        shape = dict(batch=batch, budget=budget, storage=storage, ragged=ragged)
        nbytes = whole * units // (batch * heads * budget)
        return row("decode_attention", shape, wrong, TOLERANCE, nbytes, kernel, paths, self)

    def decode_error(self, q: Tensor, pair: list[Tensor | Codes], given: dict[str, Any], got: Tensor) -> float:
        """Of the last row: float64 keys of all rows do not fit."""
        last = [
            Codes(x.codes[-1:], x.scale[-1:], x.zero[-1:], x.bits) if isinstance(x, Codes) else x[-1:] for x in pair
        ]
        first = given["span"].first_unit
        span = EVERYTHING if first is None else Span(first_unit=first[-1:])
        want = reference_decode_attention(q[-1:], *last, scale=SCALE, **given | dict(span=span))
        if not bool(torch.isfinite(got).all()):
            return float("inf")
        return float((got[-1:].double() - want).abs().max() / want.abs().max())

    def rows(self) -> list[Row]:
        found = []
        for budget in self.shape.budgets:
            found += [self.kept(batch, budget) for batch in (1, self.shape.batches[-1])]
            found += [
                self.compact(1, budget, storage, place) for storage in ("dense", "int4") for place in (True, False)
            ]
            found += [self.compact(1, budget, "none", True)]
            found += [self.fill(budget, storage) for storage in ("dense", "int4")]
            for batch in self.shape.batches:
                found += [self.decode(batch, budget, storage, False) for storage in ("dense", "int8", "int4")]
            found.append(self.decode(self.shape.batches[1], budget, "dense", True))
        return found + self.equal_bytes()

    def equal_bytes(self) -> list[Row]:
        """Codes of more units in about the bytes of the largest budget in bfloat16."""
        budget = self.shape.budgets[-1]
        return [
            self.decode(batch, factor * budget, storage, False)
            for batch in self.shape.batches[:2] for storage, factor in EQUAL_BYTES.items()
        ]  # fmt: skip


def sweep(bench: Bench) -> list[Row]:
    """Decoding over the largest budget with other tiles, fastest first within a batch and storage."""
    found = []
    shape = bench.shape
    for batch in (shape.batches[0], shape.batches[-1]):
        for storage in ("dense", "int4"):
            rows = []
            for slots, warps, stages in SWEEP[:1] if not CUDA else SWEEP:
                for stretch in (None, 2048):
                    tile = Tile(slots, stretch, warps, stages)
                    rows.append(bench.decode(batch, shape.budgets[-1], storage, False, tile))
            found += sorted(rows, key=lambda row: row["median_us"])
    return found


def codes_sweep(bench: Bench) -> list[Row]:
    """Codes at equal bytes with other tiles, beside bfloat16 with its own; fastest first within a batch and storage."""
    found = []
    budget = bench.shape.budgets[-1]
    for batch in bench.shape.batches[:2]:
        found.append(bench.decode(batch, budget, "dense", False, default_tile(bench.shape.dim, 2)))
        for storage, factor in EQUAL_BYTES.items():
            shapes = CODES_SWEEP[: None if CUDA else 1]
            tiles = [Tile(slots, cut, warps, registers=registers) for slots, cut, warps, registers in shapes]
            rows = [bench.decode(batch, factor * budget, storage, False, tile) for tile in tiles]
            found += sorted(rows, key=lambda row: row["median_us"])
    return found


def prefill_sweep(bench: Bench) -> list[Row]:
    """Every present kernel for both parts of a chunk's attention: over units before, all visible, and over its own."""
    shapes = PREFILL if CUDA else [(16, 20, 50)]
    found = []
    for dim, rows, prefix in shapes:
        q = torch.randn(1, bench.shape.hq, rows, dim, device=DEVICE).bfloat16()
        names = present(torch.cuda.get_device_capability(), dim) if CUDA else ["cpu"]
        parts = {name: PARTS[name] for name in names} | ({"flex": flex} if (dim, rows, prefix) in FLEX else {})
        for keys, causal in ((prefix, False), (rows, True)):
            k, v = (torch.randn(1, bench.shape.hkv, keys, dim, device=DEVICE).bfloat16() for _ in range(2))
            flops = part_flops(bench.shape.hq, rows, keys, dim, causal)
            for name, part in parts.items():
                shape = dict(kernel=name, dim=dim, rows=rows, prefix=prefix, part="chunk" if causal else "prefix")
                run = functools.partial(part, q, k, v, dim**-0.5, causal)
                try:
                    wrong = part_error(run(), q, k, v, dim**-0.5, causal)
                except Exception as error:  # a package that imports but does not work here: a finding, not the end
                    found.append(shape | dict(right=False, failed=f"{type(error).__name__}: {error}"))
                    continue
                took = timed(run, bench.shape.repeats, bench.flush)
                rate = round(flops / took["median_us"] / 1e6, 1)
                found.append(shape | dict(error=wrong, right=wrong <= TOLERANCE, flops=flops, **took, tflops=rate))
    return found


def part_flops(heads: int, rows: int, keys: int, dim: int, causal: bool) -> int:
    pairs = rows * (rows + 1) // 2 if causal else rows * keys
    return 4 * heads * pairs * dim  # two products, a multiplication and an addition each


def part_error(part: Part, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> float:
    """The largest error of the last rows, of outputs or log-sum-exps, relative to the largest value of each."""
    last = min(64, q.shape[2])
    q, k, v = q[:, :, -last:].double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(groups, 1).mT * scale
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(k.shape[2] - last + 1)
        logits = logits.masked_fill(hidden, float("-inf"))
    want = logits.softmax(-1) @ v.repeat_interleave(groups, 1), logits.logsumexp(-1)
    pairs = zip((part.out[:, :, -last:], part.lse[:, :, -last:]), want, strict=True)
    errors = [float((got.double() - true).abs().max() / true.abs().max()) for got, true in pairs]
    return max(errors) if all(error == error for error in errors) else float("inf")  # NaN is no small error


def flex(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Part:
    """FlexAttention as a part: timed to show why it is none of ours."""
    mask = causal_blocks(q.shape[2]) if causal else None
    asked = AuxRequest(lse=True)
    out, aux = compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, return_aux=asked)
    return Part(out, aux.lse)


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def causal_blocks(rows: int) -> Any:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, rows, rows, device=DEVICE)


def prefill_table(rows: list[Row], capability: tuple[int, int]) -> list[Row]:
    """Entries for `choice.TABLE`: rates of both parts together, at the longest prefix, where a kernel was right."""
    found = []
    for dim, count in sorted({(row["dim"], row["rows"]) for row in rows}):
        same = [row for row in rows if (row["dim"], row["rows"]) == (dim, count)]
        longest = max(row["prefix"] for row in same)
        rates = {}
        for name in KERNELS:
            both = [row for row in same if row["prefix"] == longest and row["kernel"] == name]
            if both and all(row["right"] for row in both):
                rates[name] = round(sum(row["flops"] for row in both) / sum(row["median_us"] for row in both) / 1e6, 1)
        if rates:
            found.append(dict(capability=capability, dim=dim, rows=count, tflops=rates))
    return found


def verdicts(rows: list[Row]) -> dict[str, Any]:
    """Per kernel and storage: whether it is right and faster everywhere, and where it is not."""
    kinds = sorted({(row["kernel"], row.get("storage", "")) for row in rows})
    found = {}
    for kind in kinds:
        mine = [row for row in rows if (row["kernel"], row.get("storage", "")) == kind]
        found[" ".join(kind).strip()] = dict(
            right=all(row["right"] for row in mine), wins=all(row["right"] and row["speedup"] > 1 for row in mine),
            speedup=[min(row["speedup"] for row in mine), max(row["speedup"] for row in mine)],
            share=[min(row["share"] for row in mine), max(row["share"] for row in mine)],
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tiny", action="store_true", help="sizes for the interpreter")
    parser.add_argument("--sweep", choices=["all", "codes", "prefill"], help="other tiles of the decode kernel "
                        "instead: all takes a few minutes, codes (at equal bytes) under one; prefill: every fused "
                        "kernel for a chunk's attention, and the table of src/locret/kernels/choice.py")  # fmt: skip
    args = parser.parse_args()
    if not CUDA and not args.tiny:
        parser.error("no CUDA device; TRITON_INTERPRET=1 ... --tiny tries the script without one")
    torch.manual_seed(0)
    started = time.perf_counter()
    bench = Bench(Shape(args.tiny))
    if args.sweep == "prefill":
        rows = prefill_sweep(bench)
        table = prefill_table(rows, torch.cuda.get_device_capability()) if CUDA else []
        report = provenance() | dict(
            triton=triton.__version__, cudnn=torch.backends.cudnn.version(), copy_gbps=round(bench.gbps, 1),
            table=table, rows=rows, seconds=round(time.perf_counter() - started, 1),
        )  # fmt: skip
        if args.output:
            write_text(args.output, json.dumps(report, indent=1) + "\n")
        for row in [*rows, *table]:
            print(json.dumps(row))
        print(f"{report['seconds']} s")
        return
    if args.sweep:
        tiles = codes_sweep(bench) if args.sweep == "codes" else sweep(bench)
        if args.output:
            write_text(args.output, json.dumps(dict(copy_gbps=bench.gbps, tiles=tiles), indent=1) + "\n")
        for row in tiles:
            print(json.dumps(row))
        return
    rows = bench.rows()
    report = dict(
        provenance=provenance(), device=torch.cuda.get_device_name() if CUDA else "cpu", torch=torch.__version__,
        triton=triton.__version__, copy_gbps=round(bench.gbps, 1), verdicts=verdicts(rows), rows=rows,
        seconds=round(time.perf_counter() - started, 1),
    )  # fmt: skip
    text = json.dumps(report, indent=1)
    if args.output:
        write_text(args.output, text + "\n")
    for row in rows:
        where = ", ".join(
            f"{key} {row[key]}" for key in ("batch", "budget", "storage", "in_place", "ragged") if key in row
        )
        paths = ", ".join(f"{name} {path['median_us']}" for name, path in row["torch"].items())
        print(f"{row['kernel']:<16} {where}: {row['median_us']} us, {row['share']:.0%} of copy; {paths}; "
              f"error {row['error']:.1e}{'' if row['right'] else ' WRONG'}")  # fmt: skip
    print(json.dumps(report["verdicts"]), f"{report['seconds']} s")


if __name__ == "__main__":
    main()
