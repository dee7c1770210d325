"""The trainer: the right labels, a loss that falls, and runs that can be killed and go on bit for bit."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build_byte_tokenizer, build_tiny_model
from test_labels import naive
from transformers import AttentionInterface

from locret.backbone import Backbone
from locret.data import Sample, Samples
from locret.errors import ConfigError, DataError, HeadsError, NumericsError
from locret.heads import RetainingHeads
from locret.kernels.attention import reference_attention
from locret.labels import attention_labels
from locret.train import CHECKPOINT_FILE, LOG_FILE, LabelContext, TrainConfig, layer_loss, passes, top_overlap, train
from locret.train import run as run_module
from locret.train.run import Run

TINY = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
SMALL = dict(steps=12, hidden_size=16, eval_samples=2, eval_every=6, log_every=3, checkpoint_every=4)
FAMILIES = ["llama", "qwen3", "gemma2", "smollm3"]


def make_backbone(family="llama", dtype=torch.float32) -> Backbone:
    return Backbone(build_tiny_model(family, dtype, **TINY), build_byte_tokenizer())


def make_samples(count=20, length=60, seed=0) -> list[Sample]:
    rng = random.Random(seed)
    ids = lambda n: [rng.randrange(8, 264) for _ in range(n)]
    return [Sample(ids(rng.randrange(length // 2, length)), ids(rng.randrange(1, 9)), f"s{i}") for i in range(count)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the child processes: a sum's order must not depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_backbone()


def run_of(backbone, data, folder, **options) -> Run:
    return Run(backbone, Samples(data, None), folder, TrainConfig(**{"hidden_size": 16, "eval_samples": 0, **options}))


def weights_of(heads: RetainingHeads) -> list[torch.Tensor]:
    return [p.detach().clone() for p in heads.parameters()]


def same(a: RetainingHeads, b: RetainingHeads) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# ---------------------------------------------------------------------- labels in training


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_in_training_are_the_logits_of_plain_attention(family):
    """Layer by layer: the largest pre-softmax logit that any answer token gives a prompt key in the *unhooked* model,
    run by transformers with its own RoPE, masks aside."""
    backbone = make_backbone(family, torch.float64)
    ids, prompt_len = torch.tensor([[*make_samples(1)[0].prompt_ids, 9, 10, 11, 12]]), 31
    plain: dict[int, tuple[torch.Tensor, torch.Tensor, float, float | None]] = {}

    def record(module, q, k, v, mask, scaling=None, softcap=None, sliding_window=None, **kwargs):
        plain[module.layer_idx] = q, k, scaling, softcap
        out = reference_attention(q, k, v, scale=scaling, softcap=softcap, window=sliding_window)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("record", record)
    before = backbone.model.config._attn_implementation
    backbone.model.set_attn_implementation("record")
    with torch.no_grad():
        backbone.model(ids, use_cache=False)
    backbone.model.set_attn_implementation(before)

    seen = {}
    layers = range(backbone.num_layers)
    rope = backbone.rope(ids.shape[1], prompt_len)
    answers = [(prompt_len, ids.shape[1])]
    context = LabelContext(rope, layers, answers, prompt_len, lambda i, x, y: seen.update({i: (x.q, x.k, x.v, y)}))
    with torch.no_grad():
        backbone.run(ids, context, logits=0)
    for i in layers:
        q, k, scale, softcap = plain[i]
        want = naive(q, k, prompt_len, scale)
        want = want if softcap is None else softcap * torch.tanh(want / softcap)
        assert [x.shape[2] for x in seen[i]] == [prompt_len] * 4
        torch.testing.assert_close(seen[i][3].double(), want, atol=1e-5, rtol=1e-5)


def test_heads_see_the_projections_before_rope():
    backbone, seen, projected = make_backbone("llama"), {}, {}
    for i, layer in enumerate(backbone.model.model.layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).register_forward_hook(
                lambda m, a, out, key=(i, name): projected.update({key: out})
            )
    ids = torch.tensor([make_samples(1)[0].prompt_ids])
    context = LabelContext(
        backbone.rope(ids.shape[1], 20), [0, 1], [(20, ids.shape[1])], 20, lambda i, x, y: seen.update({i: x[:3]})
    )
    with torch.no_grad():
        backbone.run(ids, context, logits=0)
    for i in range(2):
        for x, name in zip(seen[i], ("q_proj", "k_proj", "v_proj")):
            assert torch.equal(x.transpose(1, 2).flatten(2), projected[i, name][:, :20])


def test_truncation_learns_from_the_first_tokens_with_the_labels_of_the_whole_prompt(backbone, tmp_path, monkeypatch):
    """As released: labels come from the full prompt and answer, then both are cut."""
    sample, shapes = make_samples(1, length=80)[0], []
    whole = attention_labels
    monkeypatch.setattr(run_module, "layer_loss", lambda s, y, *a: shapes.append((s.shape, y)) or layer_loss(s, y, *a))
    monkeypatch.setattr(passes, "attention_labels", lambda *a, **k: shapes.append(whole(*a, **k)) or whole(*a, **k))
    run_of(backbone, [sample], tmp_path, max_length=10, truncate=True, steps=1).learn(sample)
    for full, (shape, cut) in zip(shapes[::2], shapes[1::2]):
        assert shape == (1, 2, 10)
        assert torch.equal(cut, full[:, :, :10])
        assert full.shape[2] == len(sample.prompt_ids)


# ---------------------------------------------------------------------- the loss


def test_the_loss_is_the_released_one():
    """SmoothL1: a mean over layers; smoothness: a sum over layers, weight 0.0025."""
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(3, 1, 2, 9, generator=g) * 3, torch.randn(3, 1, 2, 9, generator=g)
    got = sum(layer_loss(s, y, 3, 0.0025) for s, y in zip(scores, labels))
    error = (scores - labels).abs()
    fit = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
    steps = sum(((s[..., 1:] - s[..., :-1]) ** 2).mean() for s in scores)
    assert got.item() == pytest.approx((fit + 0.0025 * steps).item(), rel=1e-5)


def test_gradients_are_those_of_one_loss_over_all_layers(backbone, tmp_path):
    """Backward inside each layer = backward of the summed loss after the pass."""
    sample = make_samples(1)[0]
    run = run_of(backbone, [sample], tmp_path)
    loss = run.learn(sample)
    got = [p.grad.clone() for p in run.weights]
    inputs = {}
    run.label_pass(sample, lambda i, *tensors: inputs.update({i: tensors}))
    run.optimizer.zero_grad()
    total = sum(layer_loss(run.heads.score(i, *x), y, len(inputs), 0.0025) for i, (x, y) in inputs.items())
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    for a, p in zip(got, run.weights):
        torch.testing.assert_close(a, p.grad)


def test_a_prompt_of_one_token_has_a_finite_loss(backbone, tmp_path):
    result = train(backbone, [Sample([9], [10])], tmp_path, TrainConfig(steps=2, hidden_size=16, eval_samples=0))
    assert math.isfinite(result.loss)


def test_top_overlap_counts_common_positions():
    labels = torch.arange(40.0).expand(2, 40)
    scores = labels.clone()
    scores[1, :4], scores[1, 38:] = 100, 0  # of the label's top 4 (36..39) only none is left in the top 4
    assert top_overlap(scores, labels).tolist() == [1.0, 0.0]
    scores[1, :2] = 0
    assert top_overlap(scores, labels).tolist() == [1.0, 0.5]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_loss_falls_and_heads_find_the_important_tokens(family, tmp_path):
    """Overfit four samples: the labels are functions of the inputs, so the heads can learn them."""
    backbone = make_backbone(family)
    config = TrainConfig(steps=150, lr=1e-2, hidden_size=64, eval_samples=0, log_every=10)
    data = make_samples(4, length=40)
    result = train(backbone, data, tmp_path, config)
    losses = [json.loads(line)["loss"] for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert result.loss < 0.5 * losses[0]
    overlaps = []
    run = Run(backbone, Samples(data, None), tmp_path, config)
    for sample in data:
        run.label_pass(sample, lambda i, x, y: overlaps.append(top_overlap(result.heads.score(i, *x), y).mean()))
    assert torch.stack(overlaps).mean() > 0.5  # chance: 0.1


# ---------------------------------------------------------------------- output


def test_training_writes_heads_a_log_and_a_small_mark(backbone, tmp_path):
    progress = []
    result = train(backbone, make_samples(), tmp_path, TrainConfig(**SMALL), on_progress=progress.append)
    names = ["best", CHECKPOINT_FILE, "config.json", "data.json", "heads.safetensors", LOG_FILE]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert (tmp_path / CHECKPOINT_FILE).stat().st_size < 8000  # finished: no weights, no optimizer
    loaded = RetainingHeads.from_pretrained(tmp_path)
    loaded.check(backbone)
    assert same(loaded, result.heads)
    assert [p.step for p in progress] == list(range(1, 13))
    assert progress[-1].loss == result.loss
    assert progress[-1].overlap == result.overlap == pytest.approx(torch.tensor(result.overlap_per_head).mean().item())
    records = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [3, 6, 9, 12]
    assert [r["step"] for r in records if "overlap" in r] == [6, 12]
    assert loaded.config.training["config"]["steps"] == 12
    assert "trained 12 steps" in result.summary()


def test_the_backbone_is_left_as_it_was(backbone, tmp_path):
    before = [p.clone() for p in backbone.model.parameters()]
    backbone.model.train()
    train(backbone, make_samples(), tmp_path, TrainConfig(**SMALL))
    assert backbone.model.training
    backbone.model.eval()
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, backbone.model.parameters()))


def test_layers_with_a_window_are_not_trained(tmp_path):
    """They keep their window and take no budget; their heads are zero, not random."""
    backbone = make_backbone("gemma3")
    windows = [spec.window for spec in backbone.layers]
    assert None in windows and any(windows)  # noqa: PT018
    heads = train(backbone, make_samples(), tmp_path, TrainConfig(**SMALL)).heads
    assert [bool(heads.layers[i].fc1.weight.any()) for i in range(len(windows))] == [w is None for w in windows]


def test_a_bf16_backbone_trains_fp32_heads(tmp_path):
    result = train(make_backbone("llama", torch.bfloat16), make_samples(), tmp_path, TrainConfig(**SMALL))
    assert {p.dtype for p in result.heads.parameters()} == {torch.float32}
    assert math.isfinite(result.loss)


def test_accumulation_averages_samples(backbone, tmp_path):
    """One step over two samples = the mean of their gradients."""
    data = make_samples(2)
    run = run_of(backbone, data, tmp_path, accumulate=2)
    for sample in data:
        run.learn(sample)
    both = [p.grad.clone() for p in run.weights]
    single = run_of(backbone, data, tmp_path)
    for sample in data:
        single.learn(sample)
    for a, p in zip(both, single.weights):
        torch.testing.assert_close(a, p.grad / 2)


def test_samples_come_from_files_through_the_chat_template(backbone, tmp_path):
    lines = [json.dumps({"prompt": f"say {word}", "answer": word}) for word in ("one", "two", "three", "four")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    result = train(backbone, str(tmp_path / "a.jsonl"), tmp_path / "out", TrainConfig(steps=5, hidden_size=16))
    assert result.finished
    assert result.heads.config.training["data"] == ["a.jsonl"]


# ---------------------------------------------------------------------- data that does not fit


def test_long_samples_are_skipped_and_counted(backbone, tmp_path):
    data = [*make_samples(6, length=20), *make_samples(3, length=200, seed=1)]
    result = train(backbone, data, tmp_path, TrainConfig(steps=18, hidden_size=16, eval_samples=0, max_length=50))
    assert result.skipped == 3  # once each, though three epochs went by
    assert "3 of 9 samples dropped (3 over max_length)" in result.summary()


def test_only_long_samples_is_an_error(backbone, tmp_path):
    with pytest.raises(DataError, match=r"none of 3 samples can be used: 3 over max_length, first s0"):
        train(backbone, make_samples(3), tmp_path, TrainConfig(steps=2, max_length=5))


def test_ids_outside_the_vocabulary_are_named(backbone, tmp_path):
    with pytest.raises(DataError, match="bad: token id 264, but the backbone knows 0 to 263"):
        train(backbone, [Sample([1, 264], [3], "bad")], tmp_path, TrainConfig(steps=2))


def test_a_loss_that_is_not_finite_names_the_sample(backbone, tmp_path, monkeypatch):
    """And the checkpoint from before it is not overwritten with NaN weights."""

    def poisoned(*args, **options):
        labels = attention_labels(*args, **options)
        return labels * float("nan") if labels.shape[-1] == 77 else labels

    monkeypatch.setattr(passes, "attention_labels", poisoned)
    data = [*make_samples(20), Sample([9] * 77, [10], "poison.jsonl:5")]
    with pytest.raises(NumericsError, match=r"poison\.jsonl:5: the loss is nan"):
        train(backbone, data, tmp_path, TrainConfig(**{**SMALL, "steps": 60, "log_every": 50}))
    saved = torch.load(tmp_path / CHECKPOINT_FILE, weights_only=True)
    assert all(torch.isfinite(w).all() for w in saved["heads"].values())
    assert not (tmp_path / "heads.safetensors").exists()


# ---------------------------------------------------------------------- stopping and going on


class Stop(Exception):
    pass


def stop_at(step: int):
    def report(progress):
        if progress.step == step:
            raise Stop

    return report


def test_a_resumed_run_equals_an_uninterrupted_one(backbone, tmp_path):
    data, config = make_samples(7), TrainConfig(**{**SMALL, "steps": 20, "accumulate": 2, "eval_samples": 1})
    whole = train(backbone, data, tmp_path / "whole", config)
    for step in (6, 7, 17):  # checkpoints are at 4, 8, 12, 16
        with pytest.raises(Stop):
            train(backbone, data, tmp_path / "parts", config, on_progress=stop_at(step))
    parts = train(backbone, data, tmp_path / "parts", config)
    assert same(whole.heads, parts.heads)
    assert (whole.loss, whole.overlap, whole.skipped) == (parts.loss, parts.overlap, parts.skipped)
    keys = ("step", "loss", "lr", "overlap_per_head")
    logs = [
        [[json.loads(line).get(key) for key in keys] for line in (tmp_path / name / LOG_FILE).read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from test_train import *
from locret.train import progress_bar
torch.set_num_threads(1)
with progress_bar() as report:
    def slow(progress):
        report(progress)
        time.sleep({pause})
    result = train(make_backbone(), make_samples(9), {output!r}, TrainConfig(**CHILD_CONFIG), on_progress=slow)
print(result.summary())
"""
CHILD_CONFIG = {**SMALL, "steps": 60, "eval_samples": 2, "checkpoint_every": 5}


