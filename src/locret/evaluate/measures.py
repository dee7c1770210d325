"""Continuous measures: how far a compressed cache is from the full one where exact match is too coarse to tell.

All of them are teacher-forced on a known text, so that two caches are asked about the same tokens.

Shapes: B rows, T tokens of the text, V vocabulary, Hkv KV heads, S kept units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TOKENS = 1024  # compared at once: three float32 tensors [_TOKENS, V]


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


def distances(
    logits: Sequence[Tensor], targets: Sequence[Sequence[int]], full: Sequence[Tensor] | None
) -> list[Distance]:
    """For many texts at once, so that the device is asked for numbers once and not a few times a text.

    Args: logits, full: of the two caches at the same places, [T, V] a text;  targets: the texts, T >= 1 tokens each.
    """
    sizes = [len(text) for text in targets]
    device = logits[0].device
    own = torch.cat(list(logits))
    text = torch.tensor([token for target in targets for token in target], device=device)
    reference = None if full is None else torch.cat(list(full)).to(device)
    parts = [
        _by_token(
            own[at : at + _TOKENS], text[at : at + _TOKENS], None if reference is None else reference[at : at + _TOKENS]
        )
        for at in range(0, len(text), _TOKENS)
    ]
    rows = torch.cat(parts, dim=1).cpu().split(sizes, dim=1)
    means = [row.mean(dim=1).tolist() for row in rows]
    if full is None:
        return [Distance(nll) for (nll,) in means]
    return [Distance(nll, nll - other, kl, same) for nll, other, kl, same in means]


def gold_kept(positions: Tensor, gold: Tensor) -> Tensor:
    """How many gold tokens each KV head still holds.

    Args:    positions: original positions of the kept units, int64 [B, Hkv, S], -1: none;  gold: bool [B, T].
    Returns: int64 [B, Hkv].
    """
    marks = gold[:, None].expand(-1, positions.shape[1], -1).gather(2, positions.clamp(min=0))
    return (marks & (positions >= 0)).sum(-1)


def _by_token(logits: Tensor, text: Tensor, full: Tensor | None) -> Tensor:
    """nll and, against a full cache, its nll, KL(full || this) and sameness of each token, float64 [1 or 4, T]."""
    own = _log_probs(logits)
    nll = _nll(own, text)
    if full is None:
        return nll[None]
    reference = _log_probs(full)
    kl = (reference.exp() * (reference - own)).sum(-1).double()
    same = (reference.argmax(-1) == own.argmax(-1)).double()
    return torch.stack((nll, _nll(reference, text), kl, same))


def _log_probs(logits: Tensor) -> Tensor:
    """In float32, or float64 where the model is."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _nll(log_probs: Tensor, text: Tensor) -> Tensor:
    return -log_probs.gather(-1, text[:, None])[:, 0].double()
