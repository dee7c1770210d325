"""Scores from published weights: equal to their formulas written out, and strict about their files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import build_tiny_model
from oracles import reader_of, tokens
from peer_files import gate_tensors, kvzap_tensors, write_fastkvzip, write_kvzap
from safetensors.torch import save_file

from locret.backbone import Backbone
from locret.config import CacheConfig
from locret.context import Context
from locret.engine import LLM
from locret.errors import ConfigError, ContextError, HeadsError
from locret.methods import ChunkView, get_method


def view_of(hidden, layer=0, heads=2):
    b, c, _ = hidden.shape
    x = torch.zeros(b, heads, c, 8)
    return ChunkView(layer, x, x, x, 0, 0.3, hidden)


def hidden_of(batch=2, length=5, size=64, seed=0):
    return torch.randn(batch, length, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------- KVzap


def kvzap_reference(x, tensors, layer, width):
    """[Hkv] for one hidden state, in scalars: W2 gelu(W1 x + b1) + b2, or W x + b."""
    t = {
        name.split(".", 2)[2]: value.double()
        for name, value in tensors.items()
        if name.startswith(f"module_list.{layer}.")
    }
    if width is None:
        return t["weight"] @ x + t["bias"]
    inner = [0.5 * z * (1 + math.erf(z / math.sqrt(2))) for z in (t["0.weight"] @ x + t["0.bias"]).tolist()]
    return t["2.weight"] @ torch.tensor(inner, dtype=torch.float64) + t["2.bias"]


@pytest.mark.parametrize("width", [None, 24])
def test_kvzap_scores_are_its_networks_written_out(tmp_path, width):
    method = get_method("kvzap", path=str(write_kvzap(tmp_path, width=width)))
    tensors, hidden = kvzap_tensors(2, 64, 2, width), hidden_of()
    for layer in range(2):
        got = method.score(view_of(hidden, layer))
        assert got.shape == (2, 2, 5)
        assert got.dtype == torch.float32
        for b in range(2):
            for c in range(5):
                want = kvzap_reference(hidden[b, c], tensors, layer, width)
                torch.testing.assert_close(got[b, :, c].double(), want, rtol=1e-5, atol=1e-6)


def test_half_precision_scores_do_not_tie(tmp_path):
    """512 hidden states in bfloat16: a hundred scores would be equal to others if they were rounded to it."""
    method = get_method("kvzap", path=str(write_kvzap(tmp_path)))
    scores = method.score(view_of(hidden_of(1, 512).bfloat16()))[0, 0]
    assert scores.unique().numel() > 505
    assert scores.bfloat16().unique().numel() < 420


# ---------------------------------------------------------------------- Fast KVzip


def gate_reference(x, t):
    """[Hkv] for one hidden state: softmax over (own key, sinks), the own key's share, mean over the group."""
    t = {name: value.double() for name, value in t.items()}
    heads, _, sinks, d = t["k_base"].shape
    group = t["b"].shape[-1]
    q = (t["q_proj.weight"] @ x + t["q_proj.bias"]).view(heads, group, d)
    k = (t["k_proj.weight"] @ x).view(heads, d)

    def norm(vector, weight):
        return vector / (vector.pow(2).mean() + 1e-6).sqrt() * weight

    out = []
    for h in range(heads):
        key, shares = norm(k[h], t["k_norm.weight"]), []
        for g in range(group):
            query = norm(q[h, g], t["q_norm.weight"])
            own = float(query @ key / math.sqrt(d) + t["b"][h, 0, g])
            base = [float(query @ t["k_base"][h, 0, s] / math.sqrt(d)) for s in range(sinks)]
            shares.append(math.exp(own) / (math.exp(own) + sum(math.exp(z) for z in base)))
        out.append(sum(shares) / group)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("sizes", [{}, dict(heads=3, group=1, width=4, sinks=2)])