def start_child(output: Path, pause: float) -> subprocess.Popen[str]:
    code = CHILD.format(tests=str(Path(__file__).parent), output=str(output), pause=pause)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_killed_for_real_goes_on_bit_for_bit(number, tmp_path):
    """kill -9 loses the steps since the last checkpoint; SIGTERM and Ctrl-C save one and say so. The weights file is
    byte for byte that of a run that nobody disturbed."""
    child = start_child(tmp_path / "out", 0.05)
    deadline = time.time() + 120
    log = tmp_path / "out" / LOG_FILE
    while not (log.exists() and len(log.read_text().splitlines()) > 5):  # in the middle, past a checkpoint
        assert child.poll() is None, child.stdout.read()
        assert time.time() < deadline
        time.sleep(0.02)
    os.kill(child.pid, number)
    text = child.communicate(timeout=60)[0]
    state = torch.load(tmp_path / "out" / CHECKPOINT_FILE, weights_only=True)["state"]
    assert 5 <= state["step"] < 60
    if number == signal.SIGKILL:
        assert child.returncode == -signal.SIGKILL
        assert state["step"] % 5 == 0
    else:
        assert child.returncode == 0
        assert f"stopped by {number.name} at step {state['step']} of 60; checkpoint saved in" in " ".join(text.split())
    assert not (tmp_path / "out" / "heads.safetensors").exists()
    for name in ("out", "undisturbed"):
        assert train(make_backbone(), make_samples(9), tmp_path / name, TrainConfig(**CHILD_CONFIG)).finished
    assert [p.name for p in (tmp_path / "out").iterdir() if p.suffix == ".tmp"] == []
    ours, theirs = (
        (folder / "heads.safetensors").read_bytes() for folder in (tmp_path / "out", tmp_path / "undisturbed")
    )
    assert ours == theirs


