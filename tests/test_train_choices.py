"""Choices of a run that change what heads learn from: many answers, own answers, eviction, gold spans, long inputs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import pytest
import torch
from conftest import build_byte_tokenizer, build_tiny_model
from oracles import Meter
from test_train import SMALL, make_backbone, make_samples, run_of, same

from locret.backbone import Backbone
from locret.data import Sample, Samples
from locret.errors import ConfigError, DataError
from locret.fused import recognise
from locret.heads import HeadInput, HeadsConfig, RetainingHeads
from locret.methods import get_method
from locret.parallel import Shard
from locret.train import LOG_FILE, LabelPass, TrainConfig, evaluate, evicted, train
from locret.train.answers import answered_by
from locret.train.evicted import cache_config
from locret.train.passes import score_in_pieces
from locret.train.run import Run


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_backbone()


def labels_of(backbone, sample, **options):
    found = {}
    options = dict(label="max-logit", wants_hidden=False, max_length=10_000) | options
    run = LabelPass(backbone, range(backbone.num_layers), **options)
    run(sample, lambda layer, inputs, labels: found.update({layer: labels}))
    return found


def test_tokens_appended_to_reach_a_round_length_change_no_label(backbone):
    """On CUDA lengths are rounded up, so that few attention plans are made."""
    sample = make_samples(1)[0]
    run = LabelPass(backbone, range(2), label="max-logit", wants_hidden=False, max_length=10_000)
    run.round_to = 8
    found = {}
    run(sample, lambda layer, inputs, labels: found.update({layer: labels}))
    for layer, labels in labels_of(backbone, sample).items():
        assert labels.shape[-1] == len(sample.prompt_ids)
        torch.testing.assert_close(found[layer], labels, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"input": "hidden"}, {"token_chunk": 20}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_layers_in_fewer_kernels_teach_the_same(family, options, tmp_path):
    """On a GPU the backbone walks through layers of the Llama shape by itself, and adds residuals in place; longer
    inputs than token_chunk go through the modules, which can be given some tokens at a time."""
    sample, gradients, walks = make_samples(1)[0], [], []
    for fast in (False, True):
        backbone = make_backbone(family)
        if fast:
            backbone.fused = recognise(backbone)
            walk = backbone.fused.run
            object.__setattr__(backbone.fused, "run", lambda *a, walk=walk, **k: walks.append(1) or walk(*a, **k))
        run = run_of(backbone, [sample], tmp_path / str(fast), **options)
        run.learn(sample)
        gradients.append([p.grad for p in run.weights])
    assert len(walks) == ("token_chunk" not in options)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("label", ["max-logit", "log-mass", "log-value"])
def test_labels_on_a_gpu_in_bf16_are_near_those_of_a_cpu_in_fp32(label):
    """Other kernels for norms, attention and label maxima; lengths are rounded up, and 203 is no round number."""
    shape = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, initializer_range=0.05)
    sample = Sample([8 + (i * i) % 250 for i in range(200)], [9, 10, 11])
    model = build_tiny_model("llama", **shape)
    plain = labels_of(Backbone(model, build_byte_tokenizer()), sample, label=label)
    fast = Backbone(model.to("cuda", torch.bfloat16), build_byte_tokenizer())
    for layer, labels in labels_of(fast, sample, label=label).items():
        assert labels.shape == plain[layer].shape
        error = (labels.cpu() - plain[layer]).norm() / plain[layer].norm()
        assert error < 0.05, (layer, error)  # on a CPU bf16 alone makes 0.02


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize("label", ["max-logit", "log-mass", "log-value"])
def test_labels_of_a_conversation_are_the_largest_of_its_beginnings(label):
    """Run each beginning that ends with an answer as a sample of its own; a unit's label is the largest it got."""
    backbone = make_backbone("llama", torch.float64)
    ids = make_samples(1, length=120)[0].prompt_ids[:60]
    whole = Sample(ids[:50], ids[50:], turns=((20, 26), (33, 35)))
    got = labels_of(backbone, whole, label=label)
    parts = [labels_of(backbone, Sample(ids[:a], ids[a:b]), label=label) for a, b in whole.answers]
    for layer in range(backbone.num_layers):
        want = torch.full_like(got[layer], -math.inf)
        for part in parts:
            length = part[layer].shape[-1]
            want[..., :length] = torch.maximum(want[..., :length], part[layer])
        torch.testing.assert_close(got[layer], want, atol=1e-5, rtol=1e-5)
        assert (got[layer][..., :33] > parts[-1][layer][..., :33]).any()


