"""kvpress's presses beside our methods: what is kept, the next logits, and what chunked prefill holds.

    python benchmarks/kvpress_side_by_side.py --peer FOLDER/bin/python     (kvpress 0.5.5 needs transformers < 5.3)

Both read the same checkpoint (the embedded model, in float64) and the same text, each in its own environment. One shot:
the whole prompt in one chunk, keys at their original angles, no pins but those a press has. Chunked: the same in chunks
of CHUNK tokens; units held afterwards. Writes results/kvpress-side-by-side.json and the table in docs/methods.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "kvpress-side-by-side.json"
PAGE = ROOT / "docs" / "methods.md"
MODEL = ROOT / "src" / "locret" / "models" / "embedded"
LENGTH, KEPT, CHUNK, QUESTION = 768, 192, 128, 16
OURS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # press -> method, its options, the cache's
    "Knorm": ("knorm", {}, {}),
    "StreamingLLM": ("streamingllm", dict(num_sinks=4), {}),
    "SnapKV": ("snapkv", dict(window=32, kernel_size=5, pooling="avg"), {}),
    "TOVA": ("tova", {}, dict(num_stabilizers=1)),  # the press keeps the newest unit by force
    "ExpectedAttention": ("expected_attention", {}, {}),
    "KeyDiff": ("keydiff", {}, {}),
    "PyramidKV": ("pyramidkv", dict(beta=2), {}),
}
Kept = list[list[list[int]]]  # per layer and KV head


def prompt() -> list[int]:
    """Ids of text that both sides can read: the pages of this project."""
    from tokenizers import Tokenizer

    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("[at]*.md")))
    return list(Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text).ids[: LENGTH + QUESTION])


# ---------------------------------------------------------------------- ours


def ours(name: str, ids: torch.Tensor) -> dict[str, Any]:
    from locret.backbone import Backbone
    from locret.config import CacheConfig
    from locret.methods import get_method
    from locret.methods.snapkv import SnapKV
    from locret.prefill import Reader

    backbone = Backbone.load(device="cpu")
    backbone.model.double()
    method, options, pins = OURS[name]
    if method == "pyramidkv":
        options = {**options, "base": SnapKV(window=32, kernel_size=5, pooling="avg")}
    cache = dict(budget=KEPT, num_sinks=0, num_stabilizers=0, local_window=0, decode_interval=1, positions="original")

    def read(chunk: int) -> tuple[Reader, torch.Tensor]:
        config = CacheConfig(**{**cache, **pins, "chunk_size": chunk})
        reader = Reader.start(backbone, get_method(method, **options), config, batch=1, prompt_len=LENGTH)
        reader.read(ids[:, :LENGTH], local_window=0, more=True)
        kept = [layer.units().position[0].tolist() for layer in reader.cache.layers]
        return reader, torch.tensor(sum(len(head) for heads in kept for head in heads))

    with torch.inference_mode():
        reader, _ = read(LENGTH)
        kept = [layer.units().position[0].tolist() for layer in reader.cache.layers]
        logits = reader.read(ids[:, LENGTH:], local_window=0)[0]  # the question sees what is kept and itself
        held = int(read(CHUNK)[1])
    return {"kept": kept, "logits": logits.tolist(), "held": held / len(kept) / len(kept[0])}


# ---------------------------------------------------------------------- theirs, in the other environment


def theirs(name: str, ids: torch.Tensor) -> dict[str, Any]:
    import kvpress
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64, attn_implementation="sdpa").eval()
    options: dict[str, dict[str, Any]] = {
        "SnapKV": dict(window_size=32, kernel_size=5),
        "PyramidKV": dict(window_size=32, kernel_size=5, beta=2),
    }

    def run(chunk: int, *, press: bool = True) -> Any:
        cache = DynamicCache()
        made = getattr(kvpress, f"{name}Press")(compression_ratio=1 - KEPT / LENGTH, **options.get(name, {}))
        with made(model) if press else torch.no_grad():
            for start in range(0, LENGTH, chunk):
                at = torch.arange(start, min(start + chunk, LENGTH))
                model(ids[:, at], past_key_values=cache, position_ids=at[None], cache_position=at)
        return cache

    with torch.no_grad():
        cache, full = run(LENGTH), run(LENGTH, press=False)
        kept = [
            [_positions(some, every) for some, every in zip(pressed.keys[0], whole.keys[0], strict=True)]
            for pressed, whole in zip(cache.layers, full.layers, strict=True)
        ]
        sizes = {layer.keys.shape[2] for layer in cache.layers}
        logits = None
        if len(sizes) == 1:  # layers of different lengths break their mask for more than one query
            at = torch.arange(LENGTH, LENGTH + QUESTION)[None]
            logits = model(ids[:, LENGTH:], past_key_values=cache, position_ids=at).logits[0, -1].tolist()
        chunked = run(CHUNK)
        held = sum(layer.keys.shape[2] for layer in chunked.layers) / len(chunked.layers)
    return {"kept": kept, "logits": logits, "held": held}


def _positions(some: torch.Tensor, every: torch.Tensor) -> list[int]:
    """Which rows of `every` [S, D] the rows of `some` are."""
    same = (some[:, None] == every[None]).all(-1)
    assert bool((same.sum(-1) == 1).all())
    return sorted(same.float().argmax(-1).tolist())


# ---------------------------------------------------------------------- side by side


def compare(name: str, mine: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    heads = [
        (set(a), set(b)) for x, y in zip(mine["kept"], peer["kept"], strict=True) for a, b in zip(x, y, strict=True)
    ]
    difference = None
    if peer["logits"] is not None:
        a, b = (torch.tensor(side["logits"], dtype=torch.float64) for side in (mine, peer))
        difference = ((a - b).abs().max() / b.abs().max()).item()
    return {
        "press": name,
        "method": OURS[name][0],
        "heads": len(heads),
        "equal_heads": sum(a == b for a, b in heads),
        "overlap": sum(len(a & b) for a, b in heads) / sum(min(len(a), len(b)) for a, b in heads),
        "kept": [sum(len(a) for a, _ in heads), sum(len(b) for _, b in heads)],
        "logits_difference": difference,
        "held_chunked": [mine["held"], peer["held"]],
    }


def table(result: dict[str, Any]) -> str:
    head = ("press", "method", "heads with the same units", "units of the smaller set in the larger",
            "next logits differ by (relative)", f"held after chunks of {CHUNK}: ours", "theirs")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for cell in result["cells"]:
        gap = cell["logits_difference"]
        shown = "they cannot run it" if gap is None else f"{gap:.0e}"
        mine, peer = cell["held_chunked"]
        lines.append(f"| {cell['press']} | `{cell['method']}` | {cell['equal_heads']} of {cell['heads']} | "
                     f"{cell['overlap']:.1%} | {shown} | {mine:.0f} | {peer:.0f} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="python of an environment with kvpress")
    parser.add_argument("--answer", help=argparse.SUPPRESS)  # we are the peer: write here
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ids = torch.tensor([prompt()])
    if arguments.answer:
        Path(arguments.answer).write_text(json.dumps({name: theirs(name, ids) for name in OURS}), encoding="utf-8")
        return
    from common import fill, provenance  # not in the peer's environment, which has no locret

    with tempfile.NamedTemporaryFile("r") as file:
        subprocess.run([arguments.peer, __file__, "--peer", arguments.peer, "--answer", file.name], check=True)
        peers = json.load(file)
    cells = [compare(name, ours(name, ids), peers[name]) for name in OURS]
    versions = subprocess.run(
        [arguments.peer, "-c", "from importlib.metadata import version as v; print(v('kvpress'), v('transformers'))"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    result = {
        "provenance": provenance(), "kvpress": versions[0], "their_transformers": versions[1], "tokens": LENGTH,
        "kept": KEPT, "chunk": CHUNK, "question": QUESTION, "cells": cells,
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    fill(PAGE, "kvpress", table(result))


if __name__ == "__main__":
    sys.exit(main())
