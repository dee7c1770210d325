"""How fast the trainer is beside a bare forward pass of the same tokens, and what memory it takes; prints JSON.

    python benchmarks/train_speed.py --cap-gb 22 --output OUT.json   # Llama-3.1-8B's shape, 10,240 tokens, d_R 1024
    python benchmarks/train_speed.py --quantize bnb-4bit --cap-gb 11 # the same over a 4-bit model (needs bitsandbytes)
    python benchmarks/train_speed.py --table OUT.json OUT-4BIT.json  # into docs/train.md
    python benchmarks/train_speed.py --tiny --device cpu --tokens 256 --steps 4 --warmup 1 --forwards 2 --d-r 32

Weights are random (made on the device from the configuration; nothing is downloaded): time and memory do not depend on
their values. Steps are those of `locret.train.train` itself; each leaves an event on the device, which is not waited
for before the last one. With a cap, everything after the model is made runs under it; if that fails the cap is lifted
and the result says so. A bare forward pass is transformers' own; `own_forward` is the backbone's way, in fewer kernels
where it knows the layers. Besides: the pass that makes labels without learning, the optimizer and one checkpoint, so
that the extrapolation to 3,000 steps can be given with and without evaluation and checkpoints. The JSON is printed,
and written to --output, after every stage: a run that is cut short leaves what it had.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# a cap is then about what is used, not about fragments; the new name and the old
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from common import ROOT, fill, provenance
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers import AutoModelForCausalLM, LlamaConfig

from locret.backbone import AttentionCall, Backbone
from locret.data import Sample, Samples
from locret.errors import DataError
from locret.kernels.attention import prefix_causal_attention
from locret.kernels.label_max import kernel_works
from locret.train import TrainConfig, TrainProgress
from locret.train.run import Run, train

LLAMA_8B: dict[str, Any] = dict(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131_072,
    rope_parameters=dict(
        rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
)  # fmt: skip
TINY: dict[str, Any] = dict(
    vocab_size=264, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=4096,
)  # fmt: skip


def main() -> None:
    args = parse()
    if args.table:
        fill(ROOT / "docs" / "train.md", "train-speed", table([json.loads(path.read_text()) for path in args.table]))
        return
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # some of torch's functions want to know
    began = time.perf_counter()
    backbone = build(TINY if args.tiny else LLAMA_8B, args, device)
    sync(device)
    weights = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    result: dict[str, Any] = {
        "what": "tiny" if args.tiny else "steps of locret.train at Llama-3.1-8B's shape, random weights",
        "provenance": provenance(),
        "label_kernel": "triton" if device.type == "cuda" and kernel_works(device) else "torch",
        "attention": attention_kernel(backbone, args.tokens + args.answer, device),
        "prompt_tokens": args.tokens,
        "answer_tokens": args.answer,
        "d_r": args.d_r,
        "objective": args.objective,
        "input": args.input,
        "quantize": args.quantize,
        "token_chunk": args.token_chunk,
        "weights_gb": weights / 1e9,
        "build_seconds": round(time.perf_counter() - began, 2),
        "cap_gb": args.cap_gb,
    }
    report(result, args)
    limit_memory(args.cap_gb, device)
    samples = make_samples(args, backbone)
    ids = torch.tensor([samples[0].prompt_ids + samples[0].answer_ids], device=device)
    bare = lambda: backbone.model.base_model(input_ids=ids, use_cache=False)  # noqa: E731

    walk = functools.partial(backbone.run, ids, Plain(backbone, ids.shape[1]), logits=0)
    before = timed(bare, args.forwards, device)
    result["forward_seconds"] = {"before": before}
    report(result, args)
    result["own_forward_seconds"] = timed(walk, args.forwards, device)
    report(result, args)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        try:
            result |= train_steps(backbone, samples, Path(folder) / "run", args, device)
        except (torch.OutOfMemoryError, DataError) as error:
            if not args.cap_gb:
                raise
            result |= {"cap_failed": str(error).splitlines()[0], "peak_gb_at_failure": peak_gb(device)}
            limit_memory(None, device)
            result |= train_steps(backbone, samples, Path(folder) / "again", args, device)
        step = result["step_seconds"]["median"]
        result |= {"tokens_per_second": ids.numel() / step, "minutes_for_3000_steps": 3000 * step / 60}
        report(result, args)
        after = timed(bare, args.forwards, device)
        both = (before["median"] + after["median"]) / 2
        result["forward_seconds"] |= {"after": after, "mean_of_medians": both}
        result["overhead_over_forward"] = step / both
        result["overhead_over_own_forward"] = step / result["own_forward_seconds"]["median"]
        report(result, args)
        for name, value in measure_parts(backbone, samples, Path(folder) / "parts", args, device):
            result[name] = value
            report(result, args)
    extra = 30 * 16 * result["label_pass_seconds"]["median"] + 15 * result["checkpoint_seconds"]
    result["minutes_for_3000_steps_with_default_evaluation_and_checkpoints"] = (3000 * step + extra) / 60
    report(result, args)
    print(json.dumps(result, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="", help="of the model; default bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--tiny", action="store_true", help="a two-layer model of width 128 instead")
    parser.add_argument("--tokens", type=int, default=10_240, help="of a prompt")
    parser.add_argument("--answer", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--steps", type=int, default=100, help="measured ones")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the clock starts")
    parser.add_argument("--forwards", type=int, default=8, help="bare passes, before training and after")
    parser.add_argument("--d-r", type=int, default=1024)
    parser.add_argument("--objective", default="paper")
    parser.add_argument("--token-chunk", type=int, default=None, help="tokens that MLPs and heads take at a time")
    parser.add_argument("--input", default="qkv")
    parser.add_argument("--quantize", choices=["bnb-4bit"], default=None, help="the backbone's linear layers")
    parser.add_argument("--cap-gb", type=float, default=None, help="most GPU memory, 10^9 bytes")
    parser.add_argument("--work", type=Path, default=None, help="folder for the heads and a checkpoint, then deleted")
    parser.add_argument(
        "--table", type=Path, nargs="+", default=None, help="run nothing: these files into docs/train.md"
    )
    parser.add_argument("--output", type=Path, default=None, help="write the JSON here, after every stage")
    return parser.parse_args()


def build(shape: dict[str, Any], args: argparse.Namespace, device: torch.device) -> Backbone:
    """A model with random weights, made on the device."""
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).eval().requires_grad_(False)
    if args.quantize:
        to_4_bit(model, device)
    return Backbone(model)


def to_4_bit(model: nn.Module, device: torch.device) -> None:
    """What `--quantize bnb-4bit` loads: NF4 linear layers, the output matrix as it was."""
    import bitsandbytes as bnb

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                packed = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=child.weight.dtype,
                    quant_type="nf4", device="meta",
                )  # fmt: skip
                packed.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4").to(device)
                setattr(module, name, packed)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def limit_memory(cap_gb: float | None, device: torch.device) -> None:
    """At most this much of the device for this process; None: all of it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (cap_gb or 1e9) * 1e9 / total), device)


