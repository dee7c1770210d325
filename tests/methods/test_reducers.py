"""Methods that merge what they drop, against readings that move nothing: every unit stays where it is, and a list says
which original tokens it stands for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import build_tiny_model
from oracles import (
    MaskedReference,
    joined_of,
    kept,
    naive_key_norm,
    reader_of,
    relative,
    tokens,
    units_of,
    write_mergers,
)  # fmt: skip

from locret.backbone import Backbone
from locret.errors import ConfigError, DataError
from locret.lococo import Mergers
from locret.methods import ChunkView, get_method
from locret.profile import HeadProfile

N, STEPS = 101, 24
PLAN = dict(budget=40, chunk_size=16, num_sinks=3, num_stabilizers=8, local_window=6, decode_interval=3)


@pytest.fixture(scope="module")
def exact():
    return Backbone(build_tiny_model("llama", dtype=torch.float64))


class MergedReference(MaskedReference):
    """The reference with merged units: `keys`, `values` and `bias` of a unit that is not itself any more."""

    def __init__(self, model, *, budgets, **options):
        super().__init__(model, lambda layer, q, k, v, start: torch.zeros(k.shape[1], k.shape[2]).double(), **options)
        self.budgets = budgets
        self.merged = {}  # (layer, head, unit) -> key, value, bias

    def _attend(self, i, q, scale):
        t, total = q.shape[2], self.k[i].shape[2]
        causal = torch.arange(total)[None] <= torch.arange(total - t, total)[:, None]
        out = torch.zeros_like(q)
        for head in range(self.hq):
            kv = head // (self.hq // self.hkv)
            living = self.alive[i][kv]
            raw, values, bias = self.k[i][0, kv].clone(), self.v[i][0, kv].clone(), torch.zeros(total).double()
            for unit in range(total):
                if (i, kv, unit) in self.merged:
                    raw[unit], values[unit], bias[unit] = self.merged[i, kv, unit]
            at = living.cumsum(0) - 1 if self.positions == "compact" else torch.arange(total)
            logits = self._angle(q[0, head], at[-t:]) @ self._angle(raw, at).T * scale + bias
            weights = logits.masked_fill(~(causal & living), -math.inf).softmax(-1)
            out[0, head] = weights @ values
            self.heard(i, kv, weights / (self.hq // self.hkv))
        return out

    def heard(self, i, kv, weights):
        """Accumulated attention is a unit's score."""
        self.s[i][kv] += weights.sum(0)

    def live(self, i):
        return [self.alive[i][h].nonzero()[:, 0].tolist() for h in range(self.hkv)]

    def _evict(self, i, head, newest, target):
        if head == self.hkv - 1 and sum(map(len, self.live(i))) > self.hkv * self.budgets[i]:
            self.layer(i, newest, self.budgets[i] - (self.budget - target))

    def pins(self, units, newest):
        return {p for p in units if p < self.sinks} | set(units[len(units) - newest :])


def reference(backbone, cls, reader, **options):
    names = dict(chunk="chunk_size", sinks="num_sinks", stabilizers="num_stabilizers", local="local_window",
                 interval="decode_interval", budget="budget")  # fmt: skip
    plan = {name: PLAN[theirs] for name, theirs in names.items()}
    return cls(backbone.model, budgets=reader.budgets, positions=reader.plan.positions, **plan, **options)


def run_both(backbone, method, cls, positions, **options):
    """Logits of the prompt's end and of every step, and the units kept at the end, of both."""
    ids = tokens(N + STEPS)
    with torch.inference_mode():
        reader = reader_of(backbone, method, N, positions=positions, **PLAN)
        want = reference(backbone, cls, reader, **options)
        pairs = [(reader.read(ids[:, :N])[0], want.prefill(ids[:, :N]))]
        pairs += [(reader.step(ids[:, i])[0], want.step(ids[:, i : i + 1])) for i in range(N, N + STEPS)]
    assert kept(reader) == want.kept()
    assert want.merged
    for got, expected in pairs:
        assert relative(got, expected) < 1e-5  # biases are kept in float32
    return want


# ---------------------------------------------------------------------- RazorAttention


class RazorReference(MergedReference):
    def __init__(self, model, *, weights, **options):
        super().__init__(model, **options)
        self.weights, self.members = weights, {}

    def layer(self, i, newest, target):
        free = [[p for p in units if p not in self.pins(units, newest)] for units in self.live(i)]
        left = self.hkv * target - sum(map(len, self.live(i))) + sum(len(f) - bool(f) for f in free)
        ranked = sorted(
            (age / self.weights[i][h], h, p) for h, f in enumerate(free) for age, p in enumerate(reversed(f[1:]))
        )
        for _, h, p in ranked[left:]:
            self.alive[i][h, p] = False
            carrier = free[h][0]
            gone = self.members.setdefault((i, h, carrier), [carrier])
            gone.append(p)
            key, value = (x[i][0, h, gone].mean(0) for x in (self.k, self.v))
            self.merged[i, h, carrier] = key, value, math.log(len(gone))


