"""Every command and the Python code of the section "Combinations" in docs/methods.md, run on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import build_tiny_model
from oracles import random_heads, tokens, write_mergers

from locret.backbone import Backbone
from locret.cli import main
from locret.lococo import Mergers
from locret.profile import HeadProfile, repetition_profiles

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
SECTION = PAGE.split("\n## Combinations\n")[1].split("\n## ")[0]
COMMANDS = re.findall(r"^\$ locret (.+)$", SECTION, re.MULTILINE)
SMALL = "--budget 80 --chunk-size 32 --stabilizers 20 --local-window 20 --max-new-tokens 4 --dtype float32 --json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder):
    """A document, a model with heads, profiles of its heads and mergers for it."""
    here = tmp_path_factory.mktemp("recipes")
    (here / "report.txt").write_text("A report about nothing much, word after word. " * 8, encoding="utf-8")
    backbone = Backbone.load(str(tiny_folder("llama")), device="cpu", dtype="float32")
    random_heads(backbone).save_pretrained(here / "heads")
    write_mergers(here / "mergers.safetensors", backbone)
    for profile in repetition_profiles(backbone, length=20):
        profile.save(here / f"{profile.kind}.json")
    return here


def test_there_are_commands():
    assert len(COMMANDS) == 6


@pytest.mark.parametrize("command", COMMANDS, ids=lambda text: re.sub(r'.*it\?" ', "", text)[:60])
def test_a_recipe_runs(folder, tiny_folder, monkeypatch, capsys, command):
    monkeypatch.chdir(folder)
    model = ["--model", str(tiny_folder("llama")), "--heads", "heads"]
    code = main([*shlex.split(command), *model, *SMALL.split()])  # the last of two equal flags counts
    out = json.loads(capsys.readouterr().out)
    assert code == 0, out
    assert out["budget"] == 80
    assert out["prompt_tokens"] > 300
    assert out["kv_bytes"] < out["kv_bytes_full"] / 2
    assert f"--method {out['method']} " in command or out["method"] == "locret"


def test_the_python_code_makes_the_files(tmp_path, tiny_folder, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    small = code.replace('"folder"', repr(str(tiny_folder("llama")))).replace("(backbone)", "(backbone, length=20)")
    small = small.replace("prompt_len=512, budget=128", "prompt_len=40, budget=12")
    exec(compile(small, "methods.md", "exec"), {"samples": [tokens(60)]})
    model = Backbone(build_tiny_model("llama"))
    assert Mergers.load("mergers.safetensors").slots == 6
    assert HeadProfile.load("echo.json").backbone["num_layers"] == model.num_layers
