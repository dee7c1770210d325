"""Scores from weight files that other projects publish: read strictly, or refused.

A scorer reads what a layer's projections read (`ChunkView.hidden`) and gives one number a unit. Whatever is missing,
extra, misshapen, not finite or made for a model of other sizes is an error, never a scorer with random weights.

Shapes: B batch, C new units, E hidden size, Hkv KV heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from locret.errors import ConfigError, HeadsError
from locret.heads import _check_finite, _some, _torch_load
from locret.methods.base import ChunkView, Method


class Scorer(nn.Module):
    """One scoring module a layer: [B, C, E] -> fp32 [B, C, Hkv].

    backbone: fingerprint of the model that it was made for; None: its file does not say.
    """

    def __init__(
        self, layers: list[nn.Module], *, hidden_size: int, num_kv_heads: int, backbone: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.hidden_size, self.num_kv_heads, self.backbone = hidden_size, num_kv_heads, backbone
        self.requires_grad_(False).eval()

    def score(self, layer: int, hidden: Tensor, num_kv_heads: int) -> Tensor:
        """Scores fp32 [B, Hkv, C] of `layer`; the weights move to the device and dtype of `hidden`, once.

        Raises: HeadsError: the model that runs has other sizes.
        """
        seen = (hidden.shape[-1], num_kv_heads)
        if seen != (self.hidden_size, self.num_kv_heads) or layer >= len(self.layers):
            raise HeadsError(
                f"these weights were made for another model: hidden size {self.hidden_size}, {self.num_kv_heads} KV "
                f"heads, {len(self.layers)} layers; layer {layer} of this one has hidden size {seen[0]}, {seen[1]} KV "
                "heads. Give the file that was trained for this model"
            )
        first = next(self.layers[0].parameters())
        if first.device != hidden.device or first.dtype != hidden.dtype:
            self.to(hidden.device, hidden.dtype)
        scores: Tensor = self.layers[layer](hidden)
        return scores.transpose(1, 2).float()


class FromFile(Method):
    """A method whose dataclass has a field `path` and that knows how to `load` what lies there."""

    trained: ClassVar[bool] = True
    wants_hidden: ClassVar[bool] = True
    layout: ClassVar[str]  # what `path` must be, in words

    path: str
    heads: Scorer  # by this name a saved context knows whose weights it was made with

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError(f"method {self.name!r} scores with weights from a file; give path: {self.layout}")
        object.__setattr__(self, "heads", self.load(Path(self.path)))  # frozen, and no option

    @property
    def made_for(self) -> dict[str, Any] | None:
        return self.heads.backbone

    def describe(self) -> dict[str, Any]:
        return {}  # the weights count, not where they lie

    @classmethod
    def load(cls, path: Path) -> Scorer:
        """Raises: HeadsError naming the file and what is wrong with it."""
        raise NotImplementedError

    def score(self, view: ChunkView) -> Tensor:
        assert view.hidden is not None, "the seam fills it in for methods that want it"
        return self.heads.score(view.layer, view.hidden, view.k.shape[1])


def read_json(path: Path, wanted: str) -> dict[str, Any]:
    """A JSON object. Raises: HeadsError: no such file, or something else in it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HeadsError(f"{path} cannot be read ({type(error).__name__}); wanted {wanted}") from error
    if not isinstance(values, dict):
        raise HeadsError(f"{path} holds a {type(values).__name__}; wanted {wanted}")
    return values


def read_pickle(path: Path, wanted: str) -> Any:
    """What torch.save wrote; only tensors and plain containers are read, nothing in the file is executed.

    Raises: HeadsError: no such file, truncated, or with other objects in it.
    """
    if not path.is_file():
        raise HeadsError(f"{path} is no file; wanted {wanted}")
    try:
        return _torch_load(path)
    except Exception as error:  # torch.load raises pickle, zip, EOF, runtime and key errors for broken files
        raise HeadsError(f"{path} is truncated, or not a file of plain tensors ({type(error).__name__}); "
                         f"wanted {wanted}") from error  # fmt: skip


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> nn.Module:
    """Put `tensors` into a module that was built on the meta device.

    Raises: HeadsError: a name missing or unexpected, another shape, whole numbers, or NaN.
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    missing, extra = [n for n in wanted if n not in tensors], sorted(set(tensors) - set(wanted))
    if missing or extra:
        raise HeadsError(f"{source}: {_some('missing', missing)}{_some('unexpected', extra)}"
                         f"wanted {', '.join(wanted)}")  # fmt: skip
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or not tensor.dtype.is_floating_point:
            raise HeadsError(f"{source}: {name} is {tensor.dtype} {list(tensor.shape)}; wanted floating-point "
                             f"{list(shape)}")  # fmt: skip
    _check_finite(tensors, f"{source}: ")
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    return module


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """The last product in fp32 (fp64 for fp64): scores in bf16 tie, and ties evict at random."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return nn.functional.linear(x.to(wide), layer.weight.to(wide), layer.bias.to(wide)).float()
