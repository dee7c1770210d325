"""Weight files in the layouts that other projects publish, with random numbers in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def random_tensors(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def kvzap_tensors(layers: int, hidden: int, heads: int, width: int | None, seed: int = 0) -> dict[str, Tensor]:
    one = {"weight": (heads, hidden), "bias": (heads,)}
    if width is not None:
        one = {"0.weight": (width, hidden), "0.bias": (width,), "2.weight": (heads, width), "2.bias": (heads,)}
    shapes = {f"module_list.{i}.{name}": shape for i in range(layers) for name, shape in one.items()}
    return random_tensors(shapes, torch.Generator().manual_seed(seed))


def write_kvzap(
    folder: Path, *, layers: int = 2, hidden: int = 64, heads: int = 2, width: int | None = None,
    tensors: dict[str, Tensor] | None = None, **config: Any,
) -> Path:  # fmt: skip
    """As `KVzapModel.save_pretrained` does."""
    folder.mkdir(parents=True, exist_ok=True)
    values = dict(model_type="kvzap", architectures=["KVzapModel"], input_dim=hidden, output_dim=heads,
                  hidden_dim=width, n_modules=layers)  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values | config))
    tensors = kvzap_tensors(layers, hidden, heads, width) if tensors is None else tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gate_tensors(hidden: int = 64, heads: int = 2, group: int = 4, width: int = 16, sinks: int = 16, seed: int = 0):
    shapes = {
        "q_proj.weight": (heads * group * width, hidden), "q_proj.bias": (heads * group * width,),
        "k_proj.weight": (heads * width, hidden), "q_norm.weight": (width,), "k_norm.weight": (width,),
        "k_base": (heads, 1, sinks, width), "b": (heads, 1, group),
    }  # fmt: skip
    return random_tensors(shapes, torch.Generator().manual_seed(seed))


def write_fastkvzip(path: Path, *, layers: int = 2, **sizes: int) -> Path:
    """As the authors' trainer saves gates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module": [gate_tensors(seed=i, **sizes) for i in range(layers)]}, path)
    return path
