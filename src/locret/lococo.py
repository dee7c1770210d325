"""LoCoCo (arXiv:2406.05317): units that are not heavy hitters are merged, by learned weights, into a few slots.

Of a layer's units the `budget - slots` with the highest scores stay as they are. The m others, the candidates X,
become `slots` merged units:

    W_keep = one-hot rows of the candidates with the highest scores, in position order
    W_conv = softmax over the candidates of ReLU(Conv1d([K; V]))        2 D channels in, `slots` out, kernel 21
    W      = (1 - lambda) W_keep + lambda W_conv                         lambda learned, per layer, 0.5 at first
    K' = W K,  V' = W V

so lambda = 0 is plain eviction at the same budget. A layer's convolution is shared by its KV heads. The published
code merges rotated keys and puts merged units behind the heavy hitters. Here keys are merged before RoPE, and a
merged unit lies where the candidate of its row of W_keep lay: in the trainer as in the cache, which numbers units
anew, so that mergers are used as they were trained. Scores are column sums of the attention of the latest chunk,
averaged over the query group.

Shapes: B batch, Hq/Hkv heads, n units, m candidates, D head dim, T tokens.
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
from locret.kernels.attention import prefix_causal_attention
from locret.layerfile import LayerModules
from locret.reduce import Merged


class ConvMerge(nn.Module):
    """The merging weights of one layer."""

    def __init__(
        self, head_dim: int, slots: int, *, kernel_size: int = 21, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if slots < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(
                f"slots {slots} and kernel_size {kernel_size}: wanted at least one slot and an odd kernel"
            )
        self.slots = slots
        self.conv = nn.Conv1d(2 * head_dim, slots, kernel_size, padding="same")
        nn.init.normal_(self.conv.weight, generator=generator)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.mix = nn.Parameter(torch.tensor(0.5))  # lambda

    def best(self, scores: Tensor) -> Tensor:
        """The candidates of W_keep, in position order: indices [B, Hkv, slots]."""
        return _best(scores, self.slots).sort(-1).values

    def weights(self, k: Tensor, v: Tensor, scores: Tensor) -> Tensor:
        """W [B, Hkv, slots, m] for candidates k, v [B, Hkv, m, D], m >= slots, with scores [B, Hkv, m]."""
        keep = functional.one_hot(self.best(scores), k.shape[2]).to(self.conv.weight.dtype)
        both = torch.cat((k, v), -1).flatten(0, 1).mT.to(self.conv.weight.dtype)  # [B Hkv, 2 D, m]
        learned = functional.relu(self.conv(both)).softmax(-1).unflatten(0, k.shape[:2])
        return torch.lerp(keep, learned, self.mix)

    def forward(self, k: Tensor, v: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Merged keys and values [B, Hkv, slots, D] of the candidates."""
        weights = self.weights(k, v, scores)
        key, value = ((weights @ x.to(weights.dtype)).to(x.dtype) for x in (k, v))
        return key, value


