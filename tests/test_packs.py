"""Packed samples: side by side in one pass they give the losses, labels and gradients that they give alone."""

from __future__ import annotations

import pytest
import torch
from conftest import build_byte_tokenizer, build_tiny_model
from test_train import SMALL, TINY, make_backbone, make_samples, run_of, weights_of

from locret.backbone import Backbone
from locret.data import Sample
from locret.errors import ConfigError
from locret.train import LabelPass, TrainConfig, train
from locret.train.packs import in_packs, length_of, run_pack

FAMILIES = ["llama", "gemma2", "smollm3", "phi3-longrope"]  # scaled RoPE, softcap, layers without RoPE, LongRoPE


def gradients(run):
    return [p.grad.clone() for p in run.weights]


@pytest.mark.parametrize("options", [{}, {"input": "hidden", "objective": "ranking"}, {"token_chunk": 37}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_is_its_samples(family, options, tmp_path):
    """fp64 backbones; a conversation among them, and prompts longer than max_length."""
    shape = TINY if family != "phi3-longrope" else {}
    backbone = Backbone(build_tiny_model(family, torch.float64, **shape), build_byte_tokenizer())
    samples = make_samples(3, length=60)
    ids = samples[0].prompt_ids
    samples.append(Sample(ids[:20], ids[20:24], turns=((5, 9), (12, 14))))
    options = {"max_length": 40, "truncate": True, "accumulate": 4, **options}
    alone = run_of(backbone, samples, tmp_path / "a", **options)
    alone.heads.double()
    losses = [alone.learn(sample) for sample in samples]
    pack = run_of(backbone, samples, tmp_path / "b", **options)
    pack.heads.double()
    together = pack.learn_pack(samples)
    torch.testing.assert_close(together, losses, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradients(pack), gradients(alone), rtol=1e-4, atol=1e-7)  # fc2 runs in fp32


def test_rows_made_longer_change_nothing():
    """On CUDA lengths are rounded up: what is appended belongs to no sample."""
    backbone, samples = make_backbone(), make_samples(3)
    found = []
    for round_to in (1, 8):
        run = LabelPass(backbone, range(2), label="max-logit", wants_hidden=False, max_length=1000)
        run.round_to = round_to
        labels = []
        run_pack(run, samples, lambda layer, inputs, pieces, labels=labels: labels.append(pieces))
        found.append(labels)
    starts = [[start for start, _ in labels[0]] for labels in found]
    assert starts[0] != starts[1]
    assert all(start % 8 == 0 for start in starts[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close([y for _, y in one], [y for _, y in other], rtol=1e-5, atol=1e-5)


def test_packs_hold_neighbours_up_to_a_limit():
    samples = [Sample([1] * n, [2]) for n in (3, 4, 20, 1, 2, 5)]  # 4, 5, 21, 2, 3, 6 tokens
    sizes = [[length_of(s) for s in pack] for pack in in_packs(samples, 9)]
    assert sizes == [[4, 5], [21], [2, 3], [6]]
    assert [len(pack) for pack in in_packs(samples, None)] == [1] * 6


def test_a_packed_run_is_the_same_run(tmp_path):
    """Weights after twelve steps, the log's losses and a resumed half."""
    backbone, data = make_backbone(), make_samples()
    options = {**SMALL, "accumulate": 4}
    plain = train(backbone, data, tmp_path / "plain", TrainConfig(**options))
    packed = train(backbone, data, tmp_path / "packed", TrainConfig(**options, pack_tokens=120))
    assert packed.loss == pytest.approx(plain.loss, rel=1e-4)
    for a, b in zip(weights_of(packed.heads), weights_of(plain.heads), strict=True):
        assert (a - b).abs().max() < 1e-4


def test_packs_and_eviction_exclude_each_other():
    with pytest.raises(ConfigError, match="leave out pack_tokens or evict_budget"):
        TrainConfig(pack_tokens=100, evict_budget=50)
