"""How good heads are without running the model on them: what they would keep, against what the answers looked at.

overlap     of the label's top share of a prompt's units, the part that is in the scores' top share
retention   of the units of a sample's gold spans, the part that is in the scores' top share (samples that name any)

Both are means over samples, per layer and KV head; `Group` spreads the samples over processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from locret.data import Sample
from locret.heads import HeadInput, RetainingHeads
from locret.train.distributed import Group
from locret.train.passes import LabelPass

OVERLAP_SHARE = 0.1  # the metric of the release: how many of the label's top 10 % the scores find


@dataclass(frozen=True)
class Evaluation:
    """Means over samples. Shares of the prompt -> mean over learned layers and heads."""

    per_head: Tensor  # overlap at OVERLAP_SHARE, [L, Hkv]
    overlap: float
    overlap_at: dict[float, float]
    retention_at: dict[float, float]  # empty: no sample names gold spans


def evaluate(
    heads: RetainingHeads,
    run: LabelPass,
    samples: Sequence[Sample],
    budgets: Sequence[float],
    group: Group | None = None,
) -> Evaluation:
    """Measure `heads` on `samples`, one label pass each."""
    group = group or Group()
    shares = list(dict.fromkeys([OVERLAP_SHARE, *budgets]))
    shape = (len(shares), heads.config.num_layers, heads.config.num_kv_heads)
    overlap, retention = torch.zeros(shape), torch.zeros(shape)  # fp32 on the CPU; layers may lie on many devices
    marked = torch.zeros(1)
    here = heads.shard.part(torch.arange(shape[2]), 0)  # under tensor parallelism the others have the other heads
    for start in range(0, len(samples), group.readers):
        mine = start + group.reader
        if mine >= len(samples):
            if run.together:
                run(samples[0], lambda layer, inputs, labels: None)  # the others need this process's weights
            continue
        gold = _gold_mask(samples[mine], run.max_length)
        found = _measured(heads, run, samples[mine], gold, shares)
        for layer, (parts, kept) in found.items():  # here, and only here, the device is waited for
            overlap[:, layer, here] += parts.cpu()
            if kept is not None:
                retention[:, layer, here] += kept.cpu()
        marked += (gold is not None) / group.share
    group.add([overlap, retention, marked])
    overlap /= len(samples)
    learned = list(run.layers)

    def at(values: Tensor) -> dict[float, float]:
        return {share: values[shares.index(share)][learned].mean().item() for share in budgets}

    return Evaluation(
        per_head=overlap[0],
        overlap=overlap[0][learned].mean().item(),
        overlap_at=at(overlap),
        retention_at=at(retention / marked) if marked.item() else {},
    )


def _measured(
    heads: RetainingHeads, run: LabelPass, sample: Sample, gold: Tensor | None, shares: Sequence[float]
) -> dict[int, tuple[Tensor, Tensor | None]]:
    """By layer: overlap and, with gold spans, retention, [shares, Hkv] each, on the layer's device."""
    found: dict[int, tuple[Tensor, Tensor | None]] = {}

    def visit(layer: int, inputs: HeadInput, labels: Tensor) -> None:
        scores = heads.score(layer, *inputs)
        parts = torch.stack([top_overlap(scores, labels, share).mean(0) for share in shares])
        found[layer] = parts, None if gold is None else _retained(scores, gold.to(scores.device), shares)

    run(sample, visit)
    return found


def top_overlap(scores: Tensor, labels: Tensor, share: float = OVERLAP_SHARE) -> Tensor:
    """The share of the labels' top positions that are among the scores' top positions: [..., T] twice -> [...]."""
    count = max(1, round(share * labels.shape[-1]))
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count).indices, True)
    return chosen.gather(-1, labels.topk(count).indices).float().mean(-1)


def _gold_mask(sample: Sample, length: int) -> Tensor | None:
    mask = torch.zeros(min(len(sample.prompt_ids), length), dtype=torch.bool)
    for start, stop in sample.gold:
        mask[start:stop] = True
    return mask if bool(mask.any()) else None


def _retained(scores: Tensor, gold: Tensor, shares: Sequence[float]) -> Tensor:
    """scores [1, Hkv, P], gold bool [P] -> [shares, Hkv]."""
    parts = []
    for share in shares:
        count = max(1, round(share * scores.shape[-1]))
        kept = torch.zeros_like(scores[0], dtype=torch.bool).scatter_(-1, scores[0].topk(count).indices, True)
        parts.append((kept & gold).sum(-1) / gold.sum())
    return torch.stack(parts)