def test_a_finished_run_is_not_run_again(backbone, tmp_path):
    first = train(backbone, make_samples(), tmp_path, TrainConfig(**SMALL))
    before = (tmp_path / "heads.safetensors").read_bytes()
    second = train(backbone, make_samples(), tmp_path, TrainConfig(**SMALL), on_progress=stop_at(1))
    assert second.finished
    assert same(first.heads, second.heads)
    assert (second.loss, second.overlap, second.step) == (first.loss, first.overlap, 12)
    assert (tmp_path / "heads.safetensors").read_bytes() == before


def test_half_written_files_of_a_killed_run_are_removed(backbone, tmp_path):
    (tmp_path / f".{CHECKPOINT_FILE}.x1y2.tmp").write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"")
    train(backbone, make_samples(), tmp_path, TrainConfig(**SMALL))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [".mine.tmp"]


def test_resume_off_starts_anew(backbone, tmp_path):
    with pytest.raises(Stop):
        train(backbone, make_samples(), tmp_path, TrainConfig(**SMALL), on_progress=stop_at(9))
    seen = []
    train(backbone, make_samples(), tmp_path, TrainConfig(**SMALL), on_progress=seen.append, resume=False)
    assert seen[0].step == 1
    assert json.loads((tmp_path / LOG_FILE).read_text().splitlines()[0])["step"] == 3