def write_profiles(folder, backbone, echo, induction):
    made = backbone.fingerprint()
    for kind, scores in (("echo", echo), ("induction", induction)):
        HeadProfile(kind, scores, made, 1).save(folder / f"{kind}.json")
    return dict(echo=str(folder / "echo.json"), induction=str(folder / "induction.json"))


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_razor_is_the_plain_reading(exact, positions):
    run_both(exact, "razor", RazorReference, positions, weights=[[1, 1], [1, 1]])


def test_razor_gives_retrieval_heads_more(exact, tmp_path):
    """One of four KV heads: query head 6 of layer 1, which KV head 1 serves; by echo and by induction the same."""
    scores = [[0.1] * 8, [0.1] * 6 + [0.9, 0.1]]
    method = get_method("razor", **write_profiles(tmp_path, exact, scores, scores), ratio=4)
    want = run_both(exact, method, RazorReference, "compact", weights=[[1, 1], [1, 4]])
    lengths = [[len(head) for head in layer] for layer in want.kept()]
    assert lengths[1][1] > 2 * lengths[1][0]
    assert abs(lengths[0][0] - lengths[1][0]) <= 4
    assert lengths[0][0] == pytest.approx(lengths[0][1], abs=1)


def test_razor_is_full_attention_where_all_keys_are_equal(exact):
    """Values may differ: a mean with the count of what it stands for is exact (here without angles)."""
    g = torch.Generator().manual_seed(0)
    reader = reader_of(exact, "razor", 60, **PLAN)
    key = torch.randn(1, 2, 1, 8, generator=g, dtype=torch.float64).expand(1, 2, 60, 8)
    value = torch.randn(1, 2, 60, 8, generator=g, dtype=torch.float64)
    units = units_of(key, v=value, state=1)
    view = joined_of(ChunkView(0, key, key, value, 0, 0.3), key.repeat(1, 4, 1, 1), key, units=units)
    scores = torch.arange(60.0).expand(1, 2, 60)
    keep, merged = reader.method.reduce(scores, 20, torch.arange(60).expand(1, 2, 60) < 3, view)
    for head in range(2):
        mine = keep[0][(keep[0] >= 60 * head) & (keep[0] < 60 * head + 60)] - 60 * head
        assert len(mine) == 20
        weights = merged.bias[0, head, mine].softmax(-1).double()
        torch.testing.assert_close(weights @ merged.v[0, head, mine], value[0, head].mean(0), rtol=1e-6, atol=1e-6)


def test_razor_refuses_profiles_that_do_not_fit(exact, tmp_path):
    scores = [[0.1] * 8] * 2
    paths = write_profiles(tmp_path, exact, scores, scores)
    with pytest.raises(ConfigError, match="both profiles"):
        get_method("razor", echo=paths["echo"])
    with pytest.raises(ConfigError, match="are induction and echo profiles"):
        get_method("razor", echo=paths["induction"], induction=paths["echo"])
    with pytest.raises(DataError, match="is no head profile"):
        get_method("razor", echo="nowhere.json", induction="nowhere.json")
    deep = Backbone(build_tiny_model("llama", num_hidden_layers=3))
    with pytest.raises(ConfigError, match="made for another model"):
        reader_of(deep, get_method("razor", **paths), N, **PLAN)
    wide = Backbone(build_tiny_model("llama", num_key_value_heads=4))
    with pytest.raises(ConfigError, match="made for another model"), torch.inference_mode():
        reader_of(wide, get_method("razor", **paths), N, **PLAN).read(tokens(N))


# ---------------------------------------------------------------------- KVMerger


class KVMergerReference(MergedReference):
    threshold, sigma, heavy = -0.3, 1.5, 0.24

    def layer(self, i, newest, target):
        for h, units in enumerate(self.live(i)):
            pinned = self.pins(units, newest)
            score = self.s[i][h]
            best = sorted((p for p in units if p not in pinned), key=lambda p: -score[p])[: int(self.heavy * target)]
            key, value = ({p: self.merged.get((i, h, p), (self.k[i][0, h, p], self.v[i][0, h, p]))[at] for p in units}
                          for at in (0, 1))  # fmt: skip
            near = [(torch.cosine_similarity(key[a], key[b], 0).item(), b) for a, b in itertools.pairwise(units)
                    if not {a, b} & (pinned | set(best))]  # fmt: skip
            near = sorted((x for x in near if x[0] > self.threshold), reverse=True)[: len(units) - target]
            joined, runs = {b for _, b in near}, []
            for p in units:
                if p in joined:
                    runs[-1].append(p)
                else:
                    runs.append([p])
            alive = []
            for run in runs:
                pivot = max(run, key=lambda p: score[p])
                alive.append(pivot)
                if len(run) > 1:
                    g = [math.exp(-(key[pivot] - key[p]).pow(2).sum().item() / (2 * self.sigma**2)) for p in run]
                    mean = [sum(w * x[p] for w, p in zip(g, run)) / sum(g) for x in (key, value)]
                    self.merged[i, h, pivot] = (*mean, 0.0)
            stay = sorted(alive, key=lambda p: (p not in pinned, -score[p]))[:target]
            self.alive[i][h] = False
            self.alive[i][h, stay] = True


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_kvmerger_is_the_plain_reading(exact, positions):
    method = get_method("kvmerger", threshold=-0.3, sigma=1.5)
    run_both(exact, method, KVMergerReference, positions)


