"""The embedded model's recipe on CPU: the training model is Llama, a resumed run is the run, Muon is orthogonal."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes" / "embedded"))

import lean  # noqa: E402
import pretrain  # noqa: E402
from export import export, pack, unpack  # noqa: E402
from lean import LeanLlama, ModelConfig  # noqa: E402
from muon import Muon, orthogonalise  # noqa: E402
from recipe import load_recipe, recipe_from  # noqa: E402
from source import Sample  # noqa: E402
from validate import exact_matches, text_loss  # noqa: E402

from locret.errors import ConfigError, DataError, NumericsError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

TINY = dict(vocab_size=64, num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48)


class CopySource:
    """Random tokens, then the same tokens again: the second half is the answer."""

    num_tokens = 0

    def make_example(self, rng: random.Random, stage: int, length: int):
        half = np.array([rng.randrange(6, 64) for _ in range(length // 2)], dtype=np.uint16)
        return np.concatenate([half, half]), np.repeat(np.array([0.1, 4.0], dtype=np.float32), length // 2)

    def sample(self, task: str, length: int, index: int, wording: str, shape: str) -> Sample:
        ids, _ = self.make_example(random.Random(f"{task}{index}{wording}{shape}"), 0, length)
        return Sample(ids, [(length // 2, length)])

    def heldout_text(self, num_tokens: int) -> np.ndarray:
        return self.make_example(random.Random(0), 0, num_tokens)[0]


def tiny_recipe(**run):
    return recipe_from(
        {
            "model": TINY,
            "stages": [
                {"length": 16, "steps": 4, "tokens_per_step": 128},
                {"length": 32, "steps": 3, "tokens_per_step": 64},
            ],
            "optimiser": {"warmup_steps": 2},
            "validation": {
                "num_samples": 2, "text_tokens": 128, "tasks": ["number", "kv"], "final_samples": 2,
                "final_lengths": [32, 64],
            },
            "run": {"micro_tokens": 64, "workers": 2, "slots": 4, "compile": "off", "log_seconds": 0.0, **run},
        }
    )  # fmt: skip


def run(recipe, folder, **options):
    return pretrain.train(recipe, CopySource(), folder, device=torch.device("cpu"), **options)


def tiny_model(seed: int = 3) -> LeanLlama:
    model = LeanLlama(ModelConfig(**TINY), dtype=torch.float32, attention="math")
    model.initialise(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # norms that are not 1, matrices that are not small
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter.mul_(3.0 if parameter.ndim == 2 else 1.0).add_(noise, alpha=0.05)
    return model


# The model


def test_exported_model_gives_the_training_models_logits(tmp_path):
    """transformers loads the folder and computes what training computed, for several batches and lengths."""
    from transformers import LlamaForCausalLM

    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # what the file can hold
    export(model, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert theirs.config.tie_word_embeddings
    assert (theirs.config.eos_token_id, theirs.generation_config.pad_token_id) == (4, 5)
    for batch, length in ((1, 1), (2, 17), (3, 64)):
        ids = torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(length))
        ours = model.logits(model.hidden(ids)).view(batch, length, -1)
        with torch.no_grad():
            assert torch.allclose(ours, theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_regions_compute_what_the_plain_forward_computes():
    model, ids = tiny_model(), torch.randint(0, 64, (2, 16))
    targets = ids.roll(-1, dims=1)
    losses = model.token_losses(ids, targets, model.rope_tables(2, 16))
    expected = torch.nn.functional.cross_entropy(model.logits(model.hidden(ids)), targets.flatten(), reduction="none")
    assert torch.allclose(losses, expected, atol=1e-5)


def test_microbatches_give_the_gradients_of_the_naive_weighted_loss():
    """Normalised by the step's sum of weights, not by each microbatch's."""
    recipe = tiny_recipe()
    trainer = pretrain.Trainer(recipe, torch.device("cpu"))
    ids, weights = torch.randint(0, 64, (8, 16)), torch.rand(8, 16)  # two microbatches of 64 tokens
    trainer.accumulate(ids, weights)
    ours = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    losses = trainer.model.token_losses(ids, ids.roll(-1, 1), trainer.model.rope_tables(8, 16)).view(8, 16)
    weights = weights[:, 1:]
    ((losses[:, :-1] * weights).sum() / weights.sum()).backward()
    for mine, parameter in zip(ours, trainer.model.parameters()):
        assert torch.allclose(mine, parameter.grad, atol=1e-6)


@pytest.mark.parametrize(("scales", "want"), [
    ({"answer_scale": 3.0}, [0.1, 1.0, 12.0, 0.5]), ({"text_scale": 0.2}, [0.1, 0.2, 4.0, 0.5]),
])  # fmt: skip
def test_scales_count_answers_or_natural_text_only(scales, want):
    trainer = pretrain.Trainer(tiny_recipe(), torch.device("cpu"))
    ids, weights = torch.randint(0, 64, (4, 16)), torch.tensor([0.1, 1.0, 4.0, 0.5]).repeat(4, 4)
    sums = trainer.accumulate(ids, weights.clone(), **scales)
    assert sums[[2, 4]].tolist() == [16, 16]  # tokens of text and of answers, whatever they weigh
    ours = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    trainer.accumulate(ids, torch.tensor(want).repeat(4, 4))
    for mine, parameter in zip(ours, trainer.model.parameters()):
        assert torch.allclose(mine, parameter.grad, atol=1e-7)


def test_real_recipe_is_the_model_that_ships():
    recipe = load_recipe(ROOT / "recipes/embedded/recipe.toml", ["stages.0.seconds=15", "run.compile='off'"])
    assert recipe.stages[0].seconds == 15
    with torch.device("meta"):
        model = LeanLlama(recipe.model)
    assert sum(p.numel() for p in model.parameters()) * 2 < 33e6


# The optimiser


@pytest.mark.parametrize("shape", [(5, 16, 16), (3, 8, 24)])
def test_newton_schulz_sends_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_muon_treats_stacked_and_tall_matrices_as_single_ones():
    """A parameter's update does not depend on what it is stacked with, nor on being stored transposed."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((8, 24), (24, 8), (8, 24), (8, 8))]
    gradients = [torch.randn(v.shape, generator=generator) for v in values]
    together = [v.clone() for v in values]
    for parameter, gradient in zip(together, gradients):
        parameter.grad = gradient
    Muon(together, momentum=0.95, weight_decay=0.01, dtype=torch.float32).step(0.1)
    for parameter, value, gradient in zip(together, values, gradients):
        turned = value.shape[0] > value.shape[1]
        alone = (value.mT if turned else value).clone()
        alone.grad = gradient.mT if turned else gradient
        Muon([alone], momentum=0.95, weight_decay=0.01, dtype=torch.float32).step(0.1)
        assert torch.allclose(parameter, alone.mT if turned else alone, atol=1e-5)
        assert 0.1 < ((parameter - value) / (0.2 * 0.1)).square().mean().sqrt() < 2  # root mean square as AdamW's