def test_a_checkpoint_of_another_run_is_refused(backbone, tmp_path):
    with pytest.raises(Stop):
        train(backbone, make_samples(), tmp_path, TrainConfig(**SMALL), on_progress=stop_at(5))
    with pytest.raises(ConfigError, match=r"is of another run: option lr: 0\.0005 there, 0\.001 now"):
        train(backbone, make_samples(), tmp_path, TrainConfig(**SMALL, lr=1e-3))
    with pytest.raises(ConfigError, match="is of another run: data: "):
        train(backbone, make_samples(seed=3), tmp_path, TrainConfig(**SMALL))
    with pytest.raises(ConfigError, match="backbone architecture: 'LlamaForCausalLM' there, 'Qwen3ForCausalLM' now"):
        train(make_backbone("qwen3"), make_samples(), tmp_path, TrainConfig(**SMALL))
    train(backbone, make_samples(), tmp_path, TrainConfig(**{**SMALL, "log_every": 1}))  # this one may change


def test_a_broken_checkpoint_says_what_to_do(backbone, tmp_path):
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"not a checkpoint")
    with pytest.raises(HeadsError, match=r"checkpoint\.pt is broken \(\w+\); delete it"):
        train(backbone, make_samples(), tmp_path, TrainConfig(**SMALL))


