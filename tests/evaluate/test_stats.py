"""Intervals and tests against hand-worked numbers and brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from locret.evaluate import stats


def test_wilson_is_the_textbook_interval() -> None:
    low, high = stats.wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)  # Agresti & Coull 1998, 8 of 10
    assert stats.wilson(0, 20)[0] == 0.0
    assert stats.wilson(20, 20)[1] == 1.0
    assert 0.8 < stats.wilson(20, 20)[0] < 0.9


def test_binary_scores_get_wilson_and_others_a_bootstrap() -> None:
    assert stats.mean_interval([100.0] * 8 + [0.0] * 2) == pytest.approx((49.0, 94.3), abs=0.05)
    low, high = stats.mean_interval([50.0] * 10)
    assert (low, high) == (50.0, 50.0)


def test_bootstrap_covers_like_the_normal_interval() -> None:
    rng = random.Random(0)
    values = [rng.gauss(10, 2) for _ in range(400)]
    mean = sum(values) / 400
    deviation = (sum((v - mean) ** 2 for v in values) / 400) ** 0.5
    low, high = stats.bootstrap(values)
    assert low == pytest.approx(mean - 1.96 * deviation / 20, abs=0.03)
    assert high == pytest.approx(mean + 1.96 * deviation / 20, abs=0.03)
    assert stats.bootstrap(values) == (low, high), "the same numbers twice"


def test_bootstrap_is_paired() -> None:
    """Two variants are resampled alike: a constant difference has an interval without width."""
    a = [float(i % 7) for i in range(50)]
    low, high = stats.bootstrap(a)
    assert stats.bootstrap([x + 3 for x in a]) == pytest.approx((low + 3, high + 3))


def test_strata_count_alike_whatever_their_size() -> None:
    low, high = stats.stratified_bootstrap([[0.0] * 5, [100.0] * 500])
    assert (low, high) == (50.0, 50.0)


def test_a_mean_over_tasks_that_are_all_right_still_has_a_width() -> None:
    assert stats.tasks_interval([[100.0] * 5, [100.0] * 5]) == stats.mean_interval([100.0] * 10)
    assert stats.tasks_interval([[100.0] * 5]) == stats.mean_interval([100.0] * 5)
    graded = [[50.0, 70.0, 20.0], [100.0] * 3]
    assert stats.tasks_interval(graded) == stats.stratified_bootstrap(graded)
    uneven = [[0.0] * 5, [100.0] * 50]
    assert stats.tasks_interval(uneven) == stats.stratified_bootstrap(uneven)


def test_mcnemar_by_hand() -> None:
    assert stats.mcnemar(5, 0) == pytest.approx(2 / 32)
    assert stats.mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert stats.mcnemar(3, 3) == 1.0
    assert stats.mcnemar(0, 0) == 1.0


def test_sign_flips_are_counted_exactly_for_few_samples() -> None:
    a, b = [10.0, 20.0, 30.0, 40.0, 50.0, 9.0], [12.0, 25.0, 31.0, 39.0, 58.0, 9.0]
    differences = [y - x for x, y in zip(a, b)]
    seen = abs(sum(differences))
    signs = list(itertools.product((-1, 1), repeat=5))
    expected = sum(abs(sum(s * d for s, d in zip(sign, differences))) >= seen for sign in signs) / 32
    assert stats.paired_test(a, b) == pytest.approx(expected)


def test_random_flips_agree_with_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    a = [rng.random() * 100 for _ in range(12)]
    b = [x + rng.gauss(8, 12) for x in a]
    exact = stats.paired_test(a, b)
    monkeypatch.setattr(stats, "_EXACT", 0)
    assert stats.paired_test(a, b) == pytest.approx(exact, abs=0.02)


def test_no_difference_is_no_difference() -> None:
    assert stats.paired_test([1.0, 2.0], [1.0, 2.0]) == 1.0


def test_paired_test_of_binary_scores_is_mcnemar() -> None:
    a, b = [0.0] * 6 + [100.0] * 4, [100.0] * 6 + [100.0] * 4
    assert stats.paired_test(a, b) == stats.mcnemar(6, 0)


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []
