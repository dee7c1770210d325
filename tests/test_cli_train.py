"""`locret train` with recipes and choices, `locret heads`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_cli import run_json

from locret.backbone import Backbone
from locret.cli import main
from locret.heads import RetainingHeads
from locret.train import TrainConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    lines = [json.dumps({"prompt": f"The code is {n}. Code?", "answer": str(n)}) for n in range(4711, 4731)]
    path.write_text("\n".join([*lines, "{broken"]))
    return path


@pytest.fixture
def trained(tiny_folder: Callable[..., Path], data: Path, tmp_path: Path, capsys: Any) -> tuple[str, str]:
    """A model's folder and the folder of heads trained for it."""
    model, heads = str(tiny_folder("llama")), str(tmp_path / "heads")
    flags = f"--model {model} --data {data} --output {heads} --steps 2 --d-r 8 --device cpu"
    run_json(capsys, "train", *flags.split())
    return model, heads


def test_a_recipe_names_the_whole_run(
    tiny_folder: Callable[..., Path], data: Path, tmp_path: Path, capsys: Any
) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text(
        f'model = "{tiny_folder("llama")}"\ndata = ["{data}"]\noutput = "{tmp_path / "out"}"\ndevice = "cpu"\n'
        "[train]\nsteps = 3\nhidden_size = 8\neval_samples = 2\n"
    )
    result = run_json(capsys, "train", "--recipe", str(recipe), "--set", "schedule=cosine", "--set", "betas=[0.8, 0.9]")
    assert (result["step"], result["dropped"]) == (3, "1 of 21 samples dropped (1 not JSON)")
    saved = RetainingHeads.from_pretrained(tmp_path / "out").config.training["config"]
    assert (saved["schedule"], saved["betas"], saved["steps"]) == ("cosine", [0.8, 0.9], 3)
    recipe.write_text("modle = 'x'\n[train]\n")
    assert main(["train", "--recipe", str(recipe)]) == 2
    assert "did you mean 'model'" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "recipes").glob("*.toml")))
def test_recipes_are_valid(name: str) -> None:
    from locret.cli.train import _recipe

    keys = _recipe(ROOT / "recipes" / name)
    assert {"model", "data", "output"} <= set(keys)
    assert TrainConfig.from_toml(ROOT / "recipes" / name).hidden_size == 1024


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "steps"], "write NAME=VALUE"),
        (["--set", "stepz=3"], "did you mean 'steps'"),
        (["--objective", "rank"], "unknown objective 'rank'"),
        (["--quantize", "bnb-3bit"], "unknown quantize 'bnb-3bit'"),
        (["--parallel", "tensr"], "did you mean 'tensor'"),
        (["--parallel", "fsdp", "--quantize", "bnb-4bit"], "splits plain weights"),
        (["--log", "tensorbord"], "did you mean 'tensorboard'"),
    ],
)
def test_bad_flags_say_what_is_allowed(flags: list[str], message: str, data: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", "--data", str(data), "--output", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_quantiser_names_its_package(data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    flags = ["--data", str(data), "--output", str(tmp_path / "out"), "--quantize", "torchao-int8"]
    assert main(["train", *flags]) == 2
    assert "pip install torchao" in capsys.readouterr().err


# ---------------------------------------------------------------------- heads


def test_info_says_what_heads_are(trained: tuple[str, str], capsys: Any) -> None:
    values = run_json(capsys, "heads", "info", trained[1])
    assert (values["hidden_size"], values["objective"], values["input"]) == (8, "paper", "qkv")
    assert values["bytes"] == 4 * values["parameters"]
    assert values["training"]["samples"] == 21
    assert main(["heads", "info", trained[1]]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_convert_goes_to_the_published_layout_and_back(trained: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    model, heads = trained
    published = tmp_path / "published.safetensors"
    run_json(capsys, "heads", "convert", heads, "--output", str(published), "--to", "published")
    assert "model.layers.1.self_attn.fc2.weight" in load_file(published)
    run_json(capsys, "heads", "convert", str(published), "--output", str(tmp_path / "back"), "--model", model)
    ours, back = (RetainingHeads.from_pretrained(folder) for folder in (heads, tmp_path / "back"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), back.parameters(), strict=True))
    assert main(["heads", "convert", str(published), "--output", str(tmp_path / "x")]) == 2
    assert "add --model" in capsys.readouterr().err


def test_convert_changes_the_dtype(trained: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    run_json(capsys, "heads", "convert", trained[1], "--output", str(tmp_path / "half"), "--dtype", "bfloat16")
    assert {p.dtype for p in RetainingHeads.from_pretrained(tmp_path / "half").parameters()} == {torch.bfloat16}


def test_merge_check_measures_a_changed_model(
    trained: tuple[str, str], tiny_folder: Callable[..., Path], data: Path, tmp_path: Path, capsys: Any
) -> None:
    model, heads = trained
    changed = Backbone.load(model, device="cpu")
    with torch.no_grad():
        changed.model.model.layers[0].self_attn.q_proj.weight.add_(0.1)  # a merged adapter, as far as shapes go
    changed.model.save_pretrained(tmp_path / "merged")
    changed.need_tokenizer().save_pretrained(tmp_path / "merged")
    flags = ["--model", str(tmp_path / "merged"), "--data", str(data), "--samples", "3", "--device", "cpu"]
    values = run_json(capsys, "heads", "merge-check", heads, *flags)
    assert (values["fits"], values["samples"]) == (True, 3)
    assert 0 <= values["overlap"] <= 1
    assert main(["heads", "merge-check", heads, "--model", str(tiny_folder("qwen3")), "--device", "cpu"]) == 2
    assert "made for another backbone" in capsys.readouterr().err
