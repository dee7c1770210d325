"""LoRC (arXiv:2410.03111): key and value projections of low rank, so that a unit is a short latent. No training.

For one KV head with projection W [D, E] = U S V^T, the first r columns of U give

    W_r = U_r U_r^T W        latent of a unit: U_r^T k, [r]        the unit again: U_r latent

W_r takes W's place in the model: same class, same shapes, weights of lower rank. Its keys before RoPE and its values
then *are* U_r times their latents, so `LowRank` stores r numbers for D and decodes exactly. Keys are rotated after
that. In the cache (`--storage lorc`) the model stays as it is and units are projected when they are stored (`bases`):
for the same hidden states what is read back is what W_r gives, and a chunk's attention to itself is exact. That is a
variant. The paper factors a layer's heads together; here each head has a basis of its own, because heads keep
different units and a latent of all heads could not be evicted by one.

Ranks fall with depth: an early error is amplified by every layer behind it, so where the product of the condition
numbers from a layer to the last is large, the rank is.

Shapes: n units, Hkv KV heads, D head dim, E hidden size, r rank.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locret.backbone import Backbone
from locret.errors import BackboneError, ConfigError
from locret.storage import Stored


@dataclass(frozen=True)
class LowRank:
    """Codec of the K or V of one layer whose projection has been replaced by `apply`.

    Attributes:
        basis: orthonormal columns, [Hkv, D, r].
        offset: the projection's bias, [Hkv, 1, D].
    """

    basis: Tensor
    offset: Tensor

    @property
    def name(self) -> str:
        return f"rank{self.basis.shape[-1]}"

    def unit_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        """Of one unit and KV head."""
        return self.basis.shape[-1] * dtype.itemsize

    def encode(self, x: Tensor) -> Stored:
        """x [B, Hkv, n, D], keys before RoPE."""
        return Stored({"latent": (x - self.offset) @ self.basis})

    def decode(self, stored: Stored) -> Tensor:
        return stored.parts["latent"] @ self.basis.mT + self.offset


def factor(weight: Tensor, heads: int, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` projection of each head (Eckart-Young).

    Args:    weight: [heads * D, E];  rank: 1 .. D.
    Returns: weight of that rank [heads * D, E] and bases [heads, D, rank], both in weight's dtype.
    """
    blocks = weight.double().unflatten(0, (heads, -1))  # [heads, D, E]
    basis = torch.linalg.eigh(blocks @ blocks.mT).eigenvectors.flip(-1)[..., :rank]  # ascending; D is far below E
    low = basis @ (basis.mT @ blocks)
    return low.flatten(0, 1).to(weight.dtype), basis.to(weight.dtype)


def log_condition(weight: Tensor) -> float:
    """Natural logarithm of the largest over the smallest singular value, at most that of 1 / sqrt(eps)."""
    wide = weight.double()
    squares = torch.linalg.eigvalsh(wide @ wide.mT if wide.shape[0] <= wide.shape[1] else wide.mT @ wide)
    smallest = squares[0].clamp_min(squares[-1] * torch.finfo(torch.float64).eps)
    return float((squares[-1] / smallest).log()) / 2


def progressive_ranks(conditions: list[float], *, highest: int, lowest: int) -> list[int]:
    """A rank per layer, falling from `highest` to `lowest` as the condition numbers that are left to come fall.

    Args: conditions: per layer, log_condition(W_K) + log_condition(W_V).
    Raises: ConfigError: not 1 <= lowest <= highest.
    """
    if not 1 <= lowest <= highest:
        raise ConfigError(f"ranks from {highest} down to {lowest}; wanted 1 <= lowest <= highest")
    ahead = list(itertools.accumulate(reversed(conditions)))[::-1]  # log of the product from this layer on
    spread = max(ahead) - min(ahead)
    shares = [(max(ahead) - value) / spread if spread else 0.0 for value in ahead]
    return [round(highest * (1 - share * (1 - lowest / highest))) for share in shares]


@torch.no_grad()
def apply(backbone: Backbone, *, highest: int, lowest: int) -> list[tuple[LowRank, LowRank]]:
    """Replace the k_proj and v_proj weights of the model, in place, by ones of progressive rank.

    Returns: the codecs of K and V per layer.
    Raises: BackboneError: a family without k_proj and v_proj, or that normalises keys behind them;
        ConfigError: ranks outside 1 .. D.
    """
    codecs = []
    for pair, rank in zip(*_ranked(backbone, highest, lowest), strict=True):
        codecs.append(_codecs(pair, backbone.num_kv_heads, rank))
        for projection in pair:
            projection.weight.copy_(factor(projection.weight, backbone.num_kv_heads, rank)[0])
    return codecs


_BASES: MutableMapping[nn.Module, list[tuple[LowRank, LowRank]]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def bases(backbone: Backbone) -> list[tuple[LowRank, LowRank]]:
    """The codecs of K and V per layer for a model that stays as it is; ranks fall from D to D / 2.

    Worked out once a model. A plan's stand-in (`attention_modules` None) has no weights: its ranks fall evenly.
    Raises: BackboneError: as `apply`.
    """
    heads, width, device = backbone.num_kv_heads, backbone.head_dim, backbone.device
    if backbone.attention_modules is None:
        ranks = progressive_ranks([1.0] * backbone.num_layers, highest=width, lowest=width // 2)
        offset = torch.zeros(heads, 1, width, dtype=backbone.dtype, device=device)
        empty = [LowRank(offset.new_zeros(heads, width, rank), offset) for rank in ranks]
        return [(codec, codec) for codec in empty]
    if backbone.model not in _BASES:
        found = zip(*_ranked(backbone, width, width // 2), strict=True)
        _BASES[backbone.model] = [_codecs(pair, heads, rank) for pair, rank in found]
    return _BASES[backbone.model]


def _ranked(backbone: Backbone, highest: int, lowest: int) -> tuple[list[tuple[nn.Linear, nn.Linear]], list[int]]:
    """The projections of every layer, and its rank."""
    if highest > backbone.head_dim:
        raise ConfigError(f"rank {highest} is above the head dim {backbone.head_dim}, which is full rank")
    pairs = [_projections(module) for module in backbone.attention_modules]
    conditions = [sum(log_condition(projection.weight) for projection in pair) for pair in pairs]
    return pairs, progressive_ranks(conditions, highest=highest, lowest=lowest)


def _codecs(pair: tuple[nn.Linear, nn.Linear], heads: int, rank: int) -> tuple[LowRank, LowRank]:
    key, value = (_codec(projection, heads, rank) for projection in pair)
    return key, value


def _codec(projection: nn.Linear, heads: int, rank: int) -> LowRank:
    basis = factor(projection.weight, heads, rank)[1]
    bias = projection.weight.new_zeros(projection.out_features) if projection.bias is None else projection.bias
    return LowRank(basis, bias.detach().unflatten(0, (heads, 1, -1)))


def _projections(module: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    key, value = (getattr(module, name, None) for name in ("k_proj", "v_proj"))
    name = type(module).__name__
    if not isinstance(key, nn.Linear) or not isinstance(value, nn.Linear):
        raise BackboneError(f"{name} has no linear k_proj and v_proj; low-rank storage needs them apart. Take another "
                            "storage")  # fmt: skip
    if not key.weight.is_floating_point() or key.weight.shape != (key.out_features, key.in_features):
        raise BackboneError(f"k_proj of {name} is quantised; low-rank storage needs its numbers. Take another storage")
    if getattr(module, "k_norm", None) is not None:
        raise BackboneError(f"{name} normalises keys after k_proj; they do not stay in the projection's span")
    return key, value
