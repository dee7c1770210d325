"""LoCoCo: lambda = 0 is eviction, weights are convex, and training moves the mergers and nothing else."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_model
from oracles import relative, tokens

from locret.backbone import Backbone
from locret.errors import BackboneError, ConfigError, DataError
from locret.lococo import ConvMerge, column_sums, compress, follow_loss, train


def units(n=30, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, 3, n, d, generator=g) for _ in range(2))
    return k, v, torch.rand(2, 3, n, generator=g)


def merger(slots=6, d=4, mix=0.5, kernel=5):
    merge = ConvMerge(d, slots, kernel_size=kernel, generator=torch.Generator().manual_seed(7))
    torch.nn.init.normal_(merge.conv.bias, generator=torch.Generator().manual_seed(8))
    merge.mix.data.fill_(mix)
    return merge.requires_grad_(False)


def rows(x, index):
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


def test_with_lambda_0_it_is_eviction_at_the_same_budget():
    """The top `budget` by score, in position order; merged are the places after the heavy hitters'."""
    k, v, scores = units()
    keep, places, got = compress(k, v, scores, 14, merger(mix=0.0))
    ranked = scores.argsort(-1, descending=True)
    assert torch.equal(keep, ranked[..., :14].sort(-1).values)
    assert torch.equal(places, ranked[..., 8:14].sort(-1).values)
    assert torch.equal(got.k, k)
    assert torch.equal(got.v, v)
    assert not got.bias.any()


def test_fixed_units_are_heavy_hitters_whatever_their_score():
    k, v, scores = units()
    fixed = torch.zeros_like(scores, dtype=torch.bool)
    fixed[..., [3, 17]] = True
    keep, places, got = compress(k, v, scores, 14, merger(), fixed=fixed)
    for unit in (3, 17):
        assert (keep == unit).any(-1).all()
        assert not (places == unit).any()
        assert torch.equal(got.k[:, :, unit], k[:, :, unit])


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0])
def test_weights_are_those_of_plain_loops(mix):
    """The convolution written out: candidate j's logit for slot s reads kernel 5 around it, zeros outside."""
    k, v, scores = units(n=12)
    merge = merger(mix=mix).double()
    got = merge.weights(k, v, scores).double()
    w, bias = merge.conv.weight.double(), merge.conv.bias.double()
    for b in range(2):
        for h in range(3):
            x = torch.cat((k[b, h], v[b, h]), -1).double()
            logits = torch.zeros(6, 12, dtype=torch.float64)
            for s in range(6):
                for j in range(12):
                    taps = [(j + t - 2, t) for t in range(5) if 0 <= j + t - 2 < 12]
                    logits[s, j] = max(0.0, float(bias[s] + sum(x[at] @ w[s, :, t] for at, t in taps)))
            keep = torch.zeros(6, 12, dtype=torch.float64)
            for s, j in enumerate(sorted(scores[b, h].argsort(descending=True)[:6].tolist())):
                keep[s, j] = 1
            torch.testing.assert_close(got[b, h], (1 - mix) * keep + mix * logits.softmax(-1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 3, 6, dtype=torch.float64))


def test_merged_units_lie_between_their_candidates_and_constants_are_exact():
    k, v, scores = units()
    _, places, got = compress(k, v, scores, 14, merger())
    heavy = scores.argsort(-1, descending=True)
    for merged, x in ((got.k, k), (got.v, v)):
        candidates, found = rows(x, heavy[..., 8:]), rows(merged, places)
        assert (found <= candidates.amax(2, keepdim=True) + 1e-6).all()
        assert (found >= candidates.amin(2, keepdim=True) - 1e-6).all()
        assert torch.equal(rows(merged, heavy[..., :8]), rows(x, heavy[..., :8]))
    same = torch.full_like(k, 0.7)
    torch.testing.assert_close(compress(same, same, scores, 14, merger())[2].k, same)


def test_column_sums_are_those_of_the_attention_matrix():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 9, 8, generator=g), torch.randn(1, 2, 9, 8, generator=g)
    got = column_sums(q, k, 0.3)
    for head in range(2):
        want = torch.zeros(9)
        for h in (2 * head, 2 * head + 1):
            for t in range(9):
                want[: t + 1] += (q[0, h, t] @ k[0, head, : t + 1].T * 0.3).softmax(-1) / 2
        torch.testing.assert_close(got[0, head], want)