def test_a_full_disk_leaves_the_last_checkpoint(backbone, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full(content, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, path)

    monkeypatch.setattr(torch, "save", full)
    config = TrainConfig(**SMALL)
    with pytest.raises(HeadsError, match=r"cannot be written: .*No space left.*untouched"):
        train(backbone, make_samples(), tmp_path / "out", config)
    assert torch.load(tmp_path / "out" / CHECKPOINT_FILE, weights_only=True)["state"]["step"] == 4
    monkeypatch.undo()
    resumed = train(backbone, make_samples(), tmp_path / "out", config)
    assert same(resumed.heads, train(backbone, make_samples(), tmp_path / "whole", config).heads)


# ---------------------------------------------------------------------- options


def test_the_schedule_rises_and_falls():
    config = TrainConfig(steps=100, lr=1.0)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10:] == pytest.approx([n / 90 for n in range(90, 0, -1)])
    assert TrainConfig(steps=5, warmup_steps=5).lr_at(4) == 5e-4
    assert TrainConfig(steps=5, warmup_steps=0).lr_at(0) == 5e-4


def test_other_schedules():
    published = TrainConfig(schedule="published")  # 3000 steps: warm-up 2000, then linearly to 0
    assert [published.lr_at(s) for s in (0, 999, 1999, 2500)] == pytest.approx([2.5e-7, 2.5e-4, 5e-4, 2.5e-4])
    cosine = TrainConfig(steps=100, lr=1.0, schedule="cosine", warmup_steps=0)
    assert [cosine.lr_at(s) for s in (0, 50)] == pytest.approx([1.0, 0.5])
    assert 0 < cosine.lr_at(99) < 0.001
    assert TrainConfig(steps=100, lr=1.0, schedule="constant").lr_at(99) == 1.0