def test_own_answers_are_the_models_greedy_ones(backbone):
    """As `model.generate` of the unhooked model gives them; the sample's prompt stays."""
    sample = make_samples(1)[0]
    ids = torch.tensor([sample.prompt_ids])
    want = backbone.model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    got = answered_by(backbone, sample, 12)
    assert got.answer_ids == want[0, ids.shape[1] :].tolist()
    assert (got.prompt_ids, got.name) == (sample.prompt_ids, sample.name)


def test_own_answers_stop_at_the_end_token():
    backbone, sample = make_backbone(), make_samples(1)[0]
    answer = answered_by(backbone, sample, 8).answer_ids
    backbone.model.generation_config.eos_token_id = [answer[3], 263]
    assert answered_by(backbone, sample, 8).answer_ids == answer[: answer.index(answer[3]) + 1]


def test_training_on_own_answers_needs_none_of_the_data(backbone, tmp_path):
    """Other answers in the data, the same heads: only the prompts matter."""
    config = TrainConfig(**{**SMALL, "steps": 4, "eval_samples": 0}, answers="model", answer_tokens=5)
    data = make_samples(4)
    other = [dataclasses.replace(sample, answer_ids=[9, 9]) for sample in data]
    first, second = (train(backbone, d, tmp_path / str(i), config) for i, d in enumerate((data, other)))
    assert same(first.heads, second.heads)


# ---------------------------------------------------------------------- what was dropped


def test_dropped_samples_are_reported_and_never_learned_from(backbone, tmp_path):
    lines = [json.dumps({"prompt": f"say {word} again", "answer": word}) for word in "abcdefghijklmno"]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines[:7], "{broken", *lines[7:]]))
    progress = []
    result = train(
        backbone,
        str(tmp_path / "x.jsonl"),
        tmp_path / "out",
        TrainConfig(**SMALL),
        on_check=lambda *n: progress.append(n),
    )
    assert (result.skipped, progress[-1]) == (1, (16, 16))
    assert "1 of 16 samples dropped (1 not JSON)" in result.summary()
    report = json.loads((tmp_path / "out" / "data.json").read_text())
    assert report["dropped"]["not JSON"]["places"] == [f"{tmp_path / 'x.jsonl'}:8"]
    assert result.heads.config.training["dropped"] == {"not JSON": 1}


def test_the_check_is_not_repeated_for_the_same_data_and_options(backbone, tmp_path):
    calls = []
    for length in (100, 100, 101):
        config = TrainConfig(**SMALL, max_length=length)
        train(backbone, make_samples(), tmp_path, config, resume=False, on_check=lambda *n: calls.append(n))
        calls.append("run")
    assert [calls.index("run"), calls[21], calls[-1]] == [20, "run", "run"]
    assert len(calls) == 20 + 1 + 1 + 20 + 1


def test_too_many_broken_samples_stop_the_run(backbone, tmp_path):
    data = [*make_samples(4), {"prompt_ids": [9]}]
    with pytest.raises(DataError, match="1 of 5 samples cannot be used, more than max_dropped 10%: 1 unknown form"):
        train(backbone, data, tmp_path, TrainConfig(**SMALL))


def test_the_limit_of_drops_also_holds_for_a_check_from_before(backbone, tmp_path):
    data = [*make_samples(4), {"prompt_ids": [9]}]
    train(backbone, data, tmp_path, TrainConfig(**SMALL, max_dropped=0.5))
    with pytest.raises(DataError, match="more than max_dropped 10%"):
        train(backbone, data, tmp_path, TrainConfig(**SMALL), resume=False)


def test_query_aware_heads_say_so(tmp_path):
    data = [{"document": "some text", "question": f"what is {c}?", "answer": c} for c in "abcd"]
    result = train(make_backbone(), data, tmp_path, TrainConfig(**SMALL, query_aware=True))
    assert RetainingHeads.from_pretrained(tmp_path).config.query_aware
    with pytest.raises(ConfigError, match="query_aware is True, but these Samples have question_first False"):
        train(make_backbone(), Samples(make_samples(), None), tmp_path, TrainConfig(**SMALL, query_aware=True))
    assert result.finished


# ---------------------------------------------------------------------- measuring


