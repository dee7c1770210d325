"""KVzap (arXiv:2601.07891): a small network on the hidden state predicts the logarithm of a unit's KVzip+ score.

Files as NVIDIA publishes them (`nvidia/KVzap-*`): `config.json` with input_dim, output_dim, hidden_dim and n_modules,
and `model.safetensors` with one module a layer:

    linear  module_list.{i}.weight [Hkv, E], .bias
    MLP     module_list.{i}.0.weight [hidden_dim, E], .0.bias, GELU, module_list.{i}.2.weight [Hkv, hidden_dim], .2.bias
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from locret.errors import HeadsError
from locret.heads import _folder, _read_safetensors
from locret.methods.base import register
from locret.methods.scorers import FromFile, Scorer, fill, linear, read_json

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_KEY = re.compile(r"^module_list\.(\d+)\.(.+)$")
_SIZES = ("input_dim", "output_dim", "n_modules")


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self)


class _Mlp(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return linear(self[1](self[0](x)), self[2])  # type: ignore[arg-type]


@register("kvzap")
@dataclass(frozen=True)
class KVzap(FromFile):
    """A score depends on a token's own hidden state only, so it is computed once and never changes.

    Attributes:
        path: a folder with config.json and model.safetensors, or a Hub id (nvidia/KVzap-mlp-Qwen3-8B).
    """

    paper: ClassVar[str] = "arXiv:2601.07891"
    summary: ClassVar[str] = "a published linear or MLP scorer on hidden states, from a file"
    variant: ClassVar[str] = "a fixed budget; published: a threshold and the last 128 units"
    layout: ClassVar[str] = f"a folder with {_CONFIG} and {_WEIGHTS}, or a Hub id such as nvidia/KVzap-mlp-Qwen3-8B"

    path: str = ""

    @classmethod
    def load(cls, path: Path) -> Scorer:
        folder = _folder(path, [_CONFIG, _WEIGHTS])
        config = read_json(folder / _CONFIG, "the config of a KVzap model")
        sizes = [config.get(name) for name in _SIZES]
        width = config.get("hidden_dim")
        if not all(isinstance(size, int) and size > 0 for size in (*sizes, width or 1)):
            found = ", ".join(f"{name} {config.get(name)!r}" for name in (*_SIZES, "hidden_dim"))
            raise HeadsError(f"{folder / _CONFIG}: {found}; wanted whole numbers above 0, hidden_dim null for linear "
                             "scorers. Is this the folder of a KVzap model?")  # fmt: skip
        hidden_size, heads, count = (int(size) for size in sizes if size is not None)
        tensors, _ = _read_safetensors(folder / _WEIGHTS)
        found_layers = _by_layer(tensors, count, folder / _WEIGHTS)
        layers = [
            fill(_build(hidden_size, heads, width), layer, f"{folder / _WEIGHTS}, layer {i}")
            for i, layer in enumerate(found_layers)
        ]
        return Scorer(layers, hidden_size=hidden_size, num_kv_heads=heads)


def _build(hidden_size: int, heads: int, width: int | None) -> nn.Module:
    with torch.device("meta"):
        if width is None:
            return _Linear(hidden_size, heads)
        return _Mlp(nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, heads))


def _by_layer(tensors: dict[str, Tensor], count: int, source: Path) -> list[dict[str, Tensor]]:
    layers: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None or int(match[1]) >= count:
            raise HeadsError(f"{source}: unexpected {key}; wanted module_list.0 ... module_list.{count - 1}")
        layers[int(match[1])][match[2]] = tensor
    return layers
