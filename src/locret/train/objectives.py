"""What a score is compared with, and how: one class an objective.

    loss = mean over layers of objective.fit(scores, targets)  +  smoothness * sum over layers of
           mean (score[t+1] - score[t])^2

The paper writes one weight for both terms; the released code averages the first over layers and sums the second, so
against a per-layer mean its weight is 0.0025 L (0.08 for 32 layers). We keep what the code does, for all objectives.

`targets` sees the labels of the whole prompt; `fit` may then be asked for any run of its tokens (training with eviction
learns chunk by chunk). Selection is by rank within a head, so an objective may leave scale and offset of scores open.

Shapes: B batch, Hkv KV heads, P prompt tokens, T tokens of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """Regression on the label, SmoothL1 with beta 1 (the paper's; arXiv:2410.01805)."""

    label: ClassVar[str] = "max-logit"  # of labels.LABELS

    def targets(self, labels: Tensor) -> Tensor:
        """Labels [B, Hkv, P] -> what `fit` compares scores with, of the same shape."""
        return labels

    def fit(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Scores and targets [B, Hkv, T] -> scalar, a mean over tokens and heads."""
        return F.smooth_l1_loss(scores, targets)


@dataclass(frozen=True)
class LogMass(Objective):
    """Regression on the log of the attention mass that the answer gives a unit."""

    label: ClassVar[str] = "log-mass"


@dataclass(frozen=True)
class LogValue(Objective):
    """Regression on the log of the largest attention times the value's norm (after KVzip+; KVzap, arXiv:2601.07891)."""

    label: ClassVar[str] = "log-value"


@dataclass(frozen=True)
class Ranking(Objective):
    """Listwise ranking: KL(softmax(standardised labels) || softmax(scores)) over the run's tokens.

    ListNet's top-one probabilities (Cao et al. 2007), with labels standardised per head and prompt, because the
    softmax of raw logits would put everything on one token. 0 where scores equal them but for an offset.
    """

    def targets(self, labels: Tensor) -> Tensor:
        spread = labels.std(-1, keepdim=True, correction=0)
        return (labels - labels.mean(-1, keepdim=True)) / spread.clamp_min(1e-6)

    def fit(self, scores: Tensor, targets: Tensor) -> Tensor:
        wanted, got = targets.log_softmax(-1), scores.log_softmax(-1)
        return (wanted.exp() * (wanted - got)).sum(-1).mean()


@dataclass(frozen=True)
class Membership(Objective):
    """Is the unit among the label's top share of its prompt? Cross-entropy, both classes weighing the same."""

    share: float = 0.1

    def targets(self, labels: Tensor) -> Tensor:
        count = max(1, round(self.share * labels.shape[-1]))
        return torch.zeros_like(labels).scatter_(-1, labels.topk(count).indices, 1.0)

    def fit(self, scores: Tensor, targets: Tensor) -> Tensor:
        weight = torch.where(targets > 0, 0.5 / self.share, 0.5 / (1 - self.share))
        return F.binary_cross_entropy_with_logits(scores, targets, weight)


OBJECTIVES: dict[str, type[Objective]] = {
    "paper": Objective,
    "log-mass": LogMass,
    "log-value": LogValue,
    "ranking": Ranking,
    "top-k": Membership,
}


def make_objective(name: str, *, top_share: float) -> Objective:
    """The objective called `name`."""
    kind = OBJECTIVES[name]
    return kind(share=top_share) if issubclass(kind, Membership) else kind()


def layer_loss(
    scores: Tensor, targets: Tensor, num_layers: int, smoothness: float, objective: Objective | None = None
) -> Tensor:
    """One layer's part of the loss at the top of this file: scores, targets [B, Hkv, T] -> scalar."""
    loss = (objective or Objective()).fit(scores, targets) / num_layers
    if smoothness and scores.shape[-1] > 1:
        loss = loss + smoothness * scores.diff(dim=-1).square().mean()
    return loss
