"""How fast the trainer is beside a bare forward pass of the same tokens, and what memory it takes; prints JSON.

    python benchmarks/train_speed.py                  # a random model of Llama-3.1-8B's shape, 10,240 tokens, d_R 1024
    python benchmarks/train_speed.py --cap-gib 22     # the same within the memory of a 24 GB card
    python benchmarks/train_speed.py --tiny --device cpu --tokens 256 --steps 4 --warmup 1 --forwards 2 --d-r 32

Weights are random (made on the device from the configuration; nothing is downloaded): time and memory do not depend on
their values. Steps are those of `locret.train.train` itself, timed in windows of ten; the device is waited for at the
ends of a window only. Besides: the pass that makes labels without learning, one evaluation and one checkpoint, so that
the extrapolation to 3,000 steps can be given with and without them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# a cap is then about what is used, not about fragments; the new name and the old
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from locret.backbone import Backbone
from locret.data import Sample, Samples
from locret.kernels.label_max import kernel_works
from locret.train import TrainConfig, TrainProgress
from locret.train.run import Run, train

WINDOW = 10
LLAMA_8B: dict[str, Any] = dict(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131_072,
    rope_parameters=dict(
        rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
)  # fmt: skip
TINY: dict[str, Any] = dict(
    vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=4096,
)  # fmt: skip


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.init()
        if args.cap_gib:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib * 2**30 / total), device)
    began = time.perf_counter()
    backbone = build(TINY if args.tiny else LLAMA_8B, args, device)
    weights_gib = sum(p.numel() * p.element_size() for p in backbone.model.parameters()) / 2**30
    built = time.perf_counter() - began
    note(f"model of {weights_gib:.2f} GiB built in {built:.1f} s")
    samples = make_samples(args, backbone)
    ids = torch.tensor([samples[0].prompt_ids + samples[0].answer_ids], device=device)

    forward = timed(lambda: backbone.model.base_model(input_ids=ids, use_cache=False), args.forwards, device)
    note(f"bare forward pass: {forward[0]:.4f} s")
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        steps, seconds, peak = train_steps(backbone, samples, Path(folder) / "run", args, device)
        note(f"training step: {steps[0]:.4f} s")
        parts = measure_parts(backbone, samples, Path(folder) / "parts", args, device)
    forward_after = timed(lambda: backbone.model.base_model(input_ids=ids, use_cache=False), args.forwards, device)
    bare = (forward[0] + forward_after[0]) / 2
    whole = steps[0] * 3000
    extra = 30 * 16 * parts["label_pass_seconds"] + 15 * parts["checkpoint_seconds"]
    result = {
        "what": "steps of locret.train at Llama-3.1-8B's shape, random weights" if not args.tiny else "tiny",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "label_kernel": "triton" if device.type == "cuda" and kernel_works(device) else "torch",
        "prompt_tokens": args.tokens,
        "answer_tokens": args.answer,
        "d_r": args.d_r,
        "objective": args.objective,
        "token_chunk": args.token_chunk,
        "input": args.input,
        "weights_gib": round(weights_gib, 3),
        "build_seconds": round(built, 2),
        "steps_measured": args.steps,
        "step_seconds": {"median": steps[0], "min": steps[1], "max": steps[2]},
        "steps_per_second": 1 / steps[0],
        "tokens_per_second": (args.tokens + args.answer) / steps[0],
        "forward_seconds": {"before": forward, "after": forward_after, "mean_of_medians": bare},
        "overhead_over_forward": steps[0] / bare,
        **parts,
        "minutes_for_3000_steps": whole / 60,
        "minutes_for_3000_steps_with_default_evaluation_and_checkpoints": (whole + extra) / 60,
        "training_seconds": seconds,
        "peak_gib": peak,
        "cap_gib": args.cap_gib,
    }
    text = json.dumps(result, indent=2)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="", help="of the model; default bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--tiny", action="store_true", help="a two-layer model of width 64 instead")
    parser.add_argument("--tokens", type=int, default=10_240, help="of a prompt")
    parser.add_argument("--answer", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--steps", type=int, default=120, help="measured ones")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the clock starts")
    parser.add_argument("--forwards", type=int, default=20, help="bare passes, before training and after")
    parser.add_argument("--d-r", type=int, default=1024)
    parser.add_argument("--objective", default="paper")
    parser.add_argument("--token-chunk", type=int, default=None, help="tokens that MLPs and heads take at a time")
    parser.add_argument("--input", default="qkv")
    parser.add_argument("--cap-gib", type=float, default=None, help="of GPU memory; more is an out-of-memory error")
    parser.add_argument("--work", type=Path, default=None, help="folder for the heads and a checkpoint, then deleted")
    parser.add_argument("--output", type=Path, default=None, help="also write the JSON here")
    return parser.parse_args()


def build(shape: dict[str, Any], args: argparse.Namespace, device: torch.device) -> Backbone:
    """A model with random weights, made on the device."""
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype, attn_implementation="sdpa")
    return Backbone(model.to(device).eval().requires_grad_(False))


def make_samples(args: argparse.Namespace, backbone: Backbone) -> Samples:
    """A few of the same length; training goes through them again and again."""
    rng, vocab = random.Random(0), backbone.model.config.vocab_size
    draw = lambda count: [rng.randrange(vocab) for _ in range(count)]  # noqa: E731
    return Samples([Sample(draw(args.tokens), draw(args.answer), f"sample {i}") for i in range(8)], None)


def train_steps(
    backbone: Backbone, samples: Samples, folder: Path, args: argparse.Namespace, device: torch.device
) -> tuple[tuple[float, float, float], float, dict[str, float]]:
    """Seconds a step (median, min, max of windows), seconds of them all, peak memory."""
    count = args.warmup + args.steps
    marks: list[tuple[int, float]] = []

    def note_time(progress: TrainProgress) -> None:
        past = progress.step - args.warmup
        if past >= 0 and (past % WINDOW == 0 or progress.step == count):
            sync(device)
            marks.append((progress.step, time.perf_counter()))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    train(backbone, samples, folder, options(args, steps=count), on_progress=note_time)
    each = [(t1 - t0) / (s1 - s0) for (s0, t0), (s1, t1) in itertools.pairwise(marks)]
    return spread(each), time.perf_counter() - began, peak_gib(device)


def measure_parts(
    backbone: Backbone, samples: Samples, folder: Path, args: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """Seconds of a pass that makes labels and learns nothing, of a step's optimizer, of a checkpoint."""
    run = Run(backbone, samples, folder, options(args, steps=10))
    sample = samples[0]
    count = max(2, args.forwards // 2)
    passes = timed(lambda: run.label_pass(sample, lambda layer, inputs, labels: None), count, device)
    learns = timed(lambda: run.learn(sample), count, device)
    updates = timed(run.optimizer.step, 3, device)
    began = time.perf_counter()
    run._save_checkpoint()
    saved = time.perf_counter() - began
    size = (folder / "checkpoint.pt").stat().st_size / 2**30
    return {
        "label_pass_seconds": passes[0],
        "learn_seconds": learns[0],
        "optimizer_seconds": updates[0],
        "checkpoint_seconds": saved,
        "checkpoint_gib": size,
    }


def options(args: argparse.Namespace, steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps, hidden_size=args.d_r, max_length=args.tokens, eval_samples=0, log_every=WINDOW,
        checkpoint_every=steps + 1, objective=args.objective, input=args.input,
        token_chunk=args.token_chunk,
    )  # fmt: skip


@torch.no_grad()
def timed(work: Callable[[], object], count: int, device: torch.device) -> tuple[float, float, float]:
    """Seconds a call (median, min, max), after two calls that do not count."""
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


def spread(seconds: list[float]) -> tuple[float, float, float]:
    return statistics.median(seconds), min(seconds), max(seconds)


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {
        "allocated": torch.cuda.max_memory_allocated(device) / 2**30,
        "reserved": torch.cuda.max_memory_reserved(device) / 2**30,
    }


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        print(json.dumps({"error": f"out of memory: {error}", "peak_gib": peak_gib(torch.device("cuda"))}, indent=2))
        sys.exit(1)