def test_learning_rate_is_constant_then_falls_to_zero():
    optimiser = load_recipe(ROOT / "recipes/embedded/recipe.toml").optimiser
    assert [round(optimiser.scale(f, 10**6), 3) for f in (0.0, 0.4, 0.7, 1.0, 1.5)] == [1, 1, 0.5, 0, 0]
    assert optimiser.scale(0.0, 0) < 0.1


# The run


def test_resumed_run_is_the_uninterrupted_run(tmp_path):
    """Stopped in the middle of a stage and gone on with: the same weights, bit for bit."""
    whole = run(tiny_recipe(), tmp_path / "whole")
    stop = pretrain.Stop()
    add = pretrain.Meter.add

    def stop_at_third_step(self, *args):
        add(self, *args)
        self.count = getattr(self, "count", 0) + 1
        if self.count == 3:
            stop.reason = "test"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.Meter, "add", stop_at_third_step)
        patch.setattr(pretrain.Meter, "reset", lambda self, reset=pretrain.Meter.reset: reset(self))
        part = run(tiny_recipe(), tmp_path / "part", stop=stop)
    assert part.position["step"] == 3
    resumed = run(tiny_recipe(), tmp_path / "part", resume=True)
    assert resumed.position["step"] == whole.position["step"] == 7
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs), name