def test_fast_kvzip_scores_are_its_gates_written_out(tmp_path, sizes):
    method = get_method("fastkvzip", path=str(write_fastkvzip(tmp_path / "q4_dim16_sink16.pt", **sizes)))
    hidden, heads = hidden_of(), sizes.get("heads", 2)
    for layer in range(2):
        got = method.score(view_of(hidden, layer, heads))
        assert got.shape == (2, heads, 5)
        assert got.dtype == torch.float32
        for b in range(2):
            for c in range(5):
                want = gate_reference(hidden[b, c], gate_tensors(seed=layer, **sizes))
                torch.testing.assert_close(got[b, :, c].double(), want, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------- on the seam


@pytest.mark.parametrize("name", ["kvzap", "fastkvzip"])
def test_scores_in_the_cache_are_those_of_what_the_projections_read(tmp_path, name):
    """Three chunks; the hidden states are taken from the plain model by a hook of the test's own."""
    path = write_kvzap(tmp_path) if name == "kvzap" else write_fastkvzip(tmp_path / "gates.pt")
    method = get_method(name, path=str(path))
    model = build_tiny_model("llama")
    ids, states = tokens(40), []
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda m, i, out: states.append(out))
        for layer in model.model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    reader = reader_of(Backbone(model), method, 40, budget=64, chunk_size=16)
    reader.read(ids)
    for layer in range(2):
        got = reader.cache.layers[layer].units().score[0]
        for t in (0, 17, 39):
            if name == "kvzap":
                want = kvzap_reference(states[layer][0, t].double(), kvzap_tensors(2, 64, 2, None), layer, None)
            else:
                want = gate_reference(states[layer][0, t].double(), gate_tensors(seed=layer))
            torch.testing.assert_close(got[:, t].double(), want, rtol=1e-3, atol=1e-4)
    small = reader_of(Backbone(model), method, 40, budget=20, chunk_size=16)
    small.read(ids)
    assert small.cache.held <= 20


def test_a_context_made_with_other_weights_is_refused(tmp_path):
    """What was kept depends on them: the digest in a saved context covers the scorer's weights."""
    paths = [write_fastkvzip(tmp_path / "one.pt"), write_fastkvzip(tmp_path / "two.pt", layers=3)]
    torch.save({"module": [gate_tensors(seed=9), gate_tensors(seed=1)]}, paths[1])
    llms = [LLM.build(Backbone(build_tiny_model("llama")), method="fastkvzip", method_options={"path": str(path)},
                      config=CacheConfig(budget=20, chunk_size=16)) for path in paths]  # fmt: skip
    llms[0].compress(tokens(40)[0].tolist()).save(tmp_path / "context")
    assert Context.load(tmp_path / "context", llms[0]).seen == 40
    with pytest.raises(ContextError, match="another model or other heads"):
        Context.load(tmp_path / "context", llms[1])


# ---------------------------------------------------------------------- strict files


@pytest.mark.parametrize("name", ["kvzap", "fastkvzip"])
def test_a_path_is_needed(name):
    with pytest.raises(ConfigError, match=f"method '{name}' scores with weights from a file; give path"):
        get_method(name)


@pytest.mark.parametrize("name", ["kvzap", "fastkvzip"])
def test_weights_of_another_model_are_refused(tmp_path, name):
    path = write_kvzap(tmp_path) if name == "kvzap" else write_fastkvzip(tmp_path / "gates.pt")
    method = get_method(name, path=str(path))
    for view in (view_of(hidden_of(size=32)), view_of(hidden_of(), heads=4), view_of(hidden_of(), layer=2)):
        with pytest.raises(HeadsError, match=r"made for another model: hidden size 64, 2 KV heads, 2 layers"):
            method.score(view)


def damaged(kind):
    tensors = kvzap_tensors(2, 64, 2, None)
    if kind == "missing":
        del tensors["module_list.1.bias"]
    elif kind == "extra":
        tensors["module_list.1.2.weight"] = torch.zeros(2, 2)
    elif kind == "other":
        tensors["fc1.weight"] = torch.zeros(2, 2)
    elif kind == "layer":
        tensors["module_list.2.bias"] = torch.zeros(2)
    elif kind == "shape":
        tensors["module_list.0.weight"] = torch.zeros(3, 64)
    elif kind == "nan":
        tensors["module_list.0.weight"][0, 0] = math.nan
    elif kind == "whole numbers":
        tensors["module_list.0.weight"] = torch.zeros(2, 64, dtype=torch.int32)
    return tensors