def attention_kernel(backbone: Backbone, length: int, device: torch.device) -> str:
    """What torch's dispatcher picks for the bare forward pass of this shape."""
    shape = (length, backbone.head_dim)
    q = torch.empty(1, backbone.num_q_heads, *shape, dtype=backbone.dtype, device=device)
    k = torch.empty(1, backbone.num_kv_heads, *shape, dtype=backbone.dtype, device=device)
    try:
        return SDPBackend(torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=True)).name  # type: ignore[call-arg]
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # a private function: not worth a run
        return f"unknown ({type(error).__name__})"


class Plain:
    """A `LayerContext` that only attends."""

    def __init__(self, backbone: Backbone, length: int) -> None:
        self.rope = backbone.rope(length, length)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        return prefix_causal_attention(
            self.rope.run(layer, q, 0), self.rope.run(layer, k, 0), v, scale=call.scale, softcap=call.softcap,
            window=call.window,
        )  # fmt: skip


def make_samples(args: argparse.Namespace, backbone: Backbone) -> Samples:
    """A few of the same length; training goes through them again and again."""
    rng, vocab = random.Random(0), backbone.model.config.vocab_size
    draw = lambda count: [rng.randrange(vocab) for _ in range(count)]  # noqa: E731
    return Samples([Sample(draw(args.tokens), draw(args.answer), f"sample {i}") for i in range(8)], None)


