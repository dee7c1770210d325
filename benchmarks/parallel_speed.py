"""One model on two GPUs: tensor-parallel prefill, decode and training steps, and FSDP2 training steps, beside one GPU.

    torchrun --nproc-per-node 2 benchmarks/parallel_speed.py --output OUT.json         # Llama-3.1-8B's shape, 1 minute
    torchrun --nproc-per-node 2 benchmarks/parallel_speed.py --tiny --prompt 256 --tokens 64 --new 4 --steps 2

Weights are random and the same on all processes. First every process reads the prompt with a model of its own (the
numbers of one GPU are process 0's) and trains on samples of its own, then the model is split. JSON is written after
every stage.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import provenance
from torch import nn
from train_speed import LLAMA_8B, TINY, between, make_samples, mark, peak_gb, sync
from transformers import AutoModelForCausalLM, LlamaConfig

from locret.backbone import Backbone
from locret.config import CacheConfig
from locret.data import Samples
from locret.engine import LLM
from locret.heads import HeadsConfig, RetainingHeads
from locret.parallel import join, leave, local_device, shard_weights
from locret.train import TrainConfig, TrainProgress, train


def main() -> None:
    args = parse()
    if not join():
        raise SystemExit("start it with torchrun --nproc-per-node 2")
    device = torch.device(local_device() or "cpu")
    result: dict[str, Any] = {"provenance": provenance(), "processes": dist.get_world_size()}
    result |= {name: getattr(args, name) for name in ("prompt", "budget", "new", "tokens", "d_r", "steps")}

    def report(name: str, value: Any) -> None:
        result[name] = value
        if dist.get_rank() == 0:
            print(f"{name}: {value}", file=sys.stderr, flush=True)
            if args.output:
                args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    model = build(args, device)
    world = dist.get_world_size()
    backbone = Backbone(model)
    report("one_model_a_process", {**answer(backbone, args), **steps(backbone, args, device, world)})
    report("tensor_parallel_by", split(model, device))
    torch.cuda.empty_cache()
    backbone = Backbone(model)
    report("tensor_parallel", {**answer(backbone, args), **steps(backbone, args, device, 1)})
    del model, backbone
    torch.cuda.empty_cache()
    model = build(args, device)
    shard_weights(model, list(model.model.layers))
    torch.cuda.empty_cache()
    report("fsdp", steps(Backbone(model), args, device, world))
    if dist.get_rank() == 0:
        print(json.dumps(result, indent=2))
    leave()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tiny", action="store_true", help="a two-layer model of width 128 instead")
    parser.add_argument("--prompt", type=int, default=32_768, help="tokens read before answering")
    parser.add_argument("--budget", type=int, default=16_384)
    parser.add_argument("--new", type=int, default=64, help="tokens of the answer")
    parser.add_argument("--tokens", type=int, default=10_240, help="of a training prompt")
    parser.add_argument("--answer", type=int, default=256, help="tokens of a training answer")
    parser.add_argument("--d-r", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10, help="training steps that count")
    parser.add_argument("--output", type=Path, default=None)
    return parser.parse_args()


def build(args: argparse.Namespace, device: torch.device) -> Any:
    """The same random weights everywhere, made on the device."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = TINY if args.tiny else LLAMA_8B
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval().requires_grad_(False)


def split(model: Any, device: torch.device) -> str:
    """Tensor parallel, as `from_pretrained(tp_plan="auto")` does it but of weights that are there; says by what."""
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    try:
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        if list(inspect.signature(apply_tensor_parallelism).parameters) == ["model", "tp_mesh"]:
            apply_tensor_parallelism(model, mesh)
            return "transformers"
    except ImportError:
        pass
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles: dict[str, nn.Module | Any] = {"colwise": ColwiseParallel(), "rowwise": RowwiseParallel()}
    plan = {name: styles[style] for name, style in model.config.base_model_tp_plan.items()}
    parallelize_module(model.model, mesh, plan)
    return "torch"


def answer(backbone: Backbone, args: argparse.Namespace) -> dict[str, Any]:
    """Prompt tokens a second and milliseconds a new token, the second time."""
    heads = RetainingHeads(HeadsConfig.of(backbone, hidden_size=args.d_r), generator=torch.Generator().manual_seed(0))
    llm = LLM.build(backbone, heads=heads, config=CacheConfig(budget=args.budget))
    vocab = backbone.model.config.vocab_size
    prompt = [(17 * i * i + 5) % vocab for i in range(args.prompt)]
    for _ in range(2):
        dist.barrier()
        out = llm.generate(prompt, max_new_tokens=args.new)
    stats = out.stats
    return {
        "prefill_tokens_per_second": args.prompt / stats.prefill_seconds,
        "decode_ms_per_token": 1000 * stats.decode_seconds / max(1, stats.new_tokens - 1),
        "new_tokens": stats.new_tokens,
        "first_tokens": out.tokens[:8],
    }


def steps(backbone: Backbone, args: argparse.Namespace, device: torch.device, readers: int) -> dict[str, Any]:
    """Seconds a training step, of one sample a reader."""
    marks: list[Any] = []

    def note_time(progress: TrainProgress) -> None:
        if progress.step > 2:
            marks.append(mark(device))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    samples: Samples = make_samples(args, backbone)
    config = TrainConfig(
        steps=args.steps + 3, hidden_size=args.d_r, max_length=args.tokens, eval_samples=0, accumulate=readers,
        checkpoint_every=args.steps + 4,
    )  # fmt: skip
    shared: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    train(backbone, samples, Path(shared[0]), config, on_progress=note_time)
    sync(device)
    each = [between(a, b) for a, b in itertools.pairwise(marks)]
    median = statistics.median(each)
    return {
        "train_step_seconds": median,
        "train_samples_per_second": readers / median,
        "train_peak_gb": peak_gb(device),
    }


if __name__ == "__main__":
    main()