class Mergers(LayerModules):
    """The mergers of all layers: `{layer}.conv.weight` [slots, 2 D, kernel], `{layer}.conv.bias` [slots] and
    `{layer}.mix`."""

    format: ClassVar[str] = "locret-lococo-1"
    contents: ClassVar[str] = "mergers"
    made_by: ClassVar[str] = "locret.lococo.train"
    keys: ClassVar[tuple[str, ...]] = ("conv.weight", "conv.bias", "mix")

    @property
    def slots(self) -> int:
        """Merged units of a layer and KV head."""
        return int(self[0].slots)  # type: ignore[arg-type]

    @classmethod
    def layer(cls, tensors: dict[str, Tensor], about: dict[str, Any], path: Path) -> ConvMerge:
        shape = tensors.get("0.conv.weight", torch.empty(0)).shape
        if len(shape) != 3 or shape[0] < 1 or shape[1] % 2 or shape[2] % 2 == 0:
            raise HeadsError(f"{path}: 0.conv.weight is {list(shape)}; wanted [slots, 2 D, odd kernel]")
        return ConvMerge(shape[1] // 2, shape[0], kernel_size=shape[2])


def compress(
    k: Tensor, v: Tensor, scores: Tensor, budget: int, merge: ConvMerge, *, fixed: Tensor | None = None
) -> tuple[Tensor, Tensor, Merged]:
    """`budget` units for n: the heavy hitters as they are, and merged ones in the places of the best of the others.

    Args:   k, v: [B, Hkv, n, D], n >= budget;  scores: [B, Hkv, n];  fixed: bool [B, Hkv, n], heavy hitters by force.
    Returns: the units that stay, ascending [B, Hkv, budget]; which of the n are merged, [B, Hkv, slots]; and what all n
        become, without a bias.
    Raises: ConfigError: a budget that the merger's slots do not fit, or above n.
    """
    n, heavy = k.shape[2], budget - merge.slots
    if heavy < 0 or budget > n:
        raise ConfigError(f"budget {budget}: wanted at least the {merge.slots} merged slots and at most the {n} units")
    ranked = scores if fixed is None else scores.masked_fill(fixed, float("inf"))
    kept = _best(ranked, heavy)
    chosen = torch.zeros_like(scores, dtype=torch.uint8).scatter(-1, kept, 1)
    rest = chosen.argsort(dim=-1, stable=True)[..., : n - heavy]  # candidates in position order
    candidates = scores.gather(-1, rest)
    key, value = merge(_rows(k, rest), _rows(v, rest), candidates)
    places = rest.gather(-1, merge.best(candidates))
    at = places[..., None].expand_as(key)
    bias = torch.zeros(scores.shape, dtype=torch.float32, device=k.device)
    merged = Merged(k.scatter(2, at, key), v.scatter(2, at, value), bias)
    return torch.cat((kept, places), -1).sort(-1).values, places, merged


def train(
    backbone: Backbone, samples: Iterable[Tensor], *, prompt_len: int, budget: int, keep_share: float = 0.5,
    kernel_size: int = 21, learning_rate: float = 1e-3, seed: int = 0,
) -> tuple[Mergers, list[float]]:  # fmt: skip
    """Train one merger a layer for the language-model loss of what follows a compressed prompt. The model is frozen.

    Args:
        samples: token ids [1, T], T > prompt_len + 1; one optimiser step each (published: 1,000 of 512 + 512 tokens).
        prompt_len: the first tokens, read whole, then compressed to `budget` units a layer and KV head.
        keep_share: share of the budget that heavy hitters take; published 0.5, in Locret's comparison 0.875.
        learning_rate: of Adam; ours.
    Returns: the mergers of all layers, and the loss of each step.
    Raises: BackboneError: softcaps or sliding windows; DataError: a sample that is too short.
    """
    slots = budget - int(budget * keep_share)
    generator = torch.Generator().manual_seed(seed)
    layers = [ConvMerge(backbone.head_dim, slots, kernel_size=kernel_size, generator=generator)
              for _ in range(backbone.num_layers)]  # fmt: skip
    mergers = Mergers(layers, backbone.fingerprint()).to(backbone.device)
    optimizer = torch.optim.Adam(mergers.parameters(), lr=learning_rate)
    losses = []
    for ids in samples:
        loss = follow_loss(backbone, ids, mergers, prompt_len=prompt_len, budget=budget)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return mergers.requires_grad_(False), losses


def follow_loss(backbone: Backbone, ids: Tensor, mergers: nn.ModuleList, *, prompt_len: int, budget: int) -> Tensor:
    """Mean cross-entropy of the tokens behind the prompt, read through its compressed units: a scalar."""
    total = ids.shape[1]
    if total < prompt_len + 2:
        raise DataError(f"a sample of {total} tokens; wanted at least prompt_len {prompt_len} + 2")
    context = _CompressedPrompt(backbone.rope(total, total), prompt_len, budget, mergers)
    logits = backbone.run(ids, context, logits=total - prompt_len)
    assert logits is not None
    return functional.cross_entropy(logits[0, :-1].float(), ids[0, prompt_len + 1 :])


class _CompressedPrompt:
    """A `LayerContext`: the prompt sees itself whole, what follows sees the compressed prompt and itself."""

    def __init__(self, rope: Rope, prompt_len: int, budget: int, mergers: nn.ModuleList) -> None:
        self.rope, self.prompt_len, self.budget, self.mergers = rope, prompt_len, budget, mergers

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        if call.softcap is not None or call.window is not None:
            raise BackboneError(
                f"layer {layer} has a softcap or a sliding window; the LoCoCo trainer runs plain layers"
            )
        p, size = self.prompt_len, min(self.budget, self.prompt_len)
        at = torch.arange(q.shape[2], device=q.device)
        q_prompt, k_prompt = (self.rope.rotate(layer, x[:, :, :p], at[:p]).contiguous() for x in (q, k))
        keys, values = k[:, :, :p], v[:, :, :p]
        prompt_out = prefix_causal_attention(q_prompt, k_prompt, values.contiguous(), scale=call.scale)
        if p > size:
            scores = column_sums(q_prompt, k_prompt, call.scale)
            keep, _, held = compress(keys, values, scores, size, self.mergers[layer])  # type: ignore[arg-type]
            keys, values = _rows(held.k, keep), _rows(held.v, keep)
        after = at[p:] - p + size  # numbered anew, as the cache does
        q, own = (self.rope.rotate(layer, x[:, :, p:], after) for x in (q, k))
        keys = self.rope.rotate(layer, keys, at[:size])
        return torch.cat((prompt_out, _follow(q, keys, values, own, v[:, :, p:], call.scale)), 2)


def column_sums(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention that each of n keys gets from n causal queries, summed over them, mean over the group: [B, Hkv, n].

    Materialises [B, Hq, n, n]: the trainer's prompts are short.
    """
    n, groups = k.shape[2], q.shape[1] // k.shape[1]
    logits = q.float() @ k.float().repeat_interleave(groups, 1).mT * scale
    later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    sums = logits.masked_fill(later, float("-inf")).softmax(-1).sum(-2)
    return sums.unflatten(1, (-1, groups)).mean(2).detach()


def _follow(q: Tensor, keys: Tensor, values: Tensor, own_k: Tensor, own_v: Tensor, scale: float) -> Tensor:
    """T queries over units that all of them see, and causally over their own; differentiable."""
    t, seen, groups = q.shape[2], keys.shape[2], q.shape[1] // keys.shape[1]
    k, v = (torch.cat(pair, 2).repeat_interleave(groups, 1) for pair in ((keys, own_k), (values, own_v)))
    mask = torch.ones(t, seen + t, dtype=torch.bool, device=q.device).tril(seen)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the highest scores; of equal ones the first: merged units may share a score."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))