def train_steps(
    backbone: Backbone, samples: Samples, folder: Path, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Seconds a step by the device's clock, of all measured ones by the wall's, and peak memory."""
    marks: list[Any] = []
    walls: list[float] = []

    def note_time(progress: TrainProgress) -> None:
        if progress.step in (args.warmup, args.warmup + args.steps):
            sync(device)
            walls.append(time.perf_counter())
        if progress.step >= args.warmup:
            marks.append(mark(device))
        if progress.step % 25 == 0:
            note(f"step {progress.step} of {progress.steps}")

    began = time.perf_counter()
    train(backbone, samples, folder, options(args, steps=args.warmup + args.steps), on_progress=note_time)
    each = [between(a, b) for a, b in itertools.pairwise(marks)]
    return {
        "steps_measured": len(each),
        "step_seconds": {**spread(each), "mean_by_wall_clock": (walls[1] - walls[0]) / len(each)},
        "train_call_seconds": time.perf_counter() - began,
        "peak_gb": peak_gb(device),
    }


def measure_parts(
    backbone: Backbone, samples: Samples, folder: Path, args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, Any]]:
    """A pass that makes labels and learns nothing, the same with learning, the optimizer, a checkpoint."""
    run = Run(backbone, samples, folder, options(args, steps=10))
    sample = samples[0]
    count = max(2, args.forwards // 2)
    nothing = lambda layer, inputs, labels: None  # noqa: E731
    yield "label_pass_seconds", timed(lambda: run.label_pass(sample, nothing), count, device)
    yield "learn_seconds", timed(lambda: run.learn(sample), count, device)
    yield "optimizer_seconds", timed(run.optimizer.step, 3, device)
    began = time.perf_counter()
    run._save_checkpoint()
    yield "checkpoint_seconds", time.perf_counter() - began
    yield "checkpoint_gb", (folder / "checkpoint.pt").stat().st_size / 1e9


def options(args: argparse.Namespace, steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps, hidden_size=args.d_r, max_length=args.tokens, eval_samples=0, log_every=10,
        checkpoint_every=steps + 1, objective=args.objective, input=args.input,
        token_chunk=args.token_chunk,
    )  # fmt: skip


@torch.no_grad()
def timed(work: Callable[[], object], count: int, device: torch.device) -> dict[str, float]:
    """Seconds a call, after two calls that do not count."""
    work()
    work()
    sync(device)
    each = []
    for _ in range(count):
        began = time.perf_counter()
        work()
        sync(device)
        each.append(time.perf_counter() - began)
    return spread(each)


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def mark(device: torch.device) -> Any:
    """A point in the device's stream of work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Any, second: Any) -> float:
    """Seconds between two marks."""
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1000


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gb(device: torch.device) -> dict[str, float]:
    """10^9 bytes: tensors, what torch holds (a cap is about that), and all that the device has given away."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.max_memory_allocated(device) / 1e9,
        "reserved": torch.cuda.max_memory_reserved(device) / 1e9,
        "device_with_context": (total - free) / 1e9,
    }


def table(results: list[dict[str, Any]]) -> str:
    """A row a result file, as Markdown."""
    lines = [
        "| GPU, backbone, d_R | seconds a step (min to max) | over transformers' bare pass, over ours | 3,000 samples "
        "| peak, of a cap of |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        step, where = r["step_seconds"], f"{r['provenance']['device']}, {r['quantize'] or 'bf16'}, {r['d_r']}"
        cap = f"{r['cap_gb']:g} GB" if r["cap_gb"] and "cap_failed" not in r else "none"
        lines.append(
            f"| {where} | {step['median']:.3f} ({step['min']:.3f} to {step['max']:.3f}), n = {r['steps_measured']} | "
            f"{r['overhead_over_forward']:.2f}x, {r['overhead_over_own_forward']:.2f}x | "
            f"{r['minutes_for_3000_steps']:.1f} minutes | "
            f"{r['peak_gb'].get('reserved', 0):.1f} GB, {cap} |"
        )
    return "\n".join(lines)


def report(result: dict[str, Any], args: argparse.Namespace) -> None:
    """To the file, and what is new to people."""
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    last = list(result.items())[-1]
    note(f"{time.process_time():6.1f} s of CPU  {last[0]}: {last[1]}")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
