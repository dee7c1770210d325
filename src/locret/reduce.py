"""What becomes of units that are dropped: one unit that stands for all of them, or a unit per run of similar keys.

Every function here is pure: units in, fewer units out, each with a logit bias. Attention over merged units is

    out = sum_i exp(q.k_i * scale + bias_i) v_i / sum_i exp(q.k_i * scale + bias_i)

so that a unit that stands for N others weighs as much as they did when its bias is log N. A bias of -inf is no unit.

Means are taken over the keys that are given. The papers take rotated ones; means of keys before RoPE are a variant.

Shapes: B batch, Hkv KV heads, n units, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from locret.errors import ConfigError


@dataclass(frozen=True)
class Merged:
    """Units that stand for others."""

    k: Tensor  # [B, Hkv, n, D]
    v: Tensor  # [B, Hkv, n, D]
    bias: Tensor  # added to the unit's logits, fp32 (fp64 for fp64 units), [B, Hkv, n]


def compensate(k: Tensor, v: Tensor, bias: Tensor | None = None) -> Merged:
    """RazorAttention's compensation unit (arXiv:2407.15891): the mean of the dropped keys and values, bias log N.

    Exact where all dropped keys are equal. A compensation unit and its bias may be given again beside newly dropped
    units (`fold` does): the result is that of dropping them all at once, in whatever order they came.

    Args:
        k, v: dropped units, [B, Hkv, n, D].
        bias: log of how many tokens each stands for, [B, Hkv, n]; default 0, one each; -inf: not there (padding).
    Returns: one unit per sequence and head; where nothing was dropped its bias is -inf and it is zero.
    """
    wide = _wide(k)
    bias = k.new_zeros(k.shape[:3], dtype=wide) if bias is None else bias.to(wide)
    total = bias.logsumexp(-1, keepdim=True)  # [B, Hkv, 1]
    share = (bias - total.masked_fill(total.isneginf(), 0.0)).exp()[..., None]  # of no units: all zero, not NaN
    mean_k, mean_v = ((share * x.to(wide)).sum(2, keepdim=True).to(x.dtype) for x in (k, v))
    return Merged(mean_k, mean_v, total)


def fold(held: Merged, k: Tensor, v: Tensor) -> Merged:
    """The compensation unit `held` after more units k, v [B, Hkv, n, D] have been dropped."""
    new = held.bias.new_zeros(k.shape[:3])
    return compensate(torch.cat((held.k, k), 2), torch.cat((held.v, v), 2), torch.cat((held.bias, new), 2))


@dataclass(frozen=True)
class Runs(Merged):
    """All n units, of which those that are not `alive` have been merged into another and carry no meaning.

    How many stay differs between heads; the caller gathers `alive` into ragged lengths or a cap.
    """

    alive: Tensor  # bool, [B, Hkv, n]


def merge_runs(
    k: Tensor, v: Tensor, scores: Tensor, *, num_heavy: int, num_recent: int, threshold: float = 0.75,
    sigma: float = 5.0, count: bool = False, fixed: Tensor | None = None, most: int | None = None,
) -> Runs:  # fmt: skip
    """KVMerger (arXiv:2407.08454): runs of neighbours with similar keys become one unit each.

    Neighbours belong to one run while cos(k_i, k_i+1) > threshold. The unit with the highest score is the run's pivot
    p; the others count by a Gaussian of their distance to it, and the merged unit lies where the pivot lay:

        g_i = exp(-|k_p - k_i|^2 / (2 sigma^2))      k = sum g_i k_i / sum g_i      v alike

    Args:
        k, v: units in position order, [B, Hkv, n, D].
        scores: accumulated attention, [B, Hkv, n].
        num_heavy: units with the highest scores, recent ones aside, that are left as they are.
        num_recent: newest units that are left as they are.
        sigma: the paper derives it from g itself; a fixed 5 is reported near the best.
        count: give a unit that stands for N the bias log N. Then runs of equal keys are exact; the paper has no bias.
        fixed: units that are left as they are besides, bool [B, Hkv, n].
        most: how many units of a head may disappear; the most similar neighbours first. The paper has no end.
    Raises: ConfigError: heavy and recent units are more than n, or sigma is not above 0.
    """
    n = k.shape[2]
    if num_heavy < 0 or num_recent < 0 or num_heavy + num_recent > n:
        raise ConfigError(f"num_heavy {num_heavy} + num_recent {num_recent} must lie between 0 and the {n} units")
    if sigma <= 0:
        raise ConfigError(f"sigma is {sigma!r}; it must be above 0")
    wide = _wide(k)
    at = torch.arange(n, device=k.device)
    run = _run_of(k.to(wide), _free(scores, num_heavy, num_recent, fixed), threshold, most)  # [B, Hkv, n]
    best = scores.new_full(run.shape, float("-inf")).scatter_reduce(-1, run, scores, "amax").gather(-1, run)
    first_best = torch.where(scores == best, at, n)
    pivot = first_best.new_full(run.shape, n).scatter_reduce(-1, run, first_best, "amin").gather(-1, run)

    far = (k.to(wide) - _rows(k.to(wide), pivot)).pow(2).sum(-1)
    weight = (-far / (2 * sigma**2)).exp()  # 1 at the pivot
    weight = weight / torch.zeros_like(weight).scatter_add(-1, run, weight).gather(-1, run)
    merged_k, merged_v = (_sum_of(run, weight[..., None] * x.to(wide)).to(x.dtype) for x in (k, v))
    size = torch.zeros_like(weight).scatter_add(-1, run, torch.ones_like(weight)).gather(-1, run)
    return Runs(merged_k, merged_v, size.log() if count else torch.zeros_like(size), pivot == at)


def _free(scores: Tensor, num_heavy: int, num_recent: int, fixed: Tensor | None) -> Tensor:
    """Which units may be merged: bool, the shape of scores."""
    free = torch.ones_like(scores, dtype=torch.bool) if fixed is None else ~fixed
    free[..., scores.shape[-1] - num_recent :] = False
    heavy = scores.masked_fill(~free, float("-inf")).topk(num_heavy, -1).indices
    return free.scatter(-1, heavy, False)


def _run_of(k: Tensor, free: Tensor, threshold: float, most: int | None) -> Tensor:
    """The number of the run that each unit belongs to, int64 [B, Hkv, n]; ascending from 0."""
    similar = torch.cosine_similarity(k[:, :, 1:], k[:, :, :-1], dim=-1)
    joined = (similar > threshold) & free[..., 1:] & free[..., :-1]  # to the unit before it
    if most is not None and most < joined.shape[-1]:
        first = similar.masked_fill(~joined, float("-inf")).topk(most, -1).indices
        joined &= torch.zeros_like(joined).scatter(-1, first, True)
    return torch.cat((torch.zeros_like(free[..., :1], dtype=torch.int64), (~joined).cumsum(-1)), -1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index[..., None].expand_as(x))


def _sum_of(run: Tensor, x: Tensor) -> Tensor:
    """For every unit the sum of x [B, Hkv, n, D] over its run."""
    index = run[..., None].expand_as(x)
    return torch.zeros_like(x).scatter_add(2, index, x).gather(2, index)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
