"""How each layer of the cache holds K and V: `--storage` by name.

Shapes: L layers, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from locret.backbone import Backbone
from locret.channels import Think
from locret.errors import unknown
from locret.kivi import KiviKeys
from locret.lowrank import LowRank, bases
from locret.storage import CODECS, Affine, Codec, stored_bytes
from locret.tail import Newest, Tailed

Holder = Codec | Tailed


class Store(NamedTuple):
    """Of one layer."""

    k: Holder
    v: Holder


def _kivi(bits: int, group: int = 32, residual: int = 128) -> Store:
    return Store(KiviKeys(bits, group, residual), Newest(Affine(bits, widest=group), residual))


_LAYERS_ALIKE: dict[str, Store] = {
    **{name: Store(codec, codec) for name, codec in CODECS.items()},
    "kivi4": _kivi(4), "kivi2": _kivi(2),
    "minikv": _kivi(2, group=16),
    "think": Store(Think(), CODECS["dense"]),
    "think-int4": Store(Think(inner=Affine(4)), Affine(4)),
}  # fmt: skip
STORES = (*_LAYERS_ALIKE, "lorc")


def layer_stores(name: str, backbone: Backbone) -> list[Store]:
    """What `--storage name` means for every layer of a model.

    Raises: ConfigError: an unknown name; BackboneError: "lorc" on a family whose projections it cannot factor.
    """
    if name == "lorc":
        return [Store(*pair) for pair in bases(backbone)]
    return [layer_store(name)] * backbone.num_layers


def layer_store(name: str) -> Store:
    """A store that does not depend on the layer. Raises: ConfigError: unknown, or one that does."""
    if name not in _LAYERS_ALIKE:
        raise unknown("storage", name, _LAYERS_ALIKE)
    return _LAYERS_ALIKE[name]


def unit_bytes(store: Store, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of K and V of one unit; where groups span units, the most that it can come to."""
    return sum(
        x.unit_bytes(head_dim, dtype) if isinstance(x, Tailed | LowRank) else stored_bytes(x, head_dim, dtype)
        for x in store
    )


def widest_part(store: Store, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one unit in the widest tensor that a store has; where groups span units, at most."""
    wide = [x.unit_bytes(head_dim, dtype) for x in store if isinstance(x, Tailed | LowRank)]
    alone = [x for x in store if not isinstance(x, Tailed | LowRank)]
    one = torch.zeros(1, head_dim, dtype=dtype)
    return max([*wide, *(part.nbytes for codec in alone for part in codec.encode(one).parts.values())])


def fixed_bytes(store: Store, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of a KV head beside that, at most: units that are not encoded yet."""
    return sum(x.fixed_bytes(head_dim, dtype) for x in store if isinstance(x, Tailed))
