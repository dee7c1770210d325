"""Fast KVzip (arXiv:2601.17668): a gate of rank d on the hidden state, a small attention of a token to itself.

With q [G, d] and k [d] per KV head, both projected from the hidden state and RMS-normalised, learned sink keys s_j and
a bias b per query of the group, a score is the softmax weight that the token's own key would get, mean over the group:

    e_g = exp(q_g.k / sqrt(d) + b_g)
    score = mean over g of  e_g / (e_g + sum over j of exp(q_g.s_j / sqrt(d)))

Files as published (`Jang-Hyun/Fast-KVzip`, MODEL/q4_dim16_sink16.pt): a torch file with a list `module`, of one
dictionary a layer:

    q_proj.weight [Hkv G d, E]   q_proj.bias      k_proj.weight [Hkv d, E]
    q_norm.weight [d]            k_norm.weight    k_base [Hkv, 1, sinks, d]     b [Hkv, 1, G]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from locret.errors import HeadsError
from locret.methods.base import register
from locret.methods.scorers import FromFile, Scorer, fill, read_pickle

_EPS = 1e-6  # of the published norms


class Gate(nn.Module):
    """One layer's gate: [B, C, E] -> fp32 [B, C, Hkv], in 0 .. 1."""

    def __init__(self, hidden_size: int, heads: int, group: int, width: int, sinks: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden_size, heads * group * width)
        self.k_proj = nn.Linear(hidden_size, heads * width, bias=False)
        self.q_norm = nn.RMSNorm(width, eps=_EPS)
        self.k_norm = nn.RMSNorm(width, eps=_EPS)
        self.k_base = nn.Parameter(torch.empty(heads, 1, sinks, width))
        self.b = nn.Parameter(torch.empty(heads, 1, group))

    def forward(self, x: Tensor) -> Tensor:
        heads, _, _, width = self.k_base.shape
        q = self._norm(self.q_proj(x).unflatten(-1, (heads, -1, width)), self.q_norm)  # [B, C, Hkv, G, d]
        k = self._norm(self.k_proj(x).unflatten(-1, (heads, 1, width)), self.k_norm)  # [B, C, Hkv, 1, d]
        own = (q * k).sum(-1) / width**0.5 + self.b[:, 0].to(q.dtype)  # [B, C, Hkv, G]
        others = q @ self.k_base[:, 0].to(q.dtype).mT / width**0.5  # [B, C, Hkv, G, sinks]
        return torch.sigmoid(own - others.logsumexp(-1)).mean(-1).float()

    @staticmethod
    def _norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
        """In fp32 at least, and so is all that follows."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return nn.functional.rms_norm(x.to(wide), norm.normalized_shape, norm.weight.to(wide), _EPS)


@register("fastkvzip")
@dataclass(frozen=True)
class FastKVzip(FromFile):
    """A score depends on a token's own hidden state only, so it is computed once and never changes.

    Attributes:
        path: a torch file with the gates of all layers.
    """

    paper: ClassVar[str] = "arXiv:2601.17668"
    summary: ClassVar[str] = "published low-rank gates on hidden states, from a file"
    variant: ClassVar[str] = "the same budget in every layer and head; published: shared out over all of them"
    layout: ClassVar[str] = "the .pt file of one model from Jang-Hyun/Fast-KVzip"

    path: str = ""

    @classmethod
    def load(cls, path: Path) -> Scorer:
        wanted = "a torch file with a list 'module' of one dictionary of tensors a layer"
        values = read_pickle(path, wanted)
        layers = values.get("module") if isinstance(values, dict) else None
        if not isinstance(layers, list) or not layers or not all(isinstance(layer, dict) for layer in layers):
            raise HeadsError(f"{path} holds something else; wanted {wanted}")
        sizes = _sizes(layers[0], path)
        gates = [_filled(sizes, layer, f"{path}, layer {i}") for i, layer in enumerate(layers)]
        return Scorer(gates, hidden_size=sizes[0], num_kv_heads=sizes[1])


def _filled(sizes: tuple[int, int, int, int, int], layer: dict[str, Tensor], source: str) -> nn.Module:
    with torch.device("meta"):
        gate = Gate(*sizes)
    return fill(gate, layer, source)


def _sizes(layer: dict[str, Tensor], path: Path) -> tuple[int, int, int, int, int]:
    """(E, Hkv, G, d, sinks) from the first layer; `fill` then holds every tensor of every layer against them."""
    shapes = {name: tuple(getattr(layer.get(name), "shape", ())) for name in ("q_proj.weight", "k_base", "b")}
    if [len(shape) for shape in shapes.values()] != [2, 4, 3] or 0 in shapes["k_base"]:
        found = ", ".join(f"{name} {list(shape) if shape else 'missing'}" for name, shape in shapes.items())
        raise HeadsError(
            f"{path}: {found}; wanted q_proj.weight [Hkv G d, E], k_base [Hkv, 1, sinks, d], b [Hkv, 1, G]"
        )
    heads, _, sinks, width = shapes["k_base"]
    return shapes["q_proj.weight"][1], heads, shapes["b"][2], width, sinks