# ---------------------------------------------------------------------- the trainer


def test_a_budget_for_the_whole_prompt_gives_the_models_own_loss():
    """U1."""
    backbone = Backbone(build_tiny_model("llama", dtype=torch.float64))
    ids = tokens(60)
    got = follow_loss(backbone, ids, torch.nn.ModuleList(), prompt_len=40, budget=40)
    logits = backbone.model(ids).logits[0, 40:-1]
    want = torch.nn.functional.cross_entropy(logits.float(), ids[0, 41:])
    assert relative(got, want) < 1e-6


def test_with_lambda_0_the_loss_is_that_of_attention_with_a_mask():
    """U4 for the trainer: eviction to the heavy hitters equals minus infinity on the others, in one layer; what
    stays is numbered anew."""
    backbone = Backbone(build_tiny_model("llama-plain", num_hidden_layers=1))
    ids, p, budget = tokens(50), 36, 12
    mergers = torch.nn.ModuleList([merger(slots=6, d=8, mix=0.0)])
    got = follow_loss(backbone, ids, mergers, prompt_len=p, budget=budget)

    class Masked:
        def attend(self, layer, q, k, v, call):
            at = torch.arange(50)
            rope = backbone.rope(50, 50)
            q1, k1 = rope.rotate(layer, q, at), rope.rotate(layer, k, at)
            kept = column_sums(q1[:, :, :p], k1[:, :, :p], call.scale).topk(budget, -1).indices
            visible = torch.ones(1, 2, 50, 50, dtype=torch.bool).tril()
            gone = torch.ones(1, 2, p, dtype=torch.bool).scatter(-1, kept, False)
            number = torch.cat(((~gone).cumsum(-1) - 1, (at[p:] - p + budget).expand(1, 2, -1)), -1)
            q2, k2 = rope.rotate(layer, q, torch.cat((at[:p], at[p:] - p + budget))), rope.rotate(layer, k, number)
            late = visible.clone()
            late[:, :, :, :p] &= ~gone[:, :, None]
            outs = []
            for queries, keys, seen in ((q1, k1, visible), (q2, k2, late)):
                keys, seen = keys.repeat_interleave(4, 1), seen.repeat_interleave(4, 1)
                logits = (queries @ keys.mT * call.scale).masked_fill(~seen, float("-inf"))
                outs.append(logits.softmax(-1) @ v.repeat_interleave(4, 1))
            return torch.cat((outs[0][:, :, :p], outs[1][:, :, p:]), 2)

    logits = backbone.run(ids, Masked(), logits=50 - p)
    want = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, p + 1 :])
    assert relative(got, want) < 1e-5


def test_training_lowers_the_loss_and_touches_the_mergers_only():
    model = build_tiny_model("llama")
    backbone = Backbone(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = dict(prompt_len=48, budget=12, kernel_size=5, learning_rate=0.02)
    mergers, losses = train(backbone, [tokens(80)] * 25, **options)
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all((m.mix != 0.5).item() for m in mergers)
    again, same = train(backbone, [tokens(80)] * 25, **options)
    assert same == losses
    assert all(torch.equal(a, b) for a, b in zip(mergers.parameters(), again.parameters(), strict=True))


def test_bad_input_is_refused():
    k, v, scores = units()
    with pytest.raises(ConfigError, match="budget 5: wanted at least the 6 merged slots and at most the 30"):
        compress(k, v, scores, 5, merger())
    with pytest.raises(ConfigError, match="odd kernel"):
        ConvMerge(4, 2, kernel_size=4)
    with pytest.raises(DataError, match="a sample of 20 tokens; wanted at least prompt_len 40"):
        train(Backbone(build_tiny_model("llama")), [tokens(20)], prompt_len=40, budget=10)
    with pytest.raises(BackboneError, match="softcap or a sliding window"):
        train(Backbone(build_tiny_model("gemma2")), [tokens(50)], prompt_len=40, budget=10)