def test_two_processes_train_the_weights_of_one(tmp_path):
    """Each has half of every batch; the sums of their gradients are the whole batch's."""
    script = tmp_path / "process.py"
    script.write_text(
        f"""import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]
import os, torch, test_embedded as t
recipe = t.tiny_recipe(micro_tokens=32)
trainer = t.run(recipe, t.Path({str(tmp_path)!r}) / "both")
torch.save(trainer.model.state_dict(), {str(tmp_path)!r} + "/rank" + os.environ["RANK"])
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    alone = run(tiny_recipe(micro_tokens=32), tmp_path / "alone").model.state_dict()
    first, second = (torch.load(tmp_path / f"rank{rank}") for rank in (0, 1))
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-5)
    lines = (tmp_path / "both" / "metrics.jsonl").read_text().splitlines()
    trained = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    assert trained[-1]["tokens"] == 4 * 128 + 3 * 64, "tokens of both, logged by one"


def test_a_process_that_fails_ends_the_others_and_says_why(tmp_path):
    """A data worker's error in one of two processes once stopped both for ever: each waited for the other."""
    script = tmp_path / "process.py"
    script.write_text(
        f"""import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]
import os, test_embedded as t
class Failing(t.CopySource):
    def make_example(self, rng, stage, length):
        if stage == 1 and os.environ["RANK"] == "1":
            raise ValueError("no such filler")
        return super().make_example(rng, stage, length)
t.pretrain.train(t.tiny_recipe(micro_tokens=32), Failing(), t.Path({str(tmp_path)!r}), device=t.torch.device("cpu"))
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    assert "no such filler" in done.stderr
    assert time.monotonic() - began < 60


def test_more_processes_than_a_batch_can_be_shared_by_is_an_error():
    with pytest.raises(ConfigError, match="3 processes cannot share 128 tokens"):
        tiny_recipe().check_team(3)


def test_run_learns_reports_and_evaluates(tmp_path):
    recipe = tiny_recipe()
    run(recipe, tmp_path, evaluate=True)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kinds = {record["kind"] for record in records}
    assert kinds == {"start", "train", "validation", "evaluation"}
    train = [record for record in records if record["kind"] == "train"]
    assert train[-1]["tokens"] == 4 * 128 + 3 * 64
    assert all(record["loss"] > 0 and 0 <= record["wait"] <= 1 for record in train)
    table = records[-1]["scores"]
    assert set(table) == {
        "32/train/two_turns", "64/train/two_turns", "32/heldout/two_turns", "32/train/one_turn", "32/train/conversation"
    }  # fmt: skip
    assert set(table["32/train/two_turns"]) == {"number", "kv"}


def test_nan_loss_stops_and_keeps_the_last_checkpoint(tmp_path):
    run(tiny_recipe(), tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    class Broken(CopySource):
        def make_example(self, rng, stage, length):
            ids, weights = super().make_example(rng, stage, length)
            return ids, weights * np.float32("nan")

    with pytest.raises(NumericsError, match="last good checkpoint"):
        pretrain.train(tiny_recipe(), Broken(), tmp_path, device=torch.device("cpu"))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_failing_worker_is_an_error_with_its_traceback(tmp_path):
    class Failing(CopySource):
        def make_example(self, rng, stage, length):
            raise ValueError("no such filler")

    with pytest.raises(RuntimeError, match="no such filler"):
        pretrain.train(tiny_recipe(), Failing(), tmp_path, device=torch.device("cpu"))


def test_resume_without_checkpoint_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="without --resume"):
        run(tiny_recipe(), tmp_path, resume=True)


def test_unknown_key_of_the_recipe_is_an_error():
    with pytest.raises(ConfigError, match="muon_lr"):
        recipe_from({"stages": [{"length": 16, "steps": 1, "tokens_per_step": 65536}], "optimiser": {"muon_rl": 1}})


# Validation and export


def test_exact_match_is_greedy_decoding():
    """Teacher-forced argmax over all answer tokens says what token-by-token decoding would."""
    model = tiny_model()
    rng = np.random.default_rng(0)
    samples, expected = [], []
    for length in (9, 17, 12, 30):
        prompt = rng.integers(6, 64, length)
        decoded = prompt.tolist()
        for _ in range(3):
            decoded.append(int(model.logits(model.hidden(torch.tensor([decoded])))[-1].argmax()))
        wrong = [*decoded[:-1], (decoded[-1] + 1) % 64]
        for ids, right in ((decoded, True), (wrong, False)):
            samples.append(Sample(np.array(ids, dtype=np.uint16), [(length, length + 3)]))
            expected.append(right)
    assert exact_matches(model, samples, torch.device("cpu"), max_tokens=3072) == expected


def test_packed_parts_join_to_the_same_files_and_a_broken_part_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("export.PART_BYTES", 5000)
    export(tiny_model(), tmp_path / "model")
    pack(tmp_path / "model", tmp_path / "packed")
    assert len(list((tmp_path / "packed").iterdir())) > 3
    unpack(tmp_path / "packed", tmp_path / "again")
    for path in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    part = tmp_path / "packed" / "model.tar.01"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match="sha256"):
        unpack(tmp_path / "packed", tmp_path / "broken")


def test_compiling_replaces_the_three_regions():
    model = tiny_model()
    assert model.enter is lean.enter
    model.compile()
    assert model.enter is not lean.enter


# The tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "src/locret/models/embedded")


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_tokenizer_has_the_models_vocabulary(tokenizer):
    assert len(tokenizer) == 8192
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|end|>", "<|pad|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 4, 5)


def test_digits_and_newlines_are_tokens_of_their_own_and_text_joins_at_newlines(tokenizer):
    first, second = "The code of Amber is 40719.\n", "\n  It's 7th – ünïcödé 🙂\n"
    assert encode(tokenizer, first + second) == encode(tokenizer, first) + encode(tokenizer, second)
    for text in (first, second):
        pieces = [tokenizer.decode([i]) for i in encode(tokenizer, text)]
        assert all(len(piece) == 1 for piece in pieces if any(c in "0123456789\n" for c in piece))
        assert tokenizer.decode(encode(tokenizer, text)) == text
    assert encode(tokenizer, "x = 12")[:-2] == encode(tokenizer, "x = ")


def test_uuid_is_36_tokens_wherever_it_stands(tokenizer):
    rng = random.Random(0)
    values = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(300)]
    values += ["edeeefbd-673c-41e6-bb95-40e06cd88823", "0e8d1f3a-dead-4bee-8bad-aabbccddeef0"]
    for value in values:
        ids = encode(tokenizer, value)
        assert len(ids) == 36
        assert encode(tokenizer, f" {value}.")[1:37] == ids
        assert encode(tokenizer, f'"{value}": "')[1:37] == ids
    assert len(encode(tokenizer, " face")) == 1  # words are left alone


def test_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One\nline 12"},
        {"role": "assistant", "content": "  42 "},
        {"role": "user", "content": "And?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>Be brief.<|end|><|user|>One\nline 12<|end|><|assistant|> 42<|end|><|user|>And?<|end|>"
        "<|assistant|>"
    )
    ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ids == encode(tokenizer, text)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_fit_paces_what_is_left_of_the_schedule():
    stages = [{"length": 16, "seconds": s, "tokens_per_step": 128} for s in (30.0, 50.0)]
    trainer = pretrain.Trainer(
        recipe_from({"model": TINY, "stages": stages, "run": {"micro_tokens": 64, "compile": "off"}}),
        torch.device("cpu"),
    )
    trainer.fit(40.0 + 2 * pretrain.STAGE_RESERVE + pretrain.END_RESERVE)
    assert trainer.pace == 2.0  # 80 seconds of schedule in 40
    trainer.position.update(stage=1, stage_seconds=10.0)
    trainer.fit(80.0 + pretrain.STAGE_RESERVE + pretrain.END_RESERVE)
    assert trainer.pace == 0.5
    trainer.fit(-5.0)  # too late: what is left is over after a step
    assert trainer.pace == 40.0


def test_a_run_that_is_late_ends_its_schedule_in_the_time_given(tmp_path):
    late = recipe_from(
        {
            "model": TINY,
            "stages": [{"length": 16, "seconds": 500.0, "tokens_per_step": 128}],
            "validation": {"num_samples": 1, "text_tokens": 128, "tasks": ["kv"]},
            "run": {"micro_tokens": 64, "workers": 2, "slots": 4, "compile": "off"},
        }
    )
    trainer = run(late, tmp_path, fit=0.0)
    assert trainer.position["stage"] == 1
    assert 0 < trainer.position["step"] < 400


def test_export_verb_saves_the_model_of_a_run_that_did_not_end(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.toml"
    shape = "\n".join(f"{name} = {value}" for name, value in TINY.items())
    recipe.write_text(f"[model]\n{shape}\n[[stages]]\nlength = 16\nsteps = 1\ntokens_per_step = 65536\n")
    trainer = run(tiny_recipe(), tmp_path / "run")
    arguments = ["export", "--recipe", recipe, "--work", tmp_path / "run", "--pack", tmp_path / "packed"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
    pretrain.main()
    unpack(tmp_path / "packed", tmp_path / "back")
    from safetensors.torch import load_file

    found = load_file(tmp_path / "back" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[name], trainer.model.state_dict()[name].to(torch.bfloat16))


def test_mend_recipe_can_be_shared_by_two():
    recipe = load_recipe(ROOT / "recipes" / "embedded" / "mend.toml")
    recipe.check_team(2)
    assert recipe.model == load_recipe(ROOT / "recipes" / "embedded" / "recipe.toml").model


def test_nats_are_the_mean_loss_of_whole_windows():
    """A model that always gives token 3 half of the chance, and the other 63 the rest, over two windows and a scrap."""

    class Biased:
        def hidden(self, ids):
            return ids.flatten()

        def logits(self, hidden):
            logits = torch.full((*hidden.shape, 64), 0.5 / 63).log()
            logits[..., 3] = np.log(0.5)
            return logits

    ids = np.array([3, 3, 3, 3, 1, 2, 3, 4, 3, 3], dtype=np.uint16)
    expected = (3 * np.log(2) + 2 * np.log(126) + np.log(2)) / 6
    assert text_loss(Biased(), ids, 4, torch.device("cpu")) == pytest.approx(expected)
