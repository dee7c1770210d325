"""Attention-Gate (arXiv:2410.12876): a small attention in every layer decides which units later queries may see.

Over what a layer's projections read, X [T, E], every KV head of the layer gets a flag per token:

    G = MHA'(X)        own query, key and value projections, no mask: a token is judged with all of its chunk in view
    p = sigmoid(W G + b)        flag = [p > 1/2]

Training has the language model's loss see the flags: a unit that is not flagged is hidden from the queries of later
chunks (a chunk sees itself), and the gradient passes the threshold as if the flag were p (straight-through):

    loss = cross entropy of all tokens behind the first chunk  +  weight * mean over layers |mean flag - rate|

The model is frozen. Published, the gate sees the whole prompt and hides units within it too; here a gate sees one
chunk, and what is hidden is hidden as inference does it, when the chunk is over. With one chunk as long as the prompt
the gate is the published one. The paper leaves the gate's sizes and the loss's weight open; both are ours.

Shapes: B batch, T tokens, C chunk, E hidden size, Hq/Hkv heads, G = Hq // Hkv, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from locret.backbone import AttentionCall, Backbone, Rope
from locret.errors import BackboneError, ConfigError, DataError, HeadsError
from locret.layerfile import LayerModules

_RANGE = 20.0  # a hidden unit's weight, in nats above the largest visible one, that its gradient may reach at most
_OPEN = 2.0  # the bias at the start: nearly everything is flagged


class Gate(nn.Module):
    """The gate of one layer."""

    def __init__(
        self, hidden_size: int, num_kv_heads: int, *, heads: int = 4, width: int = 32,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * heads * width, bias=False)
        self.out = nn.Linear(heads * width, num_kv_heads)
        for weight in (self.qkv.weight, self.out.weight):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
        nn.init.constant_(self.out.bias, _OPEN)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of p, fp32 [B, C, Hkv] (fp64 for fp64), of a chunk x [B, C, E].

        The last product is wide: scores in bf16 tie, and ties evict at random.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, C, width] each
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return functional.linear(mixed.to(wide), self.out.weight.to(wide), self.out.bias.to(wide))


class Gates(LayerModules):
    """The gates of all layers: `{layer}.qkv.weight` [3 heads width, E], `{layer}.out.weight` [Hkv, heads width] and
    `{layer}.out.bias` [Hkv]; the number of the gate's heads is in the metadata."""

    format: ClassVar[str] = "locret-attention-gate-1"
    contents: ClassVar[str] = "gates"
    made_by: ClassVar[str] = "locret.gate.train"
    keys: ClassVar[tuple[str, ...]] = ("qkv.weight", "out.weight", "out.bias")

    def about(self) -> dict[str, Any]:
        return {"heads": self[0].heads}

    @classmethod
    def layer(cls, tensors: dict[str, Tensor], about: dict[str, Any], path: Path) -> Gate:
        qkv, out = (tensors.get(f"0.{name}.weight", torch.empty(0)).shape for name in ("qkv", "out"))
        heads: Any = about.get("heads")
        sizes = len(qkv) == 2 and len(out) == 2 and qkv[0] == 3 * out[1]
        if not sizes or not isinstance(heads, int) or heads < 1 or out[1] % heads:
            raise HeadsError(f"{path}: qkv {list(qkv)}, out {list(out)}, {heads!r} heads; wanted [3 heads width, "
                             "hidden size], [KV heads, heads width] and a whole number of heads")  # fmt: skip
        return Gate(qkv[1], out[0], heads=heads, width=out[1] // heads)


def flags(logits: Tensor) -> Tensor:
    """Logits of p -> flags 0 or 1, through which the gradient passes as if they were p."""
    p = logits.sigmoid()
    return (p > 0.5).to(p.dtype) + p - p.detach()


def train(
    backbone: Backbone, samples: Iterable[Tensor], *, chunk: int, rate: float = 0.4, weight: float = 1.0,
    heads: int = 4, width: int = 32, learning_rate: float = 1e-3, seed: int = 0,
) -> tuple[Gates, list[tuple[float, float]]]:  # fmt: skip
    """Train one gate a layer. The model is frozen.

    Args:
        samples: token ids [1, T], T > chunk + 1; one optimiser step each. Attention takes [Hq, T, T] numbers a layer.
        chunk: tokens that a gate sees at once; `chunk_size` of the runs that will use it.
        rate: share of the units that should be flagged; published 0.4.
        weight: of the distance to it in the loss; ours.
        heads, width: sizes of a gate's attention; ours.
        learning_rate: of Adam; ours.
    Returns: the gates of all layers; of each step the loss, and the share of units flagged.
    Raises: ConfigError: a rate that is no share; BackboneError: softcaps or sliding windows; DataError: a short sample.
    """
    if not 0 < rate < 1:
        raise ConfigError(f"rate is {rate!r}; it must lie between 0 and 1, e.g. 0.4")
    generator, hidden_size = torch.Generator().manual_seed(seed), int(backbone.model.config.hidden_size)
    layers = [Gate(hidden_size, backbone.num_kv_heads, heads=heads, width=width, generator=generator)
              for _ in range(backbone.num_layers)]  # fmt: skip
    gates = Gates(layers, backbone.fingerprint()).to(backbone.device)
    optimizer = torch.optim.Adam(gates.parameters(), lr=learning_rate)
    steps = []
    for ids in samples:
        loss, flagged = gated_loss(backbone, ids, gates, chunk=chunk, rate=rate, weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps.append((float(loss.detach()), float(flagged)))
    return gates.requires_grad_(False), steps


def gated_loss(
    backbone: Backbone, ids: Tensor, gates: nn.ModuleList, *, chunk: int, rate: float, weight: float
) -> tuple[Tensor, Tensor]:
    """The loss at the top of this file, and the share of units that are flagged: two scalars."""
    total = ids.shape[1]
    if total < chunk + 2:
        raise DataError(f"a sample of {total} tokens; wanted at least chunk {chunk} + 2")
    context = GatedPass(backbone.rope(total, total), gates, chunk)
    logits = backbone.run(ids, context, logits=total - chunk)
    assert logits is not None
    text = functional.cross_entropy(logits[0, :-1].float(), ids[0, chunk + 1 :])
    shares = torch.stack(context.shares)  # [L]
    return text + weight * (shares - rate).abs().mean(), shares.mean().detach()


class GatedPass:
    """A `LayerContext`: a query sees its own chunk, and of those before it what the gate flagged.

    Attributes: shares: per layer, the mean flag.
    """

    wants_hidden = True

    def __init__(self, rope: Rope, gates: nn.ModuleList, chunk: int) -> None:
        self.rope, self.gates, self.chunk, self.shares = rope, gates, chunk, list[Tensor]()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        if call.softcap is not None or call.window is not None:
            raise BackboneError(
                f"layer {layer} has a softcap or a sliding window; the gates' trainer runs plain layers"
            )
        assert call.hidden is not None, "wants_hidden"
        gate = self.gates[layer]
        hidden = call.hidden.to(gate.out.weight.dtype)  # type: ignore[union-attr, arg-type]
        flag = flags(torch.cat([gate(part) for part in hidden.split(self.chunk, 1)], 1).transpose(1, 2))  # [1, Hkv, T]
        self.shares.append(flag.mean())
        at = torch.arange(q.shape[2], device=q.device)
        of = at // self.chunk
        causal, own = at[None] <= at[:, None], of[None] == of[:, None]
        seen = torch.where(own, 1.0, flag[:, :, None]) * causal  # [1, Hkv, T, T]: 1, 0, or a flag
        q, k = self.rope.rotate(layer, q, at), self.rope.rotate(layer, k, at)
        return hidden_attention(q, k, v, seen, call.scale)


def hidden_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Softmax attention with a factor per query and unit that may be 0; differentiable in the factor even there.

    Args: q [B, Hq, T, D], k, v [B, Hkv, T, D] rotated; seen: [B, Hkv, T, T], every row sees one unit or more.
    Returns: [B, Hq, T, D] in q's dtype.
    """
    groups = q.shape[1] // k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values, seen = (x.to(wide).repeat_interleave(groups, 1) for x in (k, v, seen))
    logits = q.to(wide) @ keys.mT * scale
    top = logits.detach().masked_fill(seen.detach() == 0, float("-inf")).amax(-1, keepdim=True)
    weights = (logits - top).clamp(max=_RANGE).exp() * seen
    return (weights @ values / weights.sum(-1, keepdim=True)).to(q.dtype)
