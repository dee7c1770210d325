"""Every command and the Python code of the section "Combinations" in docs/methods.md, run on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_model
from oracles import kept, random_heads, reader_of, tokens, write_gates, write_mergers

from locret.backbone import Backbone
from locret.cli import main
from locret.config import CacheConfig
from locret.evaluate.grid import Grid, parse_method
from locret.evaluate.oracle import REFERENCES
from locret.gate import Gates
from locret.lococo import Mergers
from locret.methods import get_method
from locret.profile import HeadProfile, repetition_profiles
from locret.stores import layer_store

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
    write_gates(here / "gates.safetensors", backbone)
    for profile in repetition_profiles(backbone, length=20):
        profile.save(here / f"{profile.kind}.json")
    return here


def test_there_are_commands():
    assert len(COMMANDS) == 11


@pytest.mark.parametrize("command", COMMANDS, ids=lambda text: re.sub(r'.*it\?" ', "", text)[:60])
def test_a_recipe_runs(folder, tiny_folder, monkeypatch, capsys, command):
    monkeypatch.chdir(folder)
    model = ["--model", str(tiny_folder("llama")), "--heads", "heads"]
    code = main([*shlex.split(command), *model, *SMALL.split()])  # the last of two equal flags counts
    out = json.loads(capsys.readouterr().out)
    assert code == 0, out
    assert out["budget"] == 80
    assert out["prompt_tokens"] > 300
    assert out["kv_bytes"] < out["kv_bytes_full"] / (1 if "--storage kivi" in command or "minikv" in command else 2)
    assert f"--method {out['method']} " in command or out["method"] == "locret"


def test_the_python_code_makes_the_files(tmp_path, tiny_folder, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    small = code.replace('"folder"', repr(str(tiny_folder("llama")))).replace("(backbone)", "(backbone, length=20)")
    small = small.replace("prompt_len=512, budget=128", "prompt_len=40, budget=12").replace("chunk=256", "chunk=20")
    exec(compile(small, "methods.md", "exec"), {"samples": [tokens(60)]})
    model = Backbone(build_tiny_model("llama"))
    assert Mergers.load("mergers.safetensors").slots == 6
    assert len(Gates.load("gates.safetensors")) == 2
    assert HeadProfile.load("echo.json").backbone["num_layers"] == model.num_layers


GRIDS = sorted((Path(__file__).parents[2] / "recipes" / "grids").glob("*.toml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_a_grid_names_methods_and_stores_that_fit_its_budgets(path):
    grid = Grid.from_toml(path)
    heads = random_heads(Backbone(build_tiny_model("llama")))
    for text in grid.methods:
        name, options = parse_method(text)
        method = REFERENCES[name]() if name in REFERENCES else get_method(name, heads=heads, **options)
        for budget in grid.budgets:
            method.check(CacheConfig(budget=budget, **grid.cache).resolve(prompt_len=grid.lengths[0], unit_bytes=1))


def test_minikv_is_its_parts():
    """The composition law, with one chunk: what accumulated attention keeps of a pyramid, its older units then as KIVI
    stores them with 2 bits and groups of 16, and the newest 128 tokens as they are."""
    backbone = Backbone(build_tiny_model("llama", dtype=torch.float64))
    ids = tokens(256)
    options = dict(budget=120, chunk_size=256, num_sinks=0, num_stabilizers=60, local_window=0)
    method = get_method("pyramidkv", base="h2o", beta=7)
    with torch.inference_mode():
        dense, stored = (
            reader_of(backbone, method, 256, storage=storage, **options) for storage in ("dense", "minikv")
        )
        assert torch.equal(dense.read(ids), stored.read(ids))
    assert kept(dense) == kept(stored)
    codec = layer_store("minikv").k
    for layer, (plain, packed) in enumerate(zip(dense.cache.layers, stored.cache.layers, strict=True)):
        at, k = plain.positions(), plain.units().k
        want = codec.settle(codec.encode(k), at, newest=255, heads=None, num_heads=2, queries=None)
        assert torch.equal(packed.units().k, codec.decode(want))
        # 256 tokens are two whole residuals of 128: all that stayed are codes but what fills no group of 16
        assert int((want.row[0, 0] < 0).sum()) == len(kept(dense)[layer][0]) % 16