def test_logs_also_go_to_tensorboard_where_it_is_installed(backbone, tmp_path, monkeypatch):
    class Writer:
        scalars: list = []  # noqa: RUF012

        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            self.scalars.append((name, step))

        def close(self):
            self.scalars.append(("closed", self.folder))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    train(backbone, make_samples(), tmp_path, TrainConfig(**SMALL, log_to=["tensorboard"]))
    assert {("loss", 3), ("lr", 12), ("overlap", 6), ("overlap_at_0.05", 12)} <= set(Writer.scalars)
    assert Writer.scalars[-1] == ("closed", str(tmp_path / "tensorboard"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="log_to names 'wandb', which is not installed: pip install wandb"):
        train(backbone, make_samples(), tmp_path, TrainConfig(**SMALL, log_to=["wandb"]), resume=False)


def test_logs_also_go_to_wandb_where_it_is_installed(backbone, tmp_path, monkeypatch):
    """A stand-in for the package: what it is told, and that it is told the end."""
    told = []
    run = SimpleNamespace(log=lambda numbers, step: told.append((step, numbers)), finish=lambda: told.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: told.append(options) or run))
    result = train(backbone, make_samples(), tmp_path / "heads", TrainConfig(**SMALL, log_to=("wandb",)))
    assert told[0] == {"project": "locret", "name": "heads", "dir": str(tmp_path / "heads")}
    assert told[-1] == "end"
    losses = [numbers["loss"] for step, numbers in told[1:-1] if "loss" in numbers]
    assert len(losses) == 4
    assert losses[-1] == pytest.approx(result.loss)


def test_a_checkpoint_of_the_first_version_goes_on(backbone, tmp_path):
    """It knows none of today's further options and fields: those had their defaults."""
    whole = train(backbone, make_samples(), tmp_path / "whole", TrainConfig(**SMALL))
    with pytest.raises(Stop):
        train(backbone, make_samples(), tmp_path / "parts", TrainConfig(**SMALL), on_progress=stop_at(5))
    path = tmp_path / "parts" / CHECKPOINT_FILE
    content = torch.load(path, weights_only=True)
    first = [
        "accumulate",
        "betas",
        "clip_value",
        "eval_samples",
        "hidden_size",
        "init",
        "lr",
        "max_length",
        "seed",
        "smoothness",
        "steps",
        "truncate",
    ]
    first += ["warmup_steps", "weight_decay"]
    named = {name for name in content["identity"] if not name.startswith("option ")}
    content["identity"] = {k: v for k, v in content["identity"].items() if k in named or k[7:] in first}
    del content["state"]["best"], content["names"]
    content["losses"] = content["losses"].float()
    torch.save(content, path)
    assert same(train(backbone, make_samples(), tmp_path / "parts", TrainConfig(**SMALL)).heads, whole.heads)
    torch.save(content, path)
    with pytest.raises(ConfigError, match="option objective: 'paper' there, 'ranking' now"):
        train(backbone, make_samples(), tmp_path / "parts", TrainConfig(**SMALL, objective="ranking"))


