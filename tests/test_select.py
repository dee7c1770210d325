"""Keep sets: pins by mask, then the best scores, ascending; ties and broken numbers included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.errors import ConfigError
from locret.kernels.compact import pin
from locret.select import check_pins, finite, reference_keep, select


@st.composite
def cases(draw):
    """Scores [B, Hkv, S] without ties, pins, and a budget that holds every head's pins."""
    batch, heads, units = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randperm(batch * heads * units, generator=g).reshape(batch, heads, units).float() - 17.5
    pinned = torch.rand(batch, heads, units, generator=g) < draw(st.sampled_from([0.0, 0.2, 0.9]))
    budget = draw(st.integers(max(1, int(pinned.sum(-1).max())), units))
    return scores, pinned, budget


@settings(max_examples=150, deadline=None)
@given(cases())
def test_the_keep_set_equals_the_plain_reference(case):
    scores, pinned, budget = case
    assert select(scores, budget, pinned).tolist() == reference_keep(scores, budget, pinned)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_keep_is_ascending_without_repeats_and_exactly_the_budget(case):
    scores, pinned, budget = case
    keep = select(scores, budget, pinned)
    assert keep.shape == (*scores.shape[:2], budget)
    assert (keep.diff(dim=-1) > 0).all()
    assert keep.min() >= 0
    assert keep.max() < scores.shape[-1]


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([0.0, torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max]))
def test_pinned_units_survive_when_all_scores_are_equal(case, value):
    """A large score instead of a mask ties with real scores and loses (kvpress issue 227)."""
    scores, pinned, budget = case
    keep = select(torch.full_like(scores, value), budget, pinned)
    stays = torch.zeros_like(pinned).scatter(-1, keep, True)
    assert (stays | ~pinned).all()


def test_scores_of_half_precision_are_ranked_as_given():
    scores = torch.tensor([[[3.0, 1.0, 2.0, 0.0]]], dtype=torch.bfloat16)
    assert select(scores, 2, torch.zeros(1, 1, 4, dtype=torch.bool)).tolist() == [[[0, 2]]]


def test_selecting_changes_neither_scores_nor_pins():
    scores, pinned = torch.rand(1, 2, 9), torch.rand(1, 2, 9) < 0.3
    before = scores.clone(), pinned.clone()
    select(scores, 5, pinned)
    assert torch.equal(scores, before[0])
    assert torch.equal(pinned, before[1])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(0, 6), st.integers(0, 30), st.integers(0, 2**31))
def test_pins_are_sinks_by_position_the_newest_by_place_and_the_protected(units, sinks, newest, seed):
    g = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.randperm(60, generator=g)[:units].sort().values for _ in range(2)])[None]
    protected = torch.rand(1, 2, units, generator=g) < 0.2
    before = protected.clone()
    got = pin(protected, num_sinks=sinks, num_newest=newest, positions=positions)
    for head in range(2):
        for i in range(units):
            want = bool(before[0, head, i]) or positions[0, head, i].item() < sinks or i >= units - newest
            assert got[0, head, i].item() == want
    assert torch.equal(protected, before)


def test_no_newest_units_pins_none_of_them():
    """`[..., -0:]` is everything."""
    empty = torch.zeros(1, 1, 5, dtype=torch.bool)
    assert not pin(empty, num_sinks=0, num_newest=0, positions=torch.arange(5).expand(1, 1, 5)).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_is_seen(bad):
    scores = torch.zeros(2, 2, 5)
    assert bool(finite(scores))
    scores[1, 0, 3] = bad
    assert not bool(finite(scores))


def test_too_many_pins_are_refused_with_the_numbers():
    check_pins(10, 10)
    with pytest.raises(ConfigError, match=r"11 pinned units .* budget of 10"):
        check_pins(11, 10)