def test_kvmerger_with_a_threshold_of_one_is_h2o(exact):
    results = []
    for method in ("h2o", get_method("kvmerger", threshold=1.0)):
        reader = reader_of(exact, method, N, **PLAN)
        with torch.inference_mode():
            results.append((reader.read(tokens(N)), kept(reader)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_kvmerger_refuses_bad_options():
    for options, message in (
        (dict(threshold=2), "from -1 to 1"),
        (dict(sigma=0), "from 0.001"),
        (dict(heavy=2), "0 to 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            get_method("kvmerger", **options)


# ---------------------------------------------------------------------- LoCoCo


class LoCoCoReference(MergedReference):
    """Scores are of the latest chunk, or a column of numbers that never change."""

    def __init__(self, model, *, mergers, once=None, **options):
        super().__init__(model, **options)
        self.mergers, self.once = mergers, once
        if once:
            self.score = once

    def heard(self, i, kv, weights):
        if not self.once:
            if self.first.get((i, kv)) != self.n:
                self.s[i][kv] = 0.0
                self.first[i, kv] = self.n
            self.s[i][kv] += weights.sum(0)

    first = {}  # noqa: RUF012  # (layer, KV head) -> the chunk whose attention is summed

    def layer(self, i, newest, target):
        merge = self.mergers[i]
        slots, width = merge.slots, merge.conv.kernel_size[0]
        for h, units in enumerate(self.live(i)):
            pinned, score = self.pins(units, newest), self.s[i][h]
            ranked = sorted(units, key=lambda p: (p not in pinned, -score[p]))
            heavy, rest = ranked[: target - slots], sorted(ranked[target - slots :])
            own = {p: self.merged.get((i, h, p), (self.k[i][0, h, p], self.v[i][0, h, p])) for p in rest}
            key, value = (torch.stack([own[p][at] for p in rest]) for at in (0, 1))
            x = torch.cat((key, value), -1).float()
            padded = torch.nn.functional.pad(x, (0, 0, width // 2, width // 2))
            logits = torch.stack([
                (merge.conv.weight * padded[j : j + width].T).sum((1, 2)) + merge.conv.bias for j in range(len(rest))
            ]).relu()  # fmt: skip
            weights = merge.mix * logits.softmax(0).T  # [slots, candidates]
            places = sorted(sorted(rest, key=lambda p: -score[p])[:slots])
            for slot, p in enumerate(places):
                weights[slot, rest.index(p)] += 1 - merge.mix
            for slot, p in enumerate(places):
                self.merged[i, h, p] = (*((weights[slot].double() @ x) for x in (key, value)), 0.0)
            if self.once:
                score[places] = min(score[p].item() for p in [*heavy, *places])
            self.alive[i][h] = False
            self.alive[i][h, [*heavy, *places]] = True


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("base", ["", "knorm"])
def test_lococo_is_the_plain_reading(exact, tmp_path, positions, base):
    path = write_mergers(tmp_path / "m", exact)
    LoCoCoReference.first = {}
    method = get_method("lococo", path=str(path), base=base)
    once = naive_key_norm if base else None
    run_both(exact, method, LoCoCoReference, positions, mergers=Mergers.load(path), once=once)


def test_lococo_with_lambda_0_is_eviction(exact, tmp_path):
    path = write_mergers(tmp_path / "m", exact, mix=0.0)
    results = []
    for method in ("h2o", get_method("lococo", path=str(path), base="h2o")):
        reader = reader_of(exact, method, N, **PLAN)
        with torch.inference_mode():
            results.append((reader.read(tokens(N)), kept(reader)))
    assert relative(results[1][0], results[0][0]) < 1e-5  # mergers work in float32
    assert results[0][1] == results[1][1]


def test_lococo_refuses_what_does_not_fit(exact, tmp_path):
    with pytest.raises(ConfigError, match="give path: a file that `locret"):
        get_method("lococo")
    path = str(write_mergers(tmp_path / "m", exact, slots=28))
    with pytest.raises(ConfigError, match="28 merged units do not fit the 26 units"):
        reader_of(exact, get_method("lococo", path=path), N, **PLAN)
    deep = Backbone(build_tiny_model("llama", num_hidden_layers=3))
    with pytest.raises(ConfigError, match="made for another model"):
        reader_of(deep, get_method("lococo", path=path), N, **PLAN)
    with pytest.raises(ConfigError, match="base 'kvmerger' does not score units by itself"):
        get_method("lococo", path=path, base="kvmerger")
