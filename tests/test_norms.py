"""Fused norms: only where they give the same numbers, only while open."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_model

from locret.train.norms import fused, plain_norms


@pytest.mark.parametrize(
    ("family", "count"),
    [("llama", 5), ("qwen3", 9), ("phi3", 5), ("olmo2", 9), ("gemma", 0), ("gemma2", 0), ("cohere", 0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_norms_are_found_and_give_the_same(family, count, dtype):
    """Gemma's weights are 1 + w, Cohere's norm subtracts the mean: both are left alone."""
    model = build_tiny_model(family, dtype)
    norms = plain_norms(model)
    assert len(norms) == count
    ids = torch.arange(40)[None] + 8
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        with fused(norms):
            inside = model(ids, use_cache=False).logits
        after = model(ids, use_cache=False).logits
    assert torch.equal(before, after)
    assert all("forward" not in module.__dict__ for module in norms)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(inside, before, rtol=tolerance, atol=tolerance * before.abs().max().item())


def test_a_norm_that_somebody_hooked_is_left_alone():
    model = build_tiny_model("llama")
    model.model.norm.forward = model.model.norm.forward
    assert model.model.norm not in plain_norms(model)


def test_a_norm_that_only_looks_like_one_is_left_alone(monkeypatch):
    model = build_tiny_model("llama")
    kind = type(model.model.norm)
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: plain(self, x) * 1.02)
    assert plain_norms(model) == []
