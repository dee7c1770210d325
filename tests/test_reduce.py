"""Merged units: exact where their papers say so, equal to plain loops everywhere."""

from __future__ import annotations

import math

import pytest
import torch

from locret.errors import ConfigError
from locret.reduce import Merged, compensate, fold, merge_runs


def units(n, d=6, seed=0, heads=3):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, heads, n, d, generator=g, dtype=torch.float64) for _ in range(2))


def attend(q, k, v, bias=0.0):
    return ((q @ k.mT * 0.4) + bias).softmax(-1) @ v


def query(rows=5, d=6, heads=3):
    return torch.randn(2, heads, rows, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


# ---------------------------------------------------------------------- RazorAttention


def test_the_unit_is_the_mean_and_the_bias_is_log_n():
    k, v = units(7)
    got = compensate(k, v)
    torch.testing.assert_close(got.k, k.mean(2, keepdim=True))
    torch.testing.assert_close(got.v, v.mean(2, keepdim=True))
    torch.testing.assert_close(got.bias, torch.full((2, 3, 1), math.log(7), dtype=torch.float64))


def test_attention_with_it_is_the_papers_formula():
    """(N e^{q.k} v + sum over the kept) / (N e^{q.k} + sum over the kept), term by term."""
    (k, v), (kept_k, kept_v), q = units(7), units(4, seed=1), query()
    unit = compensate(k, v)
    bias = torch.cat((unit.bias, torch.zeros(2, 3, 4)), -1)[:, :, None]
    got = attend(q, torch.cat((unit.k, kept_k), 2), torch.cat((unit.v, kept_v), 2), bias)
    for b in range(2):
        for h in range(3):
            for row in range(5):
                top, total = torch.zeros(6, dtype=torch.float64), 0.0
                mean_k, mean_v = k[b, h].mean(0), v[b, h].mean(0)
                for weight, key, value in [
                    (7.0, mean_k, mean_v),
                    *((1.0, kept_k[b, h, i], kept_v[b, h, i]) for i in range(4)),
                ]:
                    e = weight * math.exp(float(q[b, h, row] @ key) * 0.4)
                    top, total = top + e * value, total + e
                torch.testing.assert_close(got[b, h, row], top / total)


def test_equal_keys_are_exact_whatever_their_values():
    (k, v), (kept_k, kept_v), q = units(9), units(4, seed=1), query()
    k = k[:, :, :1].expand_as(k)
    unit = compensate(k, v)
    bias = torch.cat((unit.bias, torch.zeros(2, 3, 4)), -1)[:, :, None]
    got = attend(q, torch.cat((unit.k, kept_k), 2), torch.cat((unit.v, kept_v), 2), bias)
    want = attend(q, torch.cat((k, kept_k), 2), torch.cat((v, kept_v), 2))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sizes", [[12], [1, 5, 6], [4, 4, 4], [1] * 12])
def test_the_order_and_the_chunks_of_dropping_make_no_difference(sizes):
    k, v = units(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    held = compensate(k[:, :, :0], v[:, :, :0])
    for piece in order.split(sizes):
        held = fold(held, k[:, :, piece], v[:, :, piece])
    want = compensate(k, v)
    for name in ("k", "v", "bias"):
        torch.testing.assert_close(getattr(held, name), getattr(want, name), rtol=1e-12, atol=1e-12)


def test_two_compensation_units_merge_into_that_of_all():
    k, v = units(10)
    one, two = compensate(k[:, :, :3], v[:, :, :3]), compensate(k[:, :, 3:], v[:, :, 3:])
    both = compensate(torch.cat((one.k, two.k), 2), torch.cat((one.v, two.v), 2), torch.cat((one.bias, two.bias), 2))
    torch.testing.assert_close(both.k, k.mean(2, keepdim=True))
    torch.testing.assert_close(both.bias.exp(), torch.full((2, 3, 1), 10.0, dtype=torch.float64))


def test_nothing_dropped_is_no_unit_and_padding_does_not_count():
    k, v = units(6)
    empty = compensate(k[:, :, :0], v[:, :, :0])
    assert empty.bias.isneginf().all()
    assert not empty.k.any()
    bias = torch.zeros(2, 3, 6).index_fill(-1, torch.tensor([0, 1]), float("-inf"))
    got = compensate(k, v, bias)
    torch.testing.assert_close(got.k, k[:, :, 2:].mean(2, keepdim=True))
    torch.testing.assert_close(got.bias.exp(), torch.full((2, 3, 1), 4.0, dtype=torch.float64))


def test_half_precision_units_are_averaged_in_float32():
    k = torch.full((1, 1, 4096, 2), 1.0, dtype=torch.bfloat16)
    got = compensate(k, k)
    assert got.k.dtype == torch.bfloat16
    assert torch.equal(got.k, k[:, :, :1])
    assert got.bias.item() == pytest.approx(math.log(4096))


# ---------------------------------------------------------------------- KVMerger


def kv_merger_reference(k, v, scores, heavy, recent, threshold, sigma):
    """One head, lists of floats, scanning from the last unit to the first: [(pivot, key, value, size), ...]."""
    n = len(k)
    recents = set(range(n - recent, n))
    top = set(sorted((i for i in range(n) if i not in recents), key=lambda i: -scores[i])[:heavy])

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    runs, current = [], [n - 1]
    for i in range(n - 2, -1, -1):
        free = not {i, i + 1} & (recents | top)
        if free and cosine(k[i], k[i + 1]) > threshold:
            current.insert(0, i)
        else:
            runs.insert(0, current)
            current = [i]
    runs.insert(0, current)
    out = []
    for run in runs:
        pivot = max(run, key=lambda i: scores[i])
        g = [math.exp(-sum((a - b) ** 2 for a, b in zip(k[pivot], k[i])) / (2 * sigma**2)) for i in run]
        key, value = ([sum(w * x[i][c] for w, i in zip(g, run)) / sum(g) for c in range(len(x[0]))] for x in (k, v))
        out.append((pivot, key, value, len(run)))
    return out


def smooth_units(n, seed=0):
    """A walk, so that neighbours are similar here and there."""
    k, v = units(n, d=4, seed=seed)
    return (k * 0.5).cumsum(2), v, torch.rand(2, 3, n, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize(("heavy", "recent"), [(0, 0), (5, 7), (3, 0)])
@pytest.mark.parametrize("threshold", [0.3, 0.75, 0.95])
@pytest.mark.parametrize("sigma", [0.5, 5.0])
def test_runs_are_those_of_a_plain_scan(heavy, recent, threshold, sigma):
    k, v, scores = smooth_units(40)
    got = merge_runs(k, v, scores, num_heavy=heavy, num_recent=recent, threshold=threshold, sigma=sigma, count=True)
    merged = 0
    for b in range(2):
        for h in range(3):
            want = kv_merger_reference(k[b, h].tolist(), v[b, h].tolist(), scores[b, h].tolist(), heavy, recent,
                                       threshold, sigma)  # fmt: skip
            alive = got.alive[b, h].nonzero()[:, 0].tolist()
            assert alive == [pivot for pivot, *_ in want]
            for pivot, key, value, size in want:
                torch.testing.assert_close(got.k[b, h, pivot], torch.tensor(key, dtype=torch.float64))
                torch.testing.assert_close(got.v[b, h, pivot], torch.tensor(value, dtype=torch.float64))
                assert got.bias[b, h, pivot].item() == pytest.approx(math.log(size))
                if size == 1:
                    assert torch.equal(got.k[b, h, pivot], k[b, h, pivot])
            merged += sum(size for *_, size in want if size > 1)
    assert merged > 20


def test_a_threshold_of_one_merges_nothing():
    k, v, scores = smooth_units(30)
    got = merge_runs(k, v, scores, num_heavy=2, num_recent=3, threshold=1.0)
    assert got.alive.all()
    assert torch.equal(got.k, k)
    assert torch.equal(got.v, v)
    assert not got.bias.any()


def test_heavy_and_recent_units_are_left_as_they_are():
    k, v, scores = smooth_units(30)
    got = merge_runs(k, v, scores, num_heavy=4, num_recent=6, threshold=-1.0)
    heavy = scores[..., :24].topk(4, -1).indices
    assert got.alive[..., 24:].all()
    assert got.alive.gather(-1, heavy).all()
    assert torch.equal(got.k[:, :, 24:], k[:, :, 24:])
    rows = heavy[..., None].expand(2, 3, 4, 4)
    assert torch.equal(got.k.gather(2, rows), k.gather(2, rows))
    assert (~got.alive).any()


def test_runs_of_equal_keys_are_exact_with_the_count():
    """Our option: the paper's units, which carry no bias, weigh as one."""
    k, v, scores = smooth_units(12)
    k = k[:, :, :4].repeat_interleave(3, 2)
    v = v[:, :, :4].repeat_interleave(3, 2)
    q = query(d=4)
    for count in (True, False):
        got = merge_runs(k, v, scores, num_heavy=0, num_recent=0, threshold=0.9999999, count=count)
        out = attend(q, got.k, got.v, got.bias.masked_fill(~got.alive, float("-inf"))[:, :, None])
        if count:
            torch.testing.assert_close(out, attend(q, k, v))
        else:
            assert got.alive.sum(-1).max() <= 4
            assert isinstance(got, Merged)


def test_bad_options_are_errors():
    k, v, scores = smooth_units(10)
    with pytest.raises(ConfigError, match=r"num_heavy 8 \+ num_recent 4 must lie between 0 and the 10 units"):
        merge_runs(k, v, scores, num_heavy=8, num_recent=4)
    with pytest.raises(ConfigError, match="sigma is 0"):
        merge_runs(k, v, scores, num_heavy=1, num_recent=4, sigma=0)
