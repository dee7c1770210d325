"""Distances to the full cache, against the plain transformers model in float64, and retention by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from locret.backbone import Backbone
from locret.config import CacheConfig
from locret.engine import LLM
from locret.evaluate.measures import distances, gold_kept
from locret.evaluate.session import Session
from locret.methods import get_method


def test_distance_by_hand() -> None:
    """Two tokens of a vocabulary of two: full gives (3/4, 1/4) twice, the other (1/8, 7/8) and (3/4, 1/4)."""
    full = torch.tensor([[0.75, 0.25], [0.75, 0.25]]).log().double()
    other = torch.tensor([[0.125, 0.875], [0.75, 0.25]]).log().double()
    [found] = distances([other], [[0, 1]], [full])
    assert found.nll == pytest.approx(-(math.log(1 / 8) + math.log(1 / 4)) / 2)
    assert found.delta == pytest.approx((math.log(3 / 4) - math.log(1 / 8)) / 2)
    assert found.kl == pytest.approx((0.75 * math.log(6) + 0.25 * math.log(2 / 7)) / 2)
    assert found.agreement == 0.5


def test_a_cache_is_at_no_distance_from_itself() -> None:
    logits = torch.randn(7, 50)
    [found] = distances([logits], [list(range(7))], [logits])
    assert (found.delta, found.kl, found.agreement) == (0.0, 0.0, 1.0)
    assert distances([logits], [list(range(7))], None)[0].kl is None


def test_texts_measured_together_are_measured_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of unequal lengths, cut into pieces of four tokens that end in the middle of a text."""
    monkeypatch.setattr("locret.evaluate.measures._TOKENS", 4)
    full, other = ([torch.randn(n, 9, dtype=torch.float64) for n in (3, 1, 6)] for _ in range(2))
    texts = [[1, 2, 3], [4], [0, 8, 7, 6, 5, 4]]
    together = distances(other, texts, full)
    for i, text in enumerate(texts):
        [alone] = distances([other[i]], [text], [full[i]])
        assert vars(together[i]) == pytest.approx(vars(alone), rel=1e-12)
        expected = torch.nn.functional.cross_entropy(other[i], torch.tensor(text)).item()
        assert together[i].nll == pytest.approx(expected, rel=1e-12)


def test_gold_kept_counts_per_head() -> None:
    positions = torch.tensor([[[0, 1, 5, 9], [2, 3, 4, 5]], [[-1, -1, 0, 4], [5, 6, 7, 8]]])
    gold = torch.zeros(2, 10, dtype=torch.bool)
    gold[0, [4, 5, 6]] = gold[1, [0, 5]] = True
    assert gold_kept(positions, gold).tolist() == [[1, 2], [1, 1]], "-1 pads ragged heads and is no unit"


@pytest.fixture
def backbone(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Backbone:
    return Backbone(tiny_model("qwen3", dtype=torch.float64), tiny_tokenizer)


def test_teacher_forcing_over_the_full_cache_is_the_plain_model(backbone: Backbone) -> None:
    """`Session.follow` of the full method, text in several chunks, against one forward pass of transformers."""
    ids = torch.randint(8, 264, (60,), generator=torch.Generator().manual_seed(0))
    context, question, text = ids[:30].int().numpy(), ids[30:36].tolist(), ids[36:].tolist()
    llm = LLM(backbone, get_method("full"), CacheConfig(chunk_size=7))
    logits = Session.compress(llm, [context]).follow([question], [text])[0]
    with torch.no_grad():
        plain = backbone.model(input_ids=ids[None]).logits[0, 35:-1]
    torch.testing.assert_close(logits, plain, atol=1e-10, rtol=1e-10)
    expected = torch.nn.functional.cross_entropy(plain, ids[36:]).item()
    assert distances([logits], [text], None)[0].nll == pytest.approx(expected, rel=1e-10)


def test_a_batch_follows_like_single_rows(backbone: Backbone) -> None:
    rows = torch.randint(8, 264, (3, 40), generator=torch.Generator().manual_seed(1)).int().numpy()
    llm = LLM(backbone, get_method("recency"), CacheConfig(budget=24, chunk_size=8))
    together = Session.compress(llm, list(rows))
    texts = [[11, 12, 13], [14], [15] * 21]  # one ends in a later chunk than the others
    found = together.rows([0, 1, 2]).follow([[9, 10]] * 3, texts)
    for i, text in enumerate(texts):
        [alone] = Session.compress(llm, [rows[i]]).follow([[9, 10]], [text])
        torch.testing.assert_close(found[i], alone)
