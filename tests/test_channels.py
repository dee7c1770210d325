"""ThinK: pruned channels add nothing to a logit; scores are the Frobenius norms of the paper."""

from __future__ import annotations

import pytest
import torch

from locret.channels import ChannelPruned, channel_scores, kept_channels
from locret.errors import ConfigError
from locret.storage import Affine


def tensors(w=9, n=20, d=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(2, h, length, d, generator=g, dtype=torch.float64) for h, length in ((8, w), (2, n)))


def rotate(x, angle):
    """Half-rotation of pairs (i, i + D / 2) by position times a frequency."""
    t, d = x.shape[-2:]
    phase = torch.arange(t)[:, None] * angle + torch.arange(1.0, d // 2 + 1, dtype=x.dtype) * 0.3
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat((a * phase.cos() - b * phase.sin(), b * phase.cos() + a * phase.sin()), -1)


def test_scores_are_the_frobenius_norms_of_the_channels_logits():
    """|| Q_j K_j^T ||_F squared, per query head, averaged over the group and over both lengths."""
    q, k = tensors()
    got = channel_scores(q, k)
    for b in range(2):
        for head in range(2):
            for j in range(16):
                group = [q[b, 4 * head + g, :, j : j + 1] @ k[b, head, :, j : j + 1].T for g in range(4)]
                want = sum(m.pow(2).mean() for m in group) / 4
                assert got[b, head, j].item() == pytest.approx(want.item(), rel=1e-5)


def test_pair_scores_do_not_depend_on_the_rotation():
    q, k = tensors()
    one = channel_scores(q, k, paired=True)
    torch.testing.assert_close(channel_scores(rotate(q, 0.7), rotate(k, 0.7), paired=True), one)
    assert torch.equal(one[..., :8], one[..., 8:])
    for b, head, i in [(0, 0, 0), (1, 1, 5)]:
        query = sum(q[b, 4 * head : 4 * head + 4, :, j].pow(2).mean() for j in (i, i + 8))
        assert one[b, head, i].item() == pytest.approx((query * k[b, head][:, [i, i + 8]].pow(2).sum(1).mean()).item())
    assert not torch.allclose(channel_scores(rotate(q, 0.7), rotate(k, 0.7)), channel_scores(q, k))


def test_channels_worked_by_hand():
    """Energies of queries 4 1 0 1 and of keys 1 9 9 1: products 4 9 0 1; pairs (0, 2) and (1, 3): 4 * 10 and 2 * 10."""
    q, k = (torch.tensor(x).sqrt().view(1, 1, 1, 4) for x in ([4.0, 1, 0, 1], [1.0, 9, 9, 1]))
    scores, pairs = channel_scores(q, k), channel_scores(q, k, paired=True)
    torch.testing.assert_close(scores[0, 0], torch.tensor([4.0, 9, 0, 1]))
    torch.testing.assert_close(pairs[0, 0], torch.tensor([40.0, 20, 40, 20]))
    assert kept_channels(scores, 0.5).tolist() == [[[0, 1]]]
    assert kept_channels(pairs, 0.5, paired=True).tolist() == [[[0, 2]]]


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5])
def test_the_lowest_channels_go_the_same_number_in_every_head(ratio, paired):
    q, k = tensors()
    scores = channel_scores(q, k, paired=paired)
    channels = kept_channels(scores, ratio, paired=paired)
    gone = 2 * int(8 * ratio) if paired else int(16 * ratio)
    assert channels.shape == (2, 2, 16 - gone)
    for row, kept in zip(scores.flatten(0, 1), channels.flatten(0, 1).tolist(), strict=True):
        assert kept == sorted(set(kept))
        lost = [j for j in range(16) if j not in kept]
        assert not lost or row[lost].max() <= row[kept].min()
        assert not paired or {(j + 8) % 16 for j in kept} == set(kept)


def test_logits_from_stored_channels_are_those_of_keys_with_zeros():
    """Gathered computation, on the surviving channels only, against zeroed channels; ratio 0 is lossless."""
    q, k = tensors()
    for ratio in (0.0, 0.4):
        channels = kept_channels(channel_scores(q, k), ratio)
        codec = ChannelPruned(channels, 16)
        stored = codec.encode(k)
        zeroed = torch.zeros_like(k)
        for b in range(2):
            for head in range(2):
                kept = channels[b, head]
                zeroed[b, head][:, kept] = k[b, head][:, kept]
                gathered = q[b, 4 * head][:, kept] @ stored.parts["x"][b, head].T
                torch.testing.assert_close(gathered, q[b, 4 * head] @ zeroed[b, head].T)
        assert torch.equal(codec.decode(stored), zeroed)
        assert stored.nbytes == 2 * 2 * 20 * channels.shape[-1] * 8
        assert (ratio > 0) or torch.equal(zeroed, k)


def test_pairs_may_go_before_the_rotation():
    q, k = tensors()
    codec = ChannelPruned(kept_channels(channel_scores(q, k, paired=True), 0.5, paired=True), 16)
    before = rotate(codec.decode(codec.encode(k)), 0.7)
    after = codec.decode(codec.encode(rotate(k, 0.7)))
    torch.testing.assert_close(before, after)


def test_what_is_left_may_be_quantised_and_evicted_from():
    q, k = tensors(d=32)
    codec = ChannelPruned(kept_channels(channel_scores(q, k), 0.5), 32, Affine(4, 8))
    stored = codec.encode(k)
    keep = torch.tensor([1, 5, 19]).expand(2, 2, 3)
    assert stored.nbytes == 2 * 2 * 20 * (16 // 2 + 2 * 2 * 8)
    assert torch.equal(codec.decode(stored.gather(keep)), codec.decode(stored)[:, :, [1, 5, 19]])
    assert (codec.decode(stored) == 0).sum(-1).min() >= 16


def test_a_ratio_outside_is_an_error():
    q, k = tensors()
    for ratio in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=r"allowed: 0 <= ratio < 1"):
            kept_channels(channel_scores(q, k), ratio)