@pytest.mark.parametrize(("kind", "message"), [
    ("missing", r"layer 1: missing bias; wanted weight, bias"),
    ("extra", r"layer 1: unexpected 2.weight; wanted weight, bias"),
    ("other", r"unexpected fc1.weight; wanted module_list.0 ... module_list.1"),
    ("layer", r"unexpected module_list.2.bias"),
    ("shape", r"layer 0: weight is torch.float32 \[3, 64\]; wanted floating-point \[2, 64\]"),
    ("nan", r"layer 0: weight has 1 NaN or infinite"),
    ("whole numbers", r"weight is torch.int32"),
])  # fmt: skip
def test_damaged_kvzap_weights_are_named(tmp_path, kind, message):
    with pytest.raises(HeadsError, match=message):
        get_method("kvzap", path=str(write_kvzap(tmp_path, tensors=damaged(kind))))


def test_damaged_kvzap_folders_are_named(tmp_path):
    with pytest.raises(HeadsError, match="not a folder and not a Hub id"):
        get_method("kvzap", path=str(tmp_path / "none" / "where"))
    with pytest.raises(HeadsError, match=r"input_dim 64, output_dim 0.*Is this the folder of a KVzap model"):
        get_method("kvzap", path=str(write_kvzap(tmp_path / "a", output_dim=0)))
    with pytest.raises(HeadsError, match=r"hidden_dim 'wide'"):
        get_method("kvzap", path=str(write_kvzap(tmp_path / "b", hidden_dim="wide")))
    folder = write_kvzap(tmp_path / "c")
    (folder / "config.json").write_text("[1]")
    with pytest.raises(HeadsError, match="holds a list; wanted the config of a KVzap model"):
        get_method("kvzap", path=str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(HeadsError, match=r"config.json cannot be read \(FileNotFoundError\)"):
        get_method("kvzap", path=str(folder))
    folder = write_kvzap(tmp_path / "d", width=8, tensors=kvzap_tensors(2, 64, 2, None))  # an MLP's config
    with pytest.raises(HeadsError, match=r"layer 0: missing 0.weight, 0.bias, 2.weight and 1 more; unexpected bias"):
        get_method("kvzap", path=str(folder))


def test_damaged_gates_are_named(tmp_path):
    path = tmp_path / "gates.pt"

    def refused(values, message):
        torch.save(values, path)
        with pytest.raises(HeadsError, match=message):
            get_method("fastkvzip", path=str(path))

    with pytest.raises(HeadsError, match="is no file; wanted a torch file"):
        get_method("fastkvzip", path=str(path))
    good = gate_tensors()
    refused([good], "holds something else; wanted a torch file with a list 'module'")
    refused({"module": []}, "holds something else")
    refused(
        {"module": [{"b": good["b"]}]}, r"q_proj.weight missing, k_base missing, b \[2, 1, 4\]; wanted q_proj.weight"
    )
    refused(
        {"module": [good, gate_tensors(width=8)]},
        r"layer 1: k_base is torch.float32 \[2, 1, 16, 8\]; wanted .*\[2, 1, 16, 16\]",
    )
    refused(
        {"module": [{**good, "k_norm.weight": torch.ones(15)}]}, r"layer 0: k_norm.weight is .*\[15\]; wanted .*\[16\]"
    )
    refused({"module": [{**good, "extra": torch.ones(1)}]}, "layer 0: unexpected extra")
    refused({"module": [{**good, "b": torch.full((2, 1, 4), math.inf)}]}, "b has 8 NaN or infinite")
    refused({"module": [{**good, "b": torch.nn.Linear(1, 1)}]}, "not a file of plain tensors")
    path.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(HeadsError, match="is truncated"):
        get_method("fastkvzip", path=str(path))


def test_files_do_what_transformers_wrote(tmp_path):
    """A PreTrainedModel adds keys to its config; they are not ours to refuse."""
    folder = write_kvzap(tmp_path, torch_dtype="float32", transformers_version="4.57.0")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "kvzap"
    save_file(kvzap_tensors(2, 64, 2, None), folder / "model.safetensors")
    assert len(get_method("kvzap", path=str(folder)).heads.layers) == 2