def test_gold_spans_retained_are_counted_by_hand(backbone):
    """Scores put the first tokens on top: of the spans 0..2 and 30..32, half is in the top tenth of 40."""
    sample = Sample(list(range(8, 48)), [60, 61], gold=((0, 2), (30, 32)))

    class First(torch.nn.Module):
        config, shard = HeadsConfig.of(backbone), Shard()

        def score(self, layer, q, k, v, hidden=None):
            return -torch.arange(40.0).expand(1, 2, 40)

    run = LabelPass(backbone, range(2), label="max-logit", wants_hidden=False, max_length=1000)
    found = evaluate(First(), run, [sample, Sample(sample.prompt_ids, [9])], [0.1, 0.8])
    assert found.retention_at == {0.1: 0.5, 0.8: 1.0}
    labels = labels_of(backbone, sample), labels_of(backbone, Sample(sample.prompt_ids, [9]))
    hits = [set(y.topk(4).indices.tolist()) & {0, 1, 2, 3} for part in labels for i in range(2) for y in part[i][0]]
    assert found.overlap_at[0.1] == found.overlap == pytest.approx(sum(map(len, hits)) / (4 * len(hits)))


def test_the_log_has_overlap_at_every_budget_and_best_heads_are_kept(backbone, tmp_path):
    data = [dataclasses.replace(sample, gold=((1, 4),)) for sample in make_samples()]
    config = TrainConfig(**SMALL, eval_budgets=(0.25, 0.5))
    result = train(backbone, data, tmp_path, config)
    records = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    measured = [r for r in records if "overlap" in r]
    assert all(
        {"overlap_at_0.25", "overlap_at_0.5", "retention_at_0.25", "retention_at_0.5"} <= set(r) for r in measured
    )
    best = RetainingHeads.from_pretrained(tmp_path / "best")
    assert best.config.training["overlap"] == max(r["overlap"] for r in measured)
    assert {p.dtype for p in best.parameters()} == {torch.bfloat16}
    if best.config.training["step"] == result.step:
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(best.parameters(), result.heads.parameters()))


def test_a_loss_that_rises_is_reported_with_its_sample(backbone, tmp_path, monkeypatch):
    """The eighth sample's loss comes out a hundred times too large."""
    learn, names, warnings = Run.learn, [], []

    def spiked(self, sample):
        names.append(sample.name)
        return learn(self, sample) * (100 if len(names) == 8 else 1)

    monkeypatch.setattr(Run, "learn", spiked)
    train(backbone, make_samples(), tmp_path, TrainConfig(**SMALL), on_progress=lambda p: warnings.append(p.warning))
    records = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    risen = [name for r in records for name in r.get("risen", {})]
    assert risen == [names[7]]
    assert any(f"of {names[7]}," in warning and "times" in warning for warning in warnings)


# ---------------------------------------------------------------------- long inputs


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3-moe"])
def test_pieces_of_tokens_change_nothing(family, tmp_path):
    """MLPs, norms, RoPE and heads 16 tokens at a time: the same loss and gradients as all at once."""
    backbone, sample = make_backbone(family), make_samples(1, length=100)[0]
    assert len(sample.prompt_ids) > 40
    runs = [run_of(backbone, [sample], tmp_path / str(size), token_chunk=size) for size in (16, 1000)]
    losses = [run.learn(sample) for run in runs]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    for a, b in zip(*(run.weights for run in runs)):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)
    assert all("forward" not in module.__dict__ for module in backbone.model.modules())


@pytest.mark.parametrize(("family", "counts"), [("llama", [1, 0]), ("gemma3", [1, 0]), ("mistral-window", None)])
def test_what_nobody_reads_is_not_computed(family, counts, tmp_path):
    """The last learned layer ends the pass: its MLP, and what follows, would cost a full layer of every step."""
    backbone = make_backbone(family)
    if counts is None:
        with pytest.raises(ConfigError, match="every layer of this backbone has a sliding window"):
            run_of(backbone, make_samples(1), tmp_path)
        return
    calls = [0] * backbone.num_layers
    for i, layer in enumerate(backbone.model.model.layers):
        layer.mlp.register_forward_hook(lambda *a, i=i: calls.__setitem__(i, calls[i] + 1))
    before = backbone.model.config._attn_implementation
    run_of(backbone, make_samples(1), tmp_path).learn(make_samples(1)[0])
    assert calls == counts
    assert backbone.model.config._attn_implementation == before
    assert backbone.model.model.rotary_emb is backbone.rotary


