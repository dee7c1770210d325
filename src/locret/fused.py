"""The decoder layers of the Llama shape in fewer kernels: the model's own weights, our own walk through them.

transformers runs a layer as some twenty small operations around four products. Most decoder families have the same
layer, whatever their class is called:

    x  = x + O . attention(Q n, K n, V n)      n = RMSNorm(x); Q, K, V with biases, or with norms per head, or neither
    x  = x + D . (silu(G n') * U n')           n' = RMSNorm(x)

`recognise` finds it by the names and types of the modules, takes the weights as they lie (nothing is copied or packed)
and then runs both ways on a few tokens: only if they agree is the walk used. Everything else - other norms or
activations, scaled residuals, experts, quantised weights, hooks - is left to transformers. Under tensor parallelism the
weights are this process's part, and what O and D give is summed over the processes (`parallel.Shard`).

Shapes: B batch, T tokens, M = B T rows, E hidden size, Hq/Hkv heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from locret.kernels.linear import Norm, gated, project, rms_norm
from locret.parallel import Shard, local_part

if TYPE_CHECKING:
    from locret.backbone import AttentionCall, Backbone, LayerContext

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Linear:
    """One of the model's projections."""

    weight: Tensor  # [N, E], or this process's part of it
    bias: Tensor | None
    whole: bool = True


@dataclass(frozen=True)
class FusedLayer:
    """The tensors of one layer."""

    norm: Norm
    qkv: tuple[Linear, ...]  # three, or one with q, k and v side by side
    head_norms: tuple[Norm, Norm] | None  # of q and of k, over D
    out: Linear
    post_norm: Norm
    gate_up: tuple[Linear, ...]  # two, or one with both side by side
    down: Linear
    call: AttentionCall


@dataclass(frozen=True)
class FusedModel:
    """What `Backbone.run` runs instead of the modules."""

    embedding: nn.Module
    layers: tuple[FusedLayer, ...]
    norm: Norm
    head: Linear
    heads: tuple[int, int, int]  # Hq, Hkv, D
    shard: Shard

    def run(self, ids: Tensor, context: LayerContext, *, logits: int) -> Tensor | None:
        """`Backbone.run`."""
        batch, length = ids.shape
        x = self.embedding(ids).flatten(0, 1)  # [M, E]
        for i, layer in enumerate(self.layers):
            x = self._attention(i, layer, x, (batch, length), context)
            x = self._mlp(layer, x)
        if logits == 0:
            return None
        last = x.view(batch, length, -1)[:, length - logits :].flatten(0, 1)
        out = project(last, [self.head.weight], biases=[self.head.bias], norm=self.norm)[0]
        out = self.shard.join(out, self.head.whole)
        return out.view(batch, logits, -1)

    def _attention(
        self, index: int, layer: FusedLayer, x: Tensor, shape: tuple[int, int], context: LayerContext
    ) -> Tensor:
        hq, hkv, dim = self.heads
        call, norm, n = layer.call, layer.norm, x
        if getattr(context, "wants_hidden", False):
            n, norm = rms_norm(x, layer.norm), None  # type: ignore[assignment]
            call = call._replace(hidden=n.view(*shape, -1))
        parts = project(n, [p.weight for p in layer.qkv], biases=[p.bias for p in layer.qkv], norm=norm)
        if len(parts) == 1:
            parts = list(parts[0].split([hq * dim, hkv * dim, hkv * dim], -1))
        q, k, v = (part.view(*shape, -1, dim) for part in parts)  # [B, T, H, D]
        if layer.head_norms is not None:
            q, k = rms_norm(q, layer.head_norms[0]), rms_norm(k, layer.head_norms[1])
        out = context.attend(index, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), call)
        out = out.transpose(1, 2).reshape(len(x), -1)
        return self._add(layer.out, out, x)

    def _mlp(self, layer: FusedLayer, x: Tensor) -> Tensor:
        return self._add(layer.down, gated(x, [p.weight for p in layer.gate_up], norm=layer.post_norm), x)

    def _add(self, linear: Linear, y: Tensor, x: Tensor) -> Tensor:
        """x + linear(y), written over x."""
        if self.shard.size == 1:
            return project(y, [linear.weight], biases=[linear.bias], residual=x)[0]
        return x.add_(self.shard.sum(project(y, [linear.weight])[0]))


def recognise(backbone: Backbone) -> FusedModel | None:
    """The walk for a model of this shape, or None: then transformers' modules run."""
    found = _find(backbone, backbone.calls)
    return found if found is not None and _agrees(backbone, found) else None