def largest_change(backbone, folder, **options) -> float:
    """Of a weight in the first step of Adam, which moves every weight by about the learning rate."""
    sample = make_samples(1)[0]
    config = TrainConfig(hidden_size=16, weight_decay=0.0, **options)
    run = Run(backbone, Samples([sample], None), folder, config)
    before = weights_of(run.heads)
    run.step(iter([sample]))
    return max((a - b).abs().max().item() for a, b in zip(before, run.heads.parameters()))


def test_a_step_takes_the_scheduled_rate_and_clips_gradients(backbone, tmp_path):
    assert largest_change(backbone, tmp_path, lr=1e-3, steps=10, warmup_steps=10) == pytest.approx(1e-4, rel=0.01)
    assert largest_change(backbone, tmp_path, lr=1e-3, steps=10, warmup_steps=0) == pytest.approx(1e-3, rel=0.01)
    # a gradient far below Adam's epsilon (1e-8) hardly moves anything
    assert largest_change(backbone, tmp_path, lr=1e-3, steps=10, warmup_steps=0, clip_value=1e-11) < 2e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 5}, "unknown option 'step'; valid: .*did you mean 'steps'"),
        ({"steps": 0}, "steps is 0; it must be a whole number of at least 1"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"lr": "fast"}, "lr is 'fast'; it must be above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"betas": [0.9, 1.0]}, r"betas is \[0.9, 1.0\]; it must be two numbers in"),
        ({"warmup_steps": 11, "steps": 10}, "warmup_steps is 11; it must be 0 to 10"),
        ({"truncate": 1}, "truncate is 1; it must be true or false"),
        ({"accumulate": True}, "accumulate is True"),
        ({"objective": "papper"}, "unknown objective 'papper'; .*did you mean 'paper'"),
        ({"input": "q"}, "unknown input 'q'; valid: hidden, qkv"),
        ({"log_to": ["tensorbord"]}, "did you mean 'tensorboard'"),
        ({"eval_budgets": [0.1, 2]}, r"eval_budgets is \[0.1, 2\]; it must be shares"),
        ({"evict_budget": 0}, "evict_budget is 0; it must be units"),
        ({"evict_stabilizers": -1}, "evict_stabilizers is -1"),
        ({"top_share": 1}, "top_share is 1"),
        ({"seed": 2**64}, r"seed is 18446744073709551616; it must be a whole number from 0 to 2\^64 - 1"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(options)


def test_options_come_from_toml(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "m"\n[train]\nsteps = 7\nbetas = [0.8, 0.9]\ntruncate = true\n')
    assert TrainConfig.from_toml(recipe, steps=8, lr=None) == TrainConfig(steps=8, betas=(0.8, 0.9), truncate=True)
    recipe.write_text("steps = 7\nlearning_rate = 1\n")
    with pytest.raises(ConfigError, match="unknown option 'learning_rate'"):
        TrainConfig.from_toml(recipe)
    recipe.write_text("steps =")
    with pytest.raises(ConfigError, match=r"r\.toml cannot be read as TOML"):
        TrainConfig.from_toml(recipe)


def test_holding_everything_out_is_an_error(backbone, tmp_path):
    with pytest.raises(ConfigError, match="eval_samples 3 of 3 samples leave none to train on"):
        train(backbone, make_samples(3), tmp_path, TrainConfig(eval_samples=3))


def test_held_out_samples_are_never_trained_on(backbone, tmp_path, monkeypatch):
    learned = set()
    learn = Run.learn
    monkeypatch.setattr(Run, "learn", lambda self, s: learned.add(s.name) or learn(self, s))
    train(backbone, make_samples(10), tmp_path, TrainConfig(**{**SMALL, "steps": 30, "eval_samples": 3}))
    assert len(learned) == 7


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_a_cuda_run_learns_what_a_cpu_run_learns(tmp_path):
    """fp32 on both: other kernels, the same arithmetic. Then bf16, stopped and resumed."""
    results = []
    for device in ("cpu", "cuda"):
        backbone = Backbone(build_tiny_model("qwen3", **TINY).to(device), build_byte_tokenizer())
        results.append(train(backbone, make_samples(), tmp_path / device, TrainConfig(**SMALL)))
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-4)
    for a, b in zip(*(r.heads.parameters() for r in results)):
        torch.testing.assert_close(
            a, b.cpu(), atol=2e-3, rtol=0
        )  # Adam's first steps are sign-like: noise of lr's size
    backbone = Backbone(build_tiny_model("qwen3", torch.bfloat16, **TINY).cuda(), build_byte_tokenizer())
    with pytest.raises(Stop):
        train(backbone, make_samples(), tmp_path / "bf16", TrainConfig(**SMALL), on_progress=stop_at(6))
    assert math.isfinite(train(backbone, make_samples(), tmp_path / "bf16", TrainConfig(**SMALL)).loss)


@pytest.mark.gpu
def test_a_small_model_trains_ten_steps_a_second_at_4096_tokens(tmp_path):
    """8 layers of width 384, bf16, on a Hopper GPU; the first steps warm up."""
    shape = dict(hidden_size=384, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2, head_dim=64)
    model = build_tiny_model("qwen3", torch.bfloat16, **shape, intermediate_size=1024, max_position_embeddings=16384)
    backbone = Backbone(model.cuda(), build_byte_tokenizer())
    rng = random.Random(0)
    ids = lambda n: [rng.randrange(8, 264) for _ in range(n)]
    data = [Sample(ids(4096 - rng.randrange(100)), ids(30)) for _ in range(40)]
    times = []
    config = TrainConfig(steps=120, eval_samples=4, eval_every=60, checkpoint_every=60)
    torch.cuda.reset_peak_memory_stats()
    train(backbone, data, tmp_path, config, on_progress=lambda p: times.append(time.perf_counter()))
    rate = 80 / (times[-1] - times[39])
    peak = torch.cuda.max_memory_allocated() / 2**20
    print(f"{rate:.1f} steps/s, peak {peak:.0f} MiB")
    assert rate > 10


def test_training_can_go_on_from_other_heads(backbone, tmp_path):
    """`init` starts from saved weights; the saved config names the folder without a path of this machine."""
    first = train(backbone, make_samples(), tmp_path / "first", TrainConfig(steps=3, eval_samples=0))
    options = dict(steps=1, eval_samples=0, lr=1e-9, weight_decay=0.0)
    second = train(backbone, make_samples(), tmp_path / "second", TrainConfig(init=str(first.output), **options))
    for old, new in zip(weights_of(first.heads), weights_of(second.heads), strict=True):
        torch.testing.assert_close(old, new, atol=1e-6, rtol=0)
    assert second.heads.config.training["config"]["init"] == "first"


def test_heads_of_another_backbone_are_no_start(backbone, tmp_path):
    other = make_backbone("qwen3")
    result = train(other, make_samples(), tmp_path / "other", TrainConfig(steps=1, eval_samples=0))
    with pytest.raises(HeadsError, match="another backbone"):
        train(backbone, make_samples(), tmp_path / "mine", TrainConfig(steps=1, init=str(result.output)))
