"""What a stored unit weighs and what it costs in attention, on the embedded model's own keys and values.

    python benchmarks/storage.py --output benchmarks/results/storage.json
    python benchmarks/storage.py --write        only write the table of stores in docs/storage.md

One generated text is read whole. Keys (before RoPE) and values of all layers are cast to bfloat16, stored, decoded,
rotated, and attended to by the text's last 64 queries. "bytes" are those of K and V of one unit and KV head, counted
from the tensors; "error" is the relative Frobenius error of the attention's output, mean over layers. "kept 1/20"
evicts a random 19 of 20 units first from what was stored, and compares with dense attention over the same units.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from common import ROOT, fill, provenance
from torch import Tensor

from locret.backbone import AttentionCall, Backbone
from locret.channels import ChannelPruned, channel_scores, kept_channels
from locret.files import write_text
from locret.kernels.attention import reference_attention
from locret.kivi import KiviKeys
from locret.lowrank import LowRank, apply
from locret.storage import Affine, Codec, Dense, Stored, get_codec
from locret.stores import STORES, fixed_bytes, layer_stores, unit_bytes
from locret.tail import TailStored
from locret.tasks.build import build
from locret.tasks.filler import ProseFiller

QUERIES = 64
PAGE = ROOT / "docs" / "storage.md"
SHAPE = SimpleNamespace(num_layers=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, device=torch.device("meta"),
                        attention_modules=None)  # fmt: skip


class Layer(NamedTuple):
    q: Tensor  # rotated, the last queries, [1, Hq, 64, D]
    k: Tensor  # before RoPE, bfloat16, [1, Hkv, n, D]
    v: Tensor


class Capture:
    """A `LayerContext`: full attention that keeps what it is given."""

    def __init__(self, backbone: Backbone, n: int) -> None:
        self.rope, self.at = backbone.rope(n, n), torch.arange(n)
        self.layers: list[Layer] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        rotated, keys = self.rope.rotate(layer, q, self.at), self.rope.rotate(layer, k, self.at)
        self.layers.append(Layer(rotated[:, :, -QUERIES:], k.bfloat16(), v.bfloat16()))
        return reference_attention(rotated, keys, v, scale=call.scale).to(q.dtype)

    def output(self, index: int, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        """Attention of the last queries to stored units, [1, Hq, 64, D]; all units are in their past."""
        layer = self.layers[index]
        keys = self.rope.rotate(index, k.float(), at)
        groups = layer.q.shape[1] // k.shape[1]
        keys, v = (x.repeat_interleave(groups, 1).double() for x in (keys, v))
        return (layer.q.double() @ keys.mT * k.shape[-1] ** -0.5).softmax(-1) @ v


class Held(NamedTuple):
    k: Tensor
    v: Tensor
    nbytes: int
    units: int


Store = Callable[[int, Layer, Tensor | None], Held]  # layer, what it had, which units stay (all: None)


def plain(key: Codec, value: Codec) -> Store:
    codecs = key, value

    def store(index: int, layer: Layer, keep: Tensor | None) -> Held:
        stored = [codec.encode(x) for codec, x in zip(codecs, (layer.k, layer.v), strict=True)]
        if keep is not None:
            stored = [x.gather(keep) for x in stored]
        k, v = (codec.decode(x) for codec, x in zip(codecs, stored, strict=True))
        return Held(k, v, sum(x.nbytes for x in stored), k.shape[1] * k.shape[2])

    return store


def kivi(index: int, layer: Layer, keep: Tensor | None) -> Held:
    """Without dense units, which are a constant and not a price per unit: n is a multiple of the residual."""
    codec, n = KiviKeys(bits=2, group_size=32, residual=32), layer.k.shape[2]
    at, heads = torch.arange(n).expand(layer.k.shape[:3]), layer.k.shape[1]

    def settled(stored: TailStored, at: Tensor) -> TailStored:
        return codec.settle(stored, at, newest=n - 1, heads=None, num_heads=heads, queries=None)

    keys, values = settled(codec.encode(layer.k), at), Affine(2, 32).encode(layer.v)
    if keep is not None:
        kept = Stored(keys.parts).gather(keep)
        keys, values = settled(keys.like(kept.parts), at.gather(2, keep)), values.gather(keep)
    k, v = codec.decode(keys), Affine(2, 32).decode(values)
    return Held(k, v, keys.nbytes + values.nbytes, k.shape[1] * k.shape[2])


def think(index: int, layer: Layer, keep: Tensor | None) -> Held:
    """Half of the key channels, in rotation pairs, by the last queries (a pair's energy is the same when rotated)."""
    channels = kept_channels(channel_scores(layer.q, layer.k, paired=True), 0.5, paired=True)
    return plain(ChannelPruned(channels, layer.k.shape[-1]), Dense())(index, layer, keep)


def capture(backbone: Backbone, ids: Tensor) -> Capture:
    context = Capture(backbone, ids.shape[1])
    with torch.inference_mode():
        backbone.run(ids, context, logits=0)
    return context


def measure(store: Store, exact: Capture, keep: Tensor | None) -> tuple[float, float]:
    """Bytes per unit and the error against dense attention to the same units, means over layers."""
    errors, nbytes, units = [], 0, 0
    for index, layer in enumerate(exact.layers):
        held = store(index, layer, keep)
        nbytes, units = nbytes + held.nbytes, units + held.units
        at = torch.arange(layer.k.shape[2]) if keep is None else keep
        want_k, want_v = layer.k, layer.v
        if keep is not None:
            rows = keep[..., None].expand(*keep.shape, want_k.shape[-1])
            want_k, want_v = want_k.gather(2, rows), want_v.gather(2, rows)
        want, got = exact.output(index, want_k, want_v, at), exact.output(index, held.k, held.v, at)
        errors.append(float((got - want).norm() / want.norm()))
    return nbytes / units, sum(errors) / len(errors)


def stores_table() -> str:
    """Bytes of K and V at Llama-3.1-8B's shape; of stores that leave the newest units as they are, also those."""
    lines = ["| storage | bytes a unit | of dense | and of each KV head, not encoded yet |", "|---" * 4 + "|"]
    width, dtype = SHAPE.head_dim, SHAPE.dtype
    for name in STORES:
        layers = layer_stores(name, SHAPE)  # type: ignore[arg-type]
        unit = sum(unit_bytes(store, width, dtype) for store in layers) / len(layers)
        waiting = fixed_bytes(layers[0], width, dtype)
        whole = unit  # where groups span units: nothing is evicted, groups are full
        if isinstance(layers[0].k, KiviKeys):
            whole -= 2 * width * dtype.itemsize * (1 - 1 / layers[0].k.group_size)
        shown = [f"{unit:g}", f"{unit / (4 * width):.0%}"]
        if whole < unit:
            shown = [f"{whole:g} to {unit:g}", f"{whole / (4 * width):.0%} to {unit / (4 * width):.0%}"]
        lines.append(f"| `{name}` | {' | '.join(shown)} | "
                     + (f"at most {waiting:,}" if waiting else "") + " |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="tokens of the text; a multiple of 32")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--write", action="store_true", help="write the table of stores, which nothing is measured for")
    args = parser.parse_args()
    if args.write:
        fill(PAGE, "stores", stores_table())
        return
    backbone = Backbone.load()
    tokenizer = backbone.need_tokenizer()
    filler = ProseFiller.from_seed(0, tokenizer)
    sample = build("number", seed=0, length=args.length, tokenizer=tokenizer, filler=filler)
    ids = torch.tensor([sample.prompt_ids(tokenizer)])
    exact = capture(backbone, ids)
    few = torch.stack([torch.randperm(args.length - QUERIES, generator=torch.Generator().manual_seed(h))
                       [: args.length // 20].sort().values for h in range(backbone.num_kv_heads)])[None]  # fmt: skip

    ways: dict[str, Store] = {
        name: plain(get_codec(name), get_codec(name)) for name in ("dense", "int8", "int4", "int2")
    }
    for bits in (4, 2):
        codec = Affine(bits, fit="hqq")
        ways[f"int{bits}, HQQ"] = plain(codec, codec)  # the same groups: what moving the zero does
    ways |= {"KIVI, 2 bits": kivi, "ThinK, half of the key channels": think}
    lowered = apply(Backbone.load(), highest=backbone.head_dim, lowest=backbone.head_dim // 2)
    bases = [[LowRank(c.basis.bfloat16(), c.offset.bfloat16()) for c in pair] for pair in lowered]

    def lorc(index: int, layer: Layer, keep: Tensor | None) -> Held:
        """What the lowered projections would give for the same hidden states is the latent of the unit itself."""
        return plain(*bases[index])(index, layer, keep)

    ways[f"LoRC, rank {backbone.head_dim} falling to {backbone.head_dim // 2}"] = lorc
    rows = [row(name, store, exact, few) for name, store in ways.items()]
    print("| storage | bytes | error | bytes, kept 1/20 | error, kept 1/20 |\n|---|---|---|---|---|")
    for cell in rows:
        print("| {storage} | {bytes:.1f} | {error:.4f} | {bytes_kept:.1f} | {error_kept:.4f} |".format(**cell))
    if args.output:
        write_text(
            args.output, json.dumps({"provenance": provenance(), "length": args.length, "rows": rows}, indent=1) + "\n"
        )


def row(name: str, store: Store, exact: Capture, few: Tensor) -> dict[str, Any]:
    whole, kept = measure(store, exact, None), measure(store, exact, few)
    return dict(storage=name, bytes=whole[0], error=whole[1], bytes_kept=kept[0], error_kept=kept[1])


if __name__ == "__main__":
    main()
