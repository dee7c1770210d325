"""Objectives: each equals its formula, is best where scores are right, and trains heads end to end."""

from __future__ import annotations

import json

import pytest
import torch
from test_train import make_backbone, make_samples

from locret.heads import RetainingHeads
from locret.labels import LABELS
from locret.methods import get_method
from locret.train import OBJECTIVES, TrainConfig, layer_loss, make_objective, train


def random_labels(*shape, seed=0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) - 1


def test_ranking_is_the_divergence_of_standardised_labels():
    """KL(p || s) token by token, float64."""
    labels, scores = random_labels(1, 2, 9), random_labels(1, 2, 9, seed=1)
    objective = make_objective("ranking", top_share=0.1)
    got = objective.fit(scores, objective.targets(labels))
    want = 0.0
    for y, s in zip(labels[0].double(), scores[0].double()):
        p = torch.exp((y - y.mean()) / ((y - y.mean()) ** 2).mean().sqrt())
        p, e = p / p.sum(), torch.exp(s) / torch.exp(s).sum()
        want += sum(float(a * torch.log(a / b)) for a, b in zip(p, e)) / 2
    assert got.item() == pytest.approx(want, rel=1e-5)
    assert objective.fit(objective.targets(labels) + 7, objective.targets(labels)).item() == pytest.approx(0, abs=1e-5)


def test_ranking_of_equal_labels_is_finite():
    objective = make_objective("ranking", top_share=0.1)
    assert torch.isfinite(objective.targets(torch.full((1, 2, 5), 3.0))).all()


def test_membership_is_a_balanced_cross_entropy():
    """Worked by hand: 10 units, share 0.2, so two members; scores of 0 cost log 2 whatever the balance."""
    objective = make_objective("top-k", top_share=0.2)
    labels = torch.arange(10.0).view(1, 1, 10)
    targets = objective.targets(labels)
    assert targets.flatten().tolist() == [0.0] * 8 + [1.0] * 2
    assert objective.fit(torch.zeros(1, 1, 10), targets).item() == pytest.approx(0.693147, rel=1e-4)
    one_wrong = torch.where(targets > 0, -20.0, -20.0)  # members missed: half the weight lies on them
    assert objective.fit(one_wrong, targets).item() == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_is_least_where_scores_are_right(name):
    """Scores equal to the targets (for members: far apart in the right direction) beat any we draw."""
    objective = make_objective(name, top_share=0.25)
    targets = objective.targets(random_labels(1, 2, 40))
    best = 40 * (targets - 0.5) if name == "top-k" else targets
    least = objective.fit(best, targets)
    for seed in range(5):
        assert objective.fit(best + 20 * random_labels(1, 2, 40, seed=seed), targets) > least + 1e-3


def test_the_default_objective_is_the_papers():
    scores, labels = random_labels(1, 2, 9), random_labels(1, 2, 9, seed=1)
    assert torch.equal(
        layer_loss(scores, labels, 4, 0.0025),
        layer_loss(scores, labels, 4, 0.0025, make_objective(TrainConfig().objective, top_share=0.1)),
    )
    assert (TrainConfig().label_kind, TrainConfig().input) == ("max-logit", "qkv")


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("reads", ["qkv", "hidden"])
def test_every_objective_and_input_learns_and_is_on_record(name, reads, tmp_path):
    """A score reaches the label's top tokens on samples learned by heart; heads say what they are and load."""
    backbone = make_backbone("llama")
    data = make_samples(3, length=40)
    config = TrainConfig(
        steps=100, lr=1e-2, hidden_size=32, eval_samples=0, log_every=10, objective=name, input=reads, top_share=0.2
    )
    result = train(backbone, data, tmp_path, config)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    heads = RetainingHeads.from_pretrained(tmp_path)
    assert (heads.config.objective, heads.config.input) == (name, reads)
    assert heads.config.label == OBJECTIVES[name].label
    assert get_method("locret", heads=heads).wants_hidden == (reads == "hidden")
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), result.heads.parameters(), strict=True))


@pytest.mark.parametrize("label", LABELS)
def test_any_objective_takes_any_label(label, tmp_path):
    config = TrainConfig(steps=2, hidden_size=16, eval_samples=0, objective="ranking", label=label)
    assert train(make_backbone(), make_samples(3), tmp_path, config).heads.config.label == label
