"""Intervals and tests for scores of the same samples under several variants.

Everything is seeded: the same scores give the same intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
_RESAMPLES = 2000
_PERMUTATIONS = 10_000
_EXACT = 14  # up to so many differences all sign patterns are counted
_SEED = 20241003


def mean_interval(scores: Sequence[float]) -> Interval:
    """95 % interval of a mean of scores 0..100: Wilson's where every score is 0 or 100, else a bootstrap's."""
    if is_binary(scores):
        low, high = wilson(sum(score == 100.0 for score in scores), len(scores))
        return 100 * low, 100 * high
    return bootstrap(scores)


def tasks_interval(strata: Sequence[Sequence[float]]) -> Interval:
    """95 % interval of the mean over tasks of their means.

    Equally many scores of 0 or 100 a task: Wilson's for all of them together, which has a width where every answer is
    right and is a little too wide where tasks differ. Otherwise a bootstrap that resamples every task on its own.
    """
    pooled = [score for values in strata for score in values]
    if len({len(values) for values in strata}) == 1 and is_binary(pooled):
        return mean_interval(pooled)
    return stratified_bootstrap(strata)


def is_binary(scores: Sequence[float]) -> bool:
    return all(score in (0.0, 100.0) for score in scores)


def wilson(right: int, n: int, z: float = 1.959964) -> Interval:
    """95 % interval of a share (Wilson 1927): stays inside 0..1 and has a width at 0 and 1."""
    p, w = right / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + w / (4 * n))
    return max(0.0, (p + w / 2 - half) / (1 + w)), min(1.0, (p + w / 2 + half) / (1 + w))


def bootstrap(values: Sequence[float]) -> Interval:
    """95 % percentile interval of the mean. The draws depend on the number of values only, so that two variants of the
    same samples are resampled alike, and the interval of their differences is a paired one."""
    return stratified_bootstrap([values])


def stratified_bootstrap(strata: Sequence[Sequence[float]]) -> Interval:
    """95 % interval of the mean over strata (tasks) of the means in them; every stratum is resampled on its own."""
    means = np.zeros(_RESAMPLES)
    for at, values in enumerate(strata):
        array = np.asarray(values, dtype=np.float64)
        draws = np.random.default_rng((_SEED, at)).integers(0, len(array), (_RESAMPLES, len(array)))
        means += array[draws].mean(axis=1) / len(strata)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def paired_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of "no difference" between scores of the same samples.

    McNemar's exact test where all scores are 0 or 100, else a sign-flip permutation test of the mean difference (exact
    for up to 14 samples that differ, 10,000 random flips beyond).
    """
    assert len(a) == len(b)
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    differences = differences[differences != 0]
    if len(differences) == 0:
        return 1.0
    if is_binary([*a, *b]):
        return mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    return _sign_flips(differences)


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p: under "no difference" a change goes either way like a fair coin."""
    n = better + worse
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
    return min(1.0, 2 * tail)


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted for there being many (Holm 1979), in the order given."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, ps[i] * (len(ps) - rank)))
        adjusted[i] = largest
    return adjusted


def _sign_flips(differences: NDArray[np.float64]) -> float:
    n = len(differences)
    seen = abs(differences.sum()) - 1e-9 * abs(differences).sum()  # ties count, whatever the order of summation
    if n <= _EXACT:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float((abs((2 * patterns - 1) @ differences) >= seen).mean())
    rng = np.random.default_rng(_SEED)
    hits = 0
    for _ in range(10):  # in parts: n may be thousands
        signs = rng.integers(0, 2, (_PERMUTATIONS // 10, n)) * 2 - 1
        hits += int((abs(signs @ differences) >= seen).sum())
    return (hits + 1) / (_PERMUTATIONS + 1)
