"""Head profiles: a head that copies scores 1, one that looks elsewhere 0; attention rows are the model's own."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_model
from oracles import tokens

from locret import profile
from locret.backbone import Backbone
from locret.errors import DataError
from locret.profile import (
    HeadProfile,
    Needle,
    copied,
    repetition_mass,
    repetition_profiles,
    retrieval_heads,
    retrieval_profile,
)


def eager_attention(model, ids):
    """[L, Hq, n, n] from transformers."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, output_attentions=True)
    model.set_attn_implementation("sdpa")
    return torch.cat(out.attentions).double()


# ---------------------------------------------------------------------- retrieval


def test_exactly_the_head_that_copies_scores():
    """Sentence 5 6 7 at places 3 to 5. Head 0 copies it, head 1 looks at the right token outside, head 2 into the
    sentence but at another token, head 3 copies one of three."""
    ids = torch.tensor([9, 5, 8, 5, 6, 7, 9, 9])
    said = torch.tensor([5, 6, 7])
    places = torch.tensor([[3, 4, 5], [1, 0, 0], [4, 5, 3], [3, 0, 4]])
    torch.testing.assert_close(copied(places, ids, said, 3, 6), torch.tensor([1.0, 0.0, 0.0, 1 / 3]))


def test_no_score_is_above_one():
    """A sentence that the answer says twice."""
    ids = torch.tensor([1, 2, 3, 2, 2])
    assert copied(torch.tensor([[1, 1]]), ids, torch.tensor([2, 2]), 1, 2).tolist() == [1.0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_the_profile_is_that_of_the_models_own_attention(family):
    model = build_tiny_model(family)
    backbone = Backbone(model)
    sentence = tokens(6, seed=5)[0]
    samples = []
    for seed in range(3):
        text = tokens(50, seed=seed)[0]
        samples.append(Needle(torch.cat((text[:20], sentence, text[20:], sentence)), 20, 26, 56))
    got = retrieval_profile(backbone, samples, recall=-1.0)  # random models answer nothing: count all
    want = torch.zeros(model.config.num_hidden_layers, 8)
    for sample in samples:
        attention = eager_attention(model, sample.ids[None])
        said = model(sample.ids[None]).logits[0].argmax(-1)
        for layer in range(len(want)):
            for head in range(8):
                for t in range(sample.answer - 1, len(sample.ids) - 1):
                    p = int(attention[layer, head, t].argmax())
                    want[layer, head] += (20 <= p < 26 and sample.ids[p] == said[t]) / 6 / 3
    torch.testing.assert_close(torch.tensor(got.scores), want)
    assert got.samples == 3
    assert got.kind == "retrieval"


def test_a_model_that_copies_has_heads_that_are_seen(monkeypatch):
    """Words put into the model's mouth: whatever a head looks at in the sentence is what it says."""
    backbone = Backbone(build_tiny_model("llama"))
    ids = torch.cat((tokens(40)[0], tokens(40)[0][10:14]))

    def watch(backbone, ids, look, rows, *, logits):
        for layer in range(2):
            attention = torch.zeros(8, len(rows), len(ids))
            attention[:, torch.arange(4), torch.arange(10, 14)] = 1.0
            attention[1:, :, 0] = 2.0  # all heads but one look at the first token
            look(layer, rows.start, attention)
        return torch.nn.functional.one_hot(ids[[10, 11, 12, 13, 0]], 264).float()

    monkeypatch.setattr(profile, "_watch", watch)
    got = retrieval_profile(backbone, [Needle(ids, 10, 14, 40)])
    assert got.scores == [[1.0] + [0.0] * 7] * 2
    assert got.per_kv_head().tolist() == [[1.0, 0.0]] * 2


def test_samples_that_are_not_answered_do_not_count():
    backbone = Backbone(build_tiny_model("llama"))
    ids = torch.cat((tokens(40)[0], tokens(40)[0][10:14]))
    with pytest.raises(DataError, match="answers none of these samples"):
        retrieval_profile(backbone, [Needle(ids, 10, 14, 40)])
    with pytest.raises(DataError, match=r"a needle at 10 .. 14 with an answer from 12 on in a text of 44 tokens"):
        retrieval_profile(backbone, [Needle(ids, 10, 14, 12)])


# ---------------------------------------------------------------------- echo and induction


def test_echo_and_induction_worked_by_hand():
    """a b c a b c: the second b (4) sees the first at 1 and what followed it at 2; with a BOS all is one later."""
    for start in (0, 1):
        rows = torch.zeros(3, 1, 6 + start)
        rows[0, 0, 1 + start] = 0.75  # copy
        rows[1, 0, 2 + start] = 0.5  # behind the copy
        rows[2, 0, 0] = rows[2, 0, 3 + start] = 0.5  # neither
        got = repetition_mass(rows, 4 + start, 3, start)
        torch.testing.assert_close(got, torch.tensor([[0.75, 0.0, 0.0], [0.0, 0.5, 0.0]]))


def test_the_profiles_are_sums_over_the_models_own_attention(monkeypatch):
    monkeypatch.setattr(profile, "_ROWS", 7)  # several blocks, the last one short
    model = build_tiny_model("llama")
    echo, induction = repetition_profiles(Backbone(model), length=9, repeats=3, seed=4)
    once = torch.randint(264, (9,), generator=torch.Generator().manual_seed(4))
    ids = torch.cat((torch.tensor([1]), once.repeat(3)))
    attention = eager_attention(model, ids[None])
    want = torch.zeros(2, 2, 8, dtype=torch.float64)
    for t in range(10, 28):
        copies = [t - 9 * k for k in (1, 2) if t - 9 * k >= 1]
        want[0] += attention[:, :, t, copies].sum(-1) / 18
        want[1] += attention[:, :, t, [c + 1 for c in copies]].sum(-1) / 18
    torch.testing.assert_close(torch.tensor(echo.scores), want[0].float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(induction.scores), want[1].float(), rtol=1e-4, atol=1e-6)
    assert (echo.kind, induction.kind) == ("echo", "induction")


def test_retrieval_heads_are_the_union_of_both_tops():
    echo, induction = torch.arange(100.0).view(10, 10), torch.arange(100.0).flip(0).view(10, 10)
    got = retrieval_heads(echo, induction)
    assert got.sum() == 1 + 14
    assert got.flatten().nonzero()[:, 0].tolist() == [*range(14), 99]


# ---------------------------------------------------------------------- files


def test_a_profile_is_what_was_saved(tmp_path):
    backbone = Backbone(build_tiny_model("llama"))
    echo, _ = repetition_profiles(backbone, length=5, repeats=2)
    echo.save(tmp_path / "echo.json")
    assert HeadProfile.load(tmp_path / "echo.json") == echo
    HeadProfile("echo", echo.scores[:1], echo.backbone, 1).save(tmp_path / "short.json")
    with pytest.raises(DataError, match=r"scores are \[1, 8\], but its model has \[2, 8\]"):
        HeadProfile.load(tmp_path / "short.json")
    (tmp_path / "other.json").write_text('{"kind": 1}')
    with pytest.raises(DataError, match="is no head profile"):
        HeadProfile.load(tmp_path / "other.json")
    with pytest.raises(DataError, match="is no head profile"):
        HeadProfile.load(tmp_path / "none.json")