def test_scores_in_pieces_have_the_gradients_of_all_at_once(backbone, tmp_path):
    heads = run_of(backbone, make_samples(1), tmp_path).heads
    g = torch.Generator().manual_seed(0)
    inputs = HeadInput(*(torch.randn(1, h, 50, 8, generator=g) for h in (4, 2, 2)))
    grads = []
    for size in (7, 50):
        heads.zero_grad()
        scores = score_in_pieces(heads, 0, inputs, size)
        (scores**2).mean().backward()
        grads.append((scores.detach(), *(p.grad.clone() for p in heads.layers[0].parameters())))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_a_pass_holds_one_layers_activations(tmp_path):
    """Peak memory of one learning pass, counted by torch's dispatcher: six layers take what two take, and
    pieces make it smaller still (the MLP here is 12 times as wide as the rest)."""
    peaks = {}
    for layers, size in ((2, 4096), (6, 4096), (6, 128)):
        wide = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=768)
        model = build_tiny_model("llama-plain", **wide, num_hidden_layers=layers, max_position_embeddings=4096)
        backbone = Backbone(model, build_byte_tokenizer())
        sample = make_samples(1, length=4000)[0]
        run = run_of(backbone, [sample], tmp_path / f"{layers}-{size}", token_chunk=size, hidden_size=8)
        run.learn(sample)  # tables and gradients exist
        with Meter() as meter:
            run.learn(sample)
        peaks[layers, size] = meter.peak
    print(peaks)  # bytes; over tokens x hidden size x 4: numbers a token
    assert peaks[6, 4096] < 1.05 * peaks[2, 4096]
    assert peaks[6, 128] < 0.5 * peaks[6, 4096]


# ---------------------------------------------------------------------- eviction on


def test_eviction_with_room_for_everything_is_ordinary_training(backbone, tmp_path):
    """Nothing is evicted, so heads see the same inputs; chunks only change the order of sums and the smoothness across
    their borders."""
    sample = make_samples(1, length=100)[0]
    options = dict(smoothness=0.0, accumulate=1)
    plain = run_of(backbone, [sample], tmp_path / "a", **options)
    evicting = run_of(backbone, [sample], tmp_path / "b", **options, evict_budget=4096, evict_chunk=16)
    losses = [run.learn(sample) for run in (plain, evicting)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-4)
    for a, b in zip(plain.weights, evicting.weights):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-3)


def test_eviction_shows_heads_what_inference_computes(backbone, tmp_path, monkeypatch):
    """The inputs learned from are those that the method "locret" with the same heads is asked to score; the targets are
    those of full attention."""
    sample = make_samples(1, length=200)[0]
    run = run_of(backbone, [sample], tmp_path, evict_budget=32, evict_chunk=16, evict_stabilizers=4)
    seen = {}
    score = run.heads.score
    run.heads.score = lambda layer, *x: seen.setdefault(layer, []).append(x[0]) or score(layer, *x)
    run.learn(sample)
    learned = {layer: torch.cat(parts, 2) for layer, parts in seen.items()}
    seen.clear()
    method = get_method("locret", heads=run.heads)
    evicted.read_evicting(backbone, method, cache_config(run.config), sample)
    for layer, parts in seen.items():
        assert torch.equal(learned[layer], torch.cat(parts, 2))
        assert learned[layer].shape[2] == len(sample.prompt_ids)
    plain = {}
    run.label_pass(sample, lambda layer, inputs, labels: plain.update({layer: inputs.q}))
    assert not torch.allclose(plain[1], learned[1], atol=1e-3)  # eviction did change what layer 1 sees


def test_training_with_eviction_runs_and_is_on_record(backbone, tmp_path):
    config = TrainConfig(**SMALL, evict_budget=0.5, evict_chunk=16, max_length=40, truncate=True)
    result = train(backbone, make_samples(), tmp_path, config)
    assert math.isfinite(result.loss)
    assert result.heads.config.training["config"]["evict_budget"] == 0.5
    with pytest.raises(ConfigError, match=r"evict_budget is 1.5; it must be units"):
        TrainConfig(evict_budget=1.5)


def test_old_samples_in_memory_are_still_the_same_data():
    """The digest of samples without turns and spans is what 0.1.0 computed: its checkpoints go on."""
    sample = Sample([1, 2], [3], "x")
    old = "Sample(prompt_ids=[1, 2], answer_ids=[3], name='x')"
    assert Samples([sample], None).digest == hashlib.sha256(old.encode()).hexdigest()
    assert Samples([dataclasses.replace(sample, gold=((0, 1),))], None).digest != Samples([sample], None).digest
