"""How much of a chunk's time in prefill is matrix products and attention, which nothing could do without.

    python benchmarks/prefill_share.py          one GPU, Llama-3.1-8B's shape, about a minute
    python benchmarks/prefill_share.py --shape 2x64x96x4x2x264 --budget 96 --prompt 5000 --repeats 1 --output x.json

In one process, taking turns, so that all meet the same clocks:

    locret    chunks of a prompt, once the cache is full: seconds from one to the next
    untended  the same without scores, choice and move from there on: the units that were kept so far stay as they are
    bare      the products of all layers and their attention over budget and chunk, in the same order, and nothing else

`bare` over `locret` is the share of what cannot be done without; locret less untended is what eviction costs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from common import RESULTS, provenance

from locret.bench import random_llm
from locret.cache import LayerCache
from locret.config import CacheConfig
from locret.engine import LLM
from locret.files import write_text
from locret.kernels.attention import two_part_attention
from locret.kernels.compact import Candidates, Choice
from locret.methods.base import ChunkView, Method
from locret.prefill import ChunkPass, Reader

WATCHED = 6  # chunks behind a full cache that do not count: by then those that follow have been recorded, if they are


@dataclass(frozen=True)
class Unscored(Method):
    """Every unit is worth the same."""

    name: ClassVar[str] = "unscored"
    per_token: ClassVar[bool] = True
    replayable: ClassVar[bool] = True

    def score(self, view: ChunkView) -> torch.Tensor:
        return view.k.new_zeros(view.k.shape[:3], dtype=torch.float32)


def clock(device: torch.device) -> float:
    """Seconds, when everything that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def chunk_seconds(llm: LLM, prompt: int, *, tended: bool = True) -> float:
    """Seconds a chunk, of those that come after every layer is full; launching one overlaps with the one before.

    tended: False: units are chosen until the time is taken only, so that attention meets the same ones. (It is 4 %
    faster over the first units of a random text than over those that random heads keep.)
    """
    vocab, device = llm.backbone.model.config.vocab_size, llm.backbone.device
    ids = torch.randint(10, vocab, (1, prompt), generator=torch.Generator().manual_seed(0))
    reader = Reader.start(llm.backbone, llm.method, llm.config, batch=1, prompt_len=prompt, new_tokens=1)
    size, budget = reader.cache.chunk_size, reader.plan.budget or 0
    first = (budget // size + 2 + WATCHED) * size
    last = (prompt - reader.plan.local_window - 1) // size * size
    if last <= first:
        raise SystemExit(f"a prompt of {prompt} tokens has no chunks of {size} behind a full cache; give a longer one")
    times = {}
    with llm.backbone.seam(), contextlib.ExitStack() as stack:
        for done, _ in reader.chunks(ids):
            if done == first - size and not tended:  # a chunk before: whatever is new there is not timed
                stack.enter_context(untended())
                reader.method = Unscored()
            if done in (first, last):
                times[done] = clock(device)
    return (times[last] - times[first]) / ((last - first) // size)


@contextlib.contextmanager
def untended() -> Iterator[None]:
    """Within it nothing is chosen and nothing moved when a layer is full, so that new units are forgotten."""

    def choose(chunk: ChunkPass, view: ChunkView, old: Candidates, new: Candidates, *, drops: bool = False) -> Choice:
        chunk.sound.append(new.score[..., 0])  # every pass has a look at its scores
        return Choice(old.score.new_empty(old.score.shape, dtype=torch.int64), None)

    with (
        patch.object(ChunkPass, "_choose", choose),
        patch.object(LayerCache, "keep", lambda held, keep: None),
        patch.object(LayerCache, "fill", lambda held, choice: None),
    ):
        yield


def bare_chunk(llm: LLM, size: int, budget: int) -> Callable[[], None]:
    """A function that does a chunk's products and attention, with the model's own weights, on random numbers."""
    backbone = llm.backbone
    config, device, dtype = backbone.model.config, backbone.device, backbone.dtype
    layers = backbone.model.model.layers

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype) * 0.1

    x, wide = random(size, config.hidden_size), random(size, config.intermediate_size)
    q = random(1, size, backbone.num_q_heads, backbone.head_dim).transpose(1, 2)
    own = tuple(random(1, size, backbone.num_kv_heads, backbone.head_dim).transpose(1, 2) for _ in range(2))
    kept = tuple(random(1, backbone.num_kv_heads, budget, backbone.head_dim) for _ in range(2))

    def run() -> None:
        for layer in layers:
            a, m = layer.self_attn, layer.mlp
            for linear in (a.q_proj, a.k_proj, a.v_proj):
                linear(x)
            out = two_part_attention(q, (kept[0], kept[1]), (own[0], own[1]), scale=backbone.head_dim**-0.5)
            a.o_proj(out.transpose(1, 2).flatten(2)[0])
            m.gate_proj(x)
            m.up_proj(x)
            m.down_proj(wide)

    return run


def bare_seconds(run: Callable[[], None], device: torch.device, chunks: int) -> float:
    run()
    began = clock(device)
    for _ in range(chunks):
        run()
    return (clock(device) - began) / chunks


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--budget", type=int, default=16384)
    parser.add_argument("--prompt", type=int, default=98304)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "prefill-share.json")
    args = parser.parse_args()
    llm = random_llm(args.shape, device="auto", dtype="auto", method="locret", config=CacheConfig(args.budget))
    size = llm.config.resolve(prompt_len=args.prompt, unit_bytes=1).chunk_size
    seconds: dict[str, list[float]] = {"locret": [], "untended": [], "bare": []}
    with torch.inference_mode():
        run = bare_chunk(llm, size, args.budget)
        chunk_seconds(llm, args.prompt)  # warms up: cuDNN plans, kernels are compiled
        for _ in range(args.repeats):
            seconds["locret"].append(chunk_seconds(llm, args.prompt))
            seconds["untended"].append(chunk_seconds(llm, args.prompt, tended=False))
            seconds["bare"].append(bare_seconds(run, llm.backbone.device, 24))
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    result: dict[str, Any] = {
        "provenance": provenance(), "shape": args.shape, "budget": args.budget, "chunk": size,
        "seconds_a_chunk": {name: {"median": middle[name], "least": min(values), "most": max(values)}
                            for name, values in seconds.items()},
        "bare_share": middle["bare"] / middle["locret"],
        "eviction_share": 1 - middle["untended"] / middle["locret"],
    }  # fmt: skip
    write_text(args.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
