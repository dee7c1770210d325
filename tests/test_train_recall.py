"""Recall in training: what a small cache leaves of the answers, by the heads as they are."""

from __future__ import annotations

import json

import pytest
import torch
from test_train import SMALL, make_backbone, make_samples

from locret.backbone import EMBEDDED, Backbone
from locret.data import Sample
from locret.errors import ConfigError
from locret.heads import HeadsConfig, RetainingHeads
from locret.tasks.build import build
from locret.tasks.filler import ProseFiller
from locret.train import LOG_FILE, TrainConfig, train
from locret.train.recall import answered_share, recall


def test_a_cache_with_room_for_everything_recalls_what_the_plain_model_does():
    """Teacher forcing by transformers itself."""
    backbone = make_backbone()
    heads = RetainingHeads(HeadsConfig.of(backbone, hidden_size=8))
    shares = []
    for sample in make_samples(6):
        ids = torch.tensor([sample.prompt_ids + sample.answer_ids])
        with torch.no_grad():
            greedy = backbone.model(ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1].argmax(-1)
        own = Sample(sample.prompt_ids, [int(greedy[0]), *sample.answer_ids[1:]])  # at least one right
        wanted = torch.tensor(own.answer_ids)
        with torch.no_grad():
            ids = torch.tensor([own.prompt_ids + own.answer_ids])
            greedy = backbone.model(ids, use_cache=False).logits[0, len(own.prompt_ids) - 1 : -1].argmax(-1)
        want = (greedy == wanted).float().mean().item()
        assert answered_share(backbone, heads, own, 4096) == pytest.approx(want)
        shares.append(want)
    assert 0 < min(shares) < 1


def test_recall_tells_good_heads_from_bad_ones():
    """The embedded model and its heads, then the same heads upside down."""
    backbone, heads = Backbone.load(device="cpu"), RetainingHeads.from_pretrained(EMBEDDED / "heads").float()
    tokenizer = backbone.need_tokenizer()
    filler = ProseFiller.from_seed(1, tokenizer)
    samples = []
    for seed in range(2):
        made = build("number", seed=seed, length=500, tokenizer=tokenizer, filler=filler, num_facts=1, wording="train")
        answer = tokenizer.encode(" " + made.questions[0].answer, add_special_tokens=False)
        samples.append(Sample(list(made.prompt_ids(tokenizer)), answer))
    good = recall(backbone, heads, samples, 0.2)
    for layer in heads.layers:
        layer.fc2.weight.data.neg_()
    assert good > 0.8
    assert recall(backbone, heads, samples, 0.2) < good - 0.3


def test_recall_is_logged_at_every_evaluation(tmp_path):
    train(make_backbone(), make_samples(), tmp_path, TrainConfig(**SMALL, recall_budget=40))
    lines = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    found = [line["recall_at_40"] for line in lines if "overlap" in line]
    assert len(found) == 2
    assert all(0 <= value <= 1 for value in found)


def test_a_budget_too_small_for_a_held_out_prompt_is_an_error_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match=r"recall_budget 0\.1 is too small for the prompt of s\d+, \d+ tokens: "):
        train(make_backbone(), make_samples(), tmp_path, TrainConfig(**SMALL, recall_budget=0.1))
    with pytest.raises(ConfigError, match="recall_budget needs held-out samples"):
        train(make_backbone(), make_samples(), tmp_path, TrainConfig(**{**SMALL, "eval_samples": 0}, recall_budget=40))
    assert not (tmp_path / "checkpoint.pt").exists()
