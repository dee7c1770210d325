"""The attention probe equals whole float64 attention matrices, in blocks of any size."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import Meter

import locret.observe
from locret.observe import AttentionProbe, surprisal

B, HQ, HKV, C, S, D = 2, 6, 2, 11, 30, 8


@pytest.fixture(params=[1, 700, 2**22], ids=["a row a block", "some rows", "one block"])
def any_blocks(request, monkeypatch):
    monkeypatch.setattr(locret.observe, "_ELEMENTS", request.param)


def case(softcap=None, bias=False, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, HQ, C, D, generator=g, dtype=torch.float64)
    keys = torch.randn(B, HKV, S, D, generator=g, dtype=torch.float64)
    added = None
    if bias:
        added = torch.randn(B, HKV, S, generator=g, dtype=torch.float64)
        added[:, 0, :5] = -math.inf
    logits = q @ keys.repeat_interleave(3, 1).mT * 0.4
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if bias:
        logits = logits + added.repeat_interleave(3, 1)[:, :, None]
    hidden = torch.ones(C, S).triu(S - C + 1).bool()
    return AttentionProbe(q.to(dtype), keys.to(dtype), 0.4, softcap, added), logits.masked_fill(hidden, -math.inf)


def close(got, want):
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, dict(softcap=2.0), dict(bias=True), dict(dtype=torch.float32)], ids=str)
def test_every_reduction_equals_that_of_the_whole_matrix(any_blocks, options):
    probe, logits = case(**options)
    weights = logits.softmax(-1)
    close(probe.column_sums(), weights.sum(2))
    close(probe.column_sums(4), weights[:, :, -4:].sum(2))
    close(probe.column_sums(400), weights.sum(2))
    close(probe.last_row(), weights[:, :, -1])
    close(probe.column_max(), weights.amax(2))
    close(probe.column_max(3), weights[:, :, -3:].amax(2))
    close(probe.log_sum_exp(), logits.logsumexp(-1))
    decay = 0.9 ** torch.arange(C - 1, -1, -1).double()
    close(probe.column_sums(decay=0.9), (weights * decay[:, None]).sum(2))
    close(probe.column_sums(5, decay=0.9), (weights * decay[:, None])[:, :, -5:].sum(2))
    e = logits.exp()
    close(probe.column_sums(null=True), (e / (1 + e.sum(-1, keepdim=True))).sum(2))


def test_mass_is_conserved(any_blocks):
    """Every query gives away 1, and a null logit takes what is missing."""
    probe, logits = case()
    close(probe.column_sums().sum(-1), torch.full((B, HQ), float(C), dtype=torch.float64))
    nothing = 1 / (1 + logits.exp().sum(-1))
    close(probe.column_sums(null=True).sum(-1), (1 - nothing).sum(-1))


def test_groups_are_averaged_over_the_heads_that_share_a_key():
    probe, logits = case()
    columns = probe.column_sums()
    weights = logits.softmax(-1).sum(2)
    close(probe.per_kv_head(columns), torch.stack([weights[:, :3].mean(1), weights[:, 3:].mean(1)], 1))
    close(probe.shared(columns), weights.mean(1, keepdim=True).expand(-1, HKV, -1))


def test_no_matrix_of_queries_and_units_is_ever_there():
    """256 queries over 32,768 units: 8 M weights a head; the largest tensor stays under the block's bound."""
    q, keys = torch.randn(1, 2, 256, 8), torch.randn(1, 1, 32_768, 8)
    probe = AttentionProbe(q, keys, 0.3)
    with torch.inference_mode(), Meter() as meter:
        probe.column_sums()
    assert meter.largest <= locret.observe._ELEMENTS
    assert meter.peak < 4 * probe.scratch_bytes


# ---------------------------------------------------------------------- surprisal


def naive(logits, ids):
    logp = logits.double().log_softmax(-1)
    return torch.stack([-logp[:, t, ids[0, t + 1]] for t in range(ids.shape[1] - 1)], 1)


@pytest.mark.parametrize("length", [2, 255, 256, 257, 600])
def test_surprisal_is_the_naive_cross_entropy(length):
    g = torch.Generator().manual_seed(1)
    logits, ids = torch.randn(1, length, 17, generator=g), torch.randint(0, 17, (1, length), generator=g)
    got = surprisal(logits, ids, None)
    close(got[:, 1:], naive(logits, ids))
    assert got[0, 0] == got[0, 1:].max()
    before = torch.randn(1, 17, generator=g)
    again = surprisal(logits, ids, before)
    assert torch.equal(again[:, 1:], got[:, 1:])
    assert again[0, 0].item() == pytest.approx(-before[0].log_softmax(-1)[ids[0, 0]].item(), rel=1e-5)


def test_a_token_alone_without_a_prediction_is_as_surprising_as_a_uniform_one():
    assert (
        surprisal(torch.randn(2, 1, 50), torch.tensor([[3], [4]]), None).tolist() == [[pytest.approx(math.log(50))]] * 2
    )
