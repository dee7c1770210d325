"""Training targets of the retaining heads, from queries, keys and values, without an attention matrix.

What a prompt unit is worth to an answer, three ways. p runs over the answer's tokens, g over the query heads that share
a KV head, z = the logit (scaled, softcapped), a = softmax of z over everything that p may see, n_p = how much that is:

    max-logit   max over p, g of z[g, p, t]                            Locret (arXiv:2410.01805), CIS label
    log-mass    log of the mean over p, g of n_p a[g, p, t]            what softmax leaves of it, over all answer tokens
    log-value   log of the max over p, g of n_p a[g, p, t] |v_t|       after KVzip+ (KVzap, arXiv:2601.07891)

The factor n_p makes the last two independent of length: 0 is uniform attention. KVzip+ takes the norm of W_O v over the
norm of the hidden state; we take that of v, which needs no weights of the backbone.

A sample may hold several answers (the assistant's turns). Each looks at everything before its own start, as if the
conversation ended with it; a unit's label is the largest that any of these answers gives it.

Shapes: B batch, T tokens, Hq / Hkv query / KV heads, G = Hq // Hkv, D head dim, A answer tokens, P prompt tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from locret.errors import DataError, unknown
from locret.kernels.label_max import BLOCK_ELEMENTS, block_shape, label_max

LABELS = ("max-logit", "log-mass", "log-value")
Span = tuple[int, int]  # [start, stop) of an answer's tokens


def importance_labels(
    q: Tensor,
    k: Tensor,
    prompt_len: int,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> Tensor:
    """Causal importance labels: the largest logit any answer query gives each prompt key ("max-logit", one answer).

    Locret (arXiv:2410.01805), CIS label: S[k]_j = max over answer p of (Q_j K_j^T)[p, k], also over the G query heads
    sharing KV head j. The paper's formula has no scale; the released code scales by D**-0.5, and so do we (`scale`).
    A softcap is monotone, so it is applied once, after the maximum.

    Args:    q: post-RoPE, [B, Hq, T, D];  k: post-RoPE, [B, Hkv, T, D];  prompt_len: in 1..T-1;
             scale: None is D**-0.5. The answer is q[:, :, prompt_len:].
    Returns: fp32 pre-softmax logits, [B, Hkv, prompt_len].
    Raises:  DataError: no prompt or no answer tokens, so no label exists.
    """
    length = q.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    _check_shapes(q, k, [(prompt_len, length)])
    return _max_logit(q, k, (prompt_len, length), scale, softcap, block_elements).float()


def attention_labels(
    kind: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    answers: Sequence[Span],
    scale: float,
    *,
    softcap: float | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> Tensor:
    """Labels of one `kind` of LABELS for every token before the last answer.

    Args:    q, k, v: post-RoPE, [B, Hq, T, D] and [B, Hkv, T, D];  answers: spans in ascending order, not overlapping;
             scale: positive;  block_elements: logits alive at once (the Triton kernel needs none).
    Returns: fp32, [B, Hkv, P], P = start of the last answer.
    Raises:  DataError: no prompt or no answer tokens. ConfigError: an unknown kind.
    """
    if kind not in LABELS:
        raise unknown("label", kind, LABELS)
    _check_shapes(q, k, answers)
    labels: Tensor | None = None
    for answer in reversed(answers):
        if kind == "max-logit":
            one = _max_logit(q, k, answer, scale, softcap, block_elements)
        else:
            one = _log_attention(kind, q, k, v, answer, scale, softcap, block_elements)
        if labels is None:
            labels = one
        else:
            head = labels[..., : answer[0]]
            torch.maximum(head, one, out=head)
    assert labels is not None
    return labels.float()


def _check_shapes(q: Tensor, k: Tensor, answers: Sequence[Span]) -> None:
    length = q.shape[2]
    assert (q.shape[1] % k.shape[1], *k.shape[2:]) == (0, length, q.shape[3]), (q.shape, k.shape)
    for start, stop in answers:
        if not 0 < start < stop <= length:
            raise DataError(
                f"prompt_len is {start} of {stop} tokens; labels need 1 to {length - 1}: "
                "at least one prompt token, and one answer token that looks back at it"
            )


def _max_logit(q: Tensor, k: Tensor, answer: Span, scale: float, softcap: float | None, block_elements: int) -> Tensor:
    start, stop = answer
    labels = label_max(q[:, :, start:stop], k[:, :, :start], scale, block_elements=block_elements)
    return labels if softcap is None else softcap * torch.tanh(labels / softcap)


# ---------------------------------------------------------------------- after the softmax


def _log_attention(
    kind: str, q: Tensor, k: Tensor, v: Tensor, answer: Span, scale: float, softcap: float | None, block_elements: int
) -> Tensor:
    """Two passes over blocks: every row's log of its softmax denominator, then the reduction over rows."""
    start, stop = answer
    batch, num_kv = k.shape[:2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = q[:, :, start:stop].unflatten(1, (num_kv, -1)).flatten(2, 3).to(dtype)  # [B, Hkv, G A, D]
    at = torch.arange(start, stop, device=q.device).repeat(rows.shape[2] // (stop - start))  # [G A], positions
    row_step, key_step = block_shape(rows.shape[2], stop, block_elements // (batch * num_kv))
    # log of (denominator / n_p), [B, Hkv, G A]
    shift = torch.cat(
        [
            _denominator(part, k[:, :, :stop], where, scale, softcap, key_step) - (where + 1).to(dtype).log()
            for part, where in zip(rows.split(row_step, 2), at.split(row_step))
        ],
        dim=2,
    )
    reduced = []
    for keys in k[:, :, :start].to(dtype).split(key_step, dim=2):
        parts = [
            _reduce(kind, _logits(part, keys, scale, softcap) - moved[..., None])
            for part, moved in zip(rows.split(row_step, 2), shift.split(row_step, 2))
        ]
        reduced.append(_reduce(kind, torch.stack(parts, 2)))
    labels = torch.cat(reduced, dim=2)
    if kind == "log-mass":
        return labels - math.log(rows.shape[2])
    # a value of exactly zero carries nothing; the smallest normal number stands for it, so that the label is finite
    return labels + v[:, :, :start].to(dtype).norm(dim=-1).clamp_min(torch.finfo(dtype).tiny).log()


def _logits(rows: Tensor, keys: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = (rows @ keys.mT).mul_(scale)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _denominator(rows: Tensor, k: Tensor, at: Tensor, scale: float, softcap: float | None, key_step: int) -> Tensor:
    """log of the sum over visible keys of exp(logit), a block of keys at a time: [B, Hkv, R]."""
    total: Tensor | None = None
    for first, keys in _pieces(k, key_step):
        logits = _logits(rows, keys.to(rows.dtype), scale, softcap)
        position = torch.arange(first, first + keys.shape[2], device=k.device)
        part = logits.masked_fill_(position > at[:, None], float("-inf")).logsumexp(-1)
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None
    return total


def _pieces(k: Tensor, step: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, k.shape[2], step):
        yield first, k[:, :, first : first + step]


def _reduce(kind: str, values: Tensor) -> Tensor:
    return values.logsumexp(2) if kind == "log-mass" else values.amax(2)