def _find(backbone: Backbone, calls: list[AttentionCall]) -> FusedModel | None:
    base: Any = backbone.model.base_model
    head: Any = backbone.model.get_output_embeddings()
    heads = (backbone.num_q_heads, backbone.num_kv_heads, backbone.head_dim)
    final = _norm(getattr(base, "norm", None))
    layers = [_layer(layer, call, heads) for layer, call in zip(getattr(base, "layers", []), calls, strict=False)]
    lm_head = _linear(head)
    plain = not any(hasattr(module, "_hf_hook") for module in backbone.model.modules())
    if final is None or lm_head is None or len(layers) != len(calls) or None in layers or not plain:
        return None
    if type(base.embed_tokens) is not nn.Embedding:
        return None
    found = tuple(x for x in layers if x is not None)
    if not all(_cut_alike(layer, backbone.shard.size > 1) for layer in found):
        return None
    return FusedModel(base.embed_tokens, found, final, lm_head, heads, backbone.shard)


def _layer(layer: Any, call: AttentionCall, heads: tuple[int, int, int]) -> FusedLayer | None:
    if {name for name, module in layer.named_children() if not isinstance(module, nn.Dropout)} != _LAYER:
        return None
    act = getattr(layer.mlp, "act_fn", None) or getattr(layer.mlp, "activation_fn", None)
    if type(act).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    qkv = _linears(attention, ("q_proj", "k_proj", "v_proj")) or _linears(attention, ("qkv_proj",))
    gate_up = _linears(mlp, ("gate_proj", "up_proj")) or _linears(mlp, ("gate_up_proj",))
    ends = _linears(attention, ("o_proj",)), _linears(mlp, ("down_proj",))
    norms = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
    if not qkv or not gate_up or not all(ends) or None in norms or any(p.bias is not None for p in gate_up):
        return None
    if sum(len(p.weight) for p in qkv) != (heads[0] + 2 * heads[1]) * heads[2]:
        return None
    per_head = None
    if hasattr(attention, "q_norm"):
        found = _norm(attention.q_norm), _norm(attention.k_norm)
        if found[0] is None or found[1] is None or len(found[0].weight) != heads[2]:
            return None
        per_head = (found[0], found[1])
    assert norms[0] is not None
    assert norms[1] is not None
    return FusedLayer(norms[0], qkv, per_head, ends[0][0], norms[1], gate_up, ends[1][0], call)


def _linears(module: Any, names: tuple[str, ...]) -> tuple[Linear, ...]:
    found = [_linear(getattr(module, name, None)) for name in names]
    return () if None in found else tuple(x for x in found if x is not None)


def _linear(module: Any) -> Linear | None:
    """Of a plain nn.Linear with plain or cut weights only: quantised and adapted ones are other types."""
    if type(module) is not nn.Linear or module.weight.is_meta:
        return None
    if type(module.weight) is nn.Parameter:
        return Linear(module.weight, module.bias)
    part = local_part(module.weight)
    return None if part is None or module.bias is not None else Linear(part, None, whole=False)


def _cut_alike(layer: FusedLayer, cut: bool) -> bool:
    """All of a layer's products are cut, or none is."""
    return all(part.whole is not cut for part in (*layer.qkv, layer.out, *layer.gate_up, layer.down))


def _norm(module: Any) -> Norm | None:
    """Of an RMSNorm with a weight; whether it multiplies the way we do is found by comparing outputs."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if type(weight) is not nn.Parameter or eps is None or getattr(module, "bias", None) is not None:
        return None
    return Norm(weight, float(eps))


class _Blend:
    """Attention that needs no cache and still mixes q, k and v of different tokens."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        return (q.roll(1, 2) + k.repeat_interleave(groups, 1)).tanh() + v.repeat_interleave(groups, 1)


@torch.no_grad()
def _agrees(backbone: Backbone, fused: FusedModel) -> bool:
    ids = torch.arange(3, 11, device=backbone.device)[None] % backbone.model.config.vocab_size
    theirs = backbone.run_modules(ids, _Blend(), logits=8)
    mine = fused.run(ids, _Blend(), logits=8)
    assert theirs is not None
    assert mine is not None
    allowed = _TOLERANCE.get(backbone.dtype, 0.0)
    return bool((mine.float() - theirs.float()).norm() <= allowed * theirs.float().norm())
