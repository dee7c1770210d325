"""LoRC: full rank changes nothing, stored latents are exact, the error stays under the singular values' bound."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import build_tiny_model
from oracles import relative, tokens

from locret.backbone import AttentionCall, Backbone
from locret.errors import BackboneError, ConfigError
from locret.lowrank import LowRank, apply, factor, log_condition, progressive_ranks


class Watch:
    """Full attention that remembers k and v."""

    def __init__(self):
        self.kv = {}

    def attend(self, layer, q, k, v, call: AttentionCall):
        self.kv[layer] = k, v
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=call.scale)


def backbone_of(family="llama"):
    return Backbone(build_tiny_model(family, dtype=torch.float64))


def test_factors_are_the_truncated_svd_of_each_head():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(2 * 8, 24, generator=g, dtype=torch.float64)
    low, basis = factor(w, 2, 3)
    for head in range(2):
        u, s, vh = torch.linalg.svd(w[8 * head : 8 * head + 8], full_matrices=False)
        torch.testing.assert_close(low[8 * head : 8 * head + 8], u[:, :3] @ torch.diag(s[:3]) @ vh[:3])
        torch.testing.assert_close(basis[head].T @ basis[head], torch.eye(3, dtype=torch.float64))
        x = torch.randn(24, 50, generator=g, dtype=torch.float64)
        lost = ((w - low)[8 * head : 8 * head + 8] @ x).norm()
        assert lost <= torch.linalg.matrix_norm(x, 2) * s[3:].pow(2).sum().sqrt() * (1 + 1e-12)


def test_a_matrix_of_low_rank_loses_nothing():
    g = torch.Generator().manual_seed(1)
    w = torch.cat([torch.randn(8, 3, generator=g) @ torch.randn(3, 24, generator=g) for _ in range(2)]).double()
    torch.testing.assert_close(factor(w, 2, 3)[0], w)
    assert not torch.allclose(factor(w, 2, 2)[0], w)


def test_condition_numbers():
    assert log_condition(torch.diag(torch.tensor([8.0, 4.0, 2.0]))) == pytest.approx(math.log(4))
    assert math.isfinite(log_condition(torch.zeros(3, 3) + torch.diag(torch.tensor([1.0, 0.0, 0.0]))))


def test_ranks_fall_as_the_products_of_condition_numbers_do():
    """Four layers of log condition 1: logs of products 4, 3, 2, 1; the ranks are evenly spaced."""
    assert progressive_ranks([1.0] * 4, highest=128, lowest=32) == [128, 96, 64, 32]
    ahead = [9.0, 6.0, 5.0]  # 3 + 1 + 5, 1 + 5, 5
    want = [round(64 * (1 - (9 - a) / 4 * (1 - 16 / 64))) for a in ahead]
    got = progressive_ranks([3.0, 1.0, 5.0], highest=64, lowest=16)
    assert got == want
    assert got == sorted(got, reverse=True)
    assert progressive_ranks([0.0, 0.0], highest=8, lowest=2) == [8, 8]
    with pytest.raises(ConfigError, match="1 <= lowest <= highest"):
        progressive_ranks([1.0], highest=4, lowest=8)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_full_rank_is_the_model_as_it_was(family):
    """U1; qwen2 has biases on its projections."""
    backbone = backbone_of(family)
    ids = tokens(40)
    want = backbone.model(ids).logits
    before = type(backbone.model)
    apply(backbone, highest=8, lowest=8)
    assert type(backbone.model) is before
    assert relative(backbone.model(ids).logits, want) < 1e-12


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_latents_of_the_lowered_model_decode_to_its_keys_and_values(family):
    """And a latent is enough for a logit (the query takes the basis) and for an output (the sum does)."""
    backbone = backbone_of(family)
    ids = tokens(30)
    want = backbone.model(ids).logits
    codecs = apply(backbone, highest=6, lowest=3)
    assert relative(backbone.model(ids).logits, want) > 1e-3  # it does change the model
    watch = Watch()
    with torch.no_grad():
        backbone.run(ids, watch)
    ranks = []
    for layer, pair in enumerate(codecs):
        for codec, x in zip(pair, watch.kv[layer], strict=True):
            stored = codec.encode(x)
            rank = codec.basis.shape[-1]
            torch.testing.assert_close(codec.decode(stored), x, rtol=1e-10, atol=1e-12)
            assert stored.nbytes == x.nbytes * rank // 8
            query = torch.randn_like(x)
            through = query @ codec.basis @ stored.parts["latent"].mT + query @ codec.offset.mT
            torch.testing.assert_close(through, query @ x.mT, rtol=1e-9, atol=1e-10)
            keep = torch.tensor([0, 7, 21]).expand(1, 2, 3)
            torch.testing.assert_close(codec.decode(stored.gather(keep)), x[:, :, [0, 7, 21]], rtol=1e-10, atol=1e-12)
        ranks.append(rank)
    assert ranks == [6, 3]


def test_families_without_the_projections_are_refused():
    with pytest.raises(BackboneError, match="no linear k_proj"):
        apply(backbone_of("phi3"), highest=4, lowest=4)
    with pytest.raises(BackboneError, match="normalises keys"):
        apply(backbone_of("qwen3"), highest=4, lowest=4)
    with pytest.raises(ConfigError, match="rank 9 is above the head dim 8"):
        apply(backbone_of(), highest=9, lowest=4)
    assert LowRank(torch.zeros(2, 8, 4), torch.zeros(2, 1, 8)).name == "rank4"
