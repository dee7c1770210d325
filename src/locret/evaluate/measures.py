"""Continuous measures: how far a compressed cache is from the full one where exact match is too coarse to tell.

All of them are teacher-forced on a known text, so that two caches are asked about the same tokens.

Shapes: T tokens of the text, V vocabulary, Hkv KV heads, S kept units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distance:
    """One text under two caches.

    Attributes:
        nll: mean negative log-likelihood of the text's tokens, in nats a token. exp(nll) is the perplexity.
        delta: nll minus the full cache's; 0 for the full cache itself.
        kl: mean over tokens of KL(full || this) of the next-token distributions, in nats; 0 for the full cache.
        agreement: share of tokens where both caches have the same likeliest next token; 1 for the full cache.
    The last three are None where no full cache was run.
    """

    nll: float
    delta: float | None = None
    kl: float | None = None
    agreement: float | None = None


def distance(logits: Tensor, targets: Tensor, full: Tensor | None) -> Distance:
    """Args: logits, full: of the two caches at the same places, [T, V];  targets: the text, int64 [T], T >= 1."""
    own = _log_probs(logits)
    nll = _nll(own, targets)
    if full is None:
        return Distance(nll)
    reference = _log_probs(full)
    kl = (reference.exp() * (reference - own)).sum(-1).mean().item()
    same = (reference.argmax(-1) == own.argmax(-1)).double().mean().item()
    return Distance(nll, nll - _nll(reference, targets), kl, same)


def gold_kept(positions: Tensor, gold: Tensor) -> Tensor:
    """How many gold tokens each KV head still holds.

    Args:    positions: original positions of the kept units, int64 [Hkv, S];  gold: token positions, int64 [N].
    Returns: int64 [Hkv], each 0 .. N.
    """
    return torch.isin(positions, gold.to(positions.device)).sum(-1)


def _log_probs(logits: Tensor) -> Tensor:
    """In float32, or float64 where the model is."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _nll(log_probs: Tensor, targets: Tensor) -> float:
    return -log_probs.gather(-1, targets[:, None].to(log_probs.device)).mean().item()
