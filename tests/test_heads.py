"""Retaining heads: scores equal an independent reading, files are strict, published layouts import."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from locret import heads as heads_module
from locret.backbone import Backbone
from locret.config import CacheConfig
from locret.errors import HeadsError
from locret.heads import CONFIG_FILE, WEIGHTS_FILE, HeadsConfig, RetainingHeads
from locret.methods import get_method
from locret.prefill import Reader

SHAPE = dict(num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=8, hidden_size=16)
TINY = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)


def make(seed=0, **changes) -> RetainingHeads:
    return RetainingHeads(HeadsConfig(**{**SHAPE, **changes}), generator=torch.Generator().manual_seed(seed))


def qkv(batch=2, num_q=4, num_kv=2, length=11, dim=8, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, length, dim, generator=g).to(dtype) for h in (num_q, num_kv, num_kv)]


def reference_scores(weights: dict[str, torch.Tensor], layer: int, q, k, v) -> torch.Tensor:
    """score[t, j] = (W2 . silu(W1 . [q_t | k_t | v_t]))_j, one token at a time, float64."""
    w1, w2 = (weights[f"layers.{layer}.{name}.weight"].double() for name in ("fc1", "fc2"))
    out = torch.empty(q.shape[0], w2.shape[0], q.shape[2], dtype=torch.float64)
    for b in range(q.shape[0]):
        for t in range(q.shape[2]):
            x = torch.cat([part[b, :, t].reshape(-1).double() for part in (q, k, v)])
            h = w1 @ x
            out[b, :, t] = w2 @ (h * torch.sigmoid(h))
    return out


@pytest.fixture
def backbone(tiny_model) -> Backbone:
    return Backbone(tiny_model("llama", **TINY))


@pytest.fixture
def saved(tmp_path) -> Path:
    make().save_pretrained(tmp_path / "heads")
    return tmp_path / "heads"


# ---------------------------------------------------------------------- scores


@pytest.mark.parametrize("layout", ["projection", "contiguous", "fused"])
def test_scores_equal_an_independent_reading(layout):
    q, k, v = qkv()
    if layout == "projection":  # [B, T, H, D] in memory, as a linear layer leaves it
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    if layout == "fused":  # slices of one tensor, as Phi-3's qkv_proj leaves them
        q, k, v = torch.cat((q, k, v), 1).transpose(1, 2).contiguous().transpose(1, 2).split([4, 2, 2], 1)
    heads = make()
    with torch.no_grad():
        for weight in heads.parameters():
            weight.mul_(10)  # N(0, 0.02) alone makes scores of 1e-3, and any two of those are close
        for layer in range(2):
            got = heads.score(layer, q, k, v)
            assert got.shape == (2, 2, 11)
            assert got.dtype == torch.float32
            want = reference_scores(heads.state_dict(), layer, q, k, v)
            assert want.abs().max() > 0.1
            torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_all_layers_at_once_score_as_one_by_one(dtype, activation):
    q, k, v = (torch.stack([x, -x]) for x in qkv(dtype=dtype))
    heads = make(activation=activation).to(dtype).requires_grad_(False)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.mul_(10)
    before = {name: weight.clone() for name, weight in heads.state_dict().items()}
    assert heads.score_layers(q, k, v) is None
    got = heads.join_layers().score_layers(q, k, v)
    want = torch.stack([heads.score(layer, q[layer], k[layer], v[layer]) for layer in range(2)])
    assert got.dtype == torch.float32
    assert (got - want).norm() <= (1e-6 if dtype == torch.float64 else 1e-2) * want.norm()
    assert all(torch.equal(weight, before[name]) for name, weight in heads.state_dict().items())


def test_layers_that_are_not_joined_score_one_by_one(tmp_path):
    """Weights that were moved since, that are of other layers, or inputs that only a layer's pass has."""
    q, k, v = (torch.stack([x, -x]) for x in qkv())
    heads = make().join_layers()
    assert heads.score_layers(q, k, v) is not None
    heads.save_pretrained(tmp_path)
    saved = RetainingHeads.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in heads.state_dict().items())
    assert heads.to(torch.float64).score_layers(q, k, v) is None
    swapped = make().join_layers()
    swapped.layers[0], swapped.layers[1] = swapped.layers[1], swapped.layers[0]
    assert swapped.score_layers(q, k, v) is None
    hidden = make(input="hidden", backbone={"hidden_size": 24}).join_layers()
    assert hidden.score_layers(q, k, v) is None


def test_a_score_depends_on_its_own_token_only():
    q, k, v = qkv()
    before = make().score(0, q, k, v)
    for x in (q, k, v):
        x[:, :, 5] += 1
    after = make().score(0, q, k, v)
    changed = (before != after).any(dim=0).any(dim=0)
    assert changed.tolist() == [t == 5 for t in range(11)]


def test_bf16_heads_give_fp32_scores():
    """bf16 scores tie (spacing 2^-8), and ties evict at random: the last product is fp32."""
    heads = make().to(torch.bfloat16)
    scores = heads.score(0, *qkv(length=400, dtype=torch.bfloat16))
    assert scores.dtype == torch.float32
    assert len(scores[0, 0].unique()) > 390


def test_weights_start_as_published():
    heads = make(hidden_size=256)
    for weight in heads.parameters():
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), make(hidden_size=256).parameters()))


# ---------------------------------------------------------------------- our files


def test_saved_heads_come_back(tmp_path, backbone):
    config = HeadsConfig.of(backbone, hidden_size=16, training={"data": ["a.jsonl"]})
    heads = RetainingHeads(config)
    heads.save_pretrained(tmp_path)
    loaded = RetainingHeads.from_pretrained(tmp_path)
    assert loaded.config == config
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), loaded.parameters(), strict=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    loaded.check(backbone)


def test_heads_of_another_backbone_are_refused_field_by_field(backbone, tiny_model):
    heads = RetainingHeads(HeadsConfig.of(backbone))
    with pytest.raises(HeadsError) as error:
        heads.check(Backbone(tiny_model("qwen3", **{**TINY, "num_hidden_layers": 3})))
    text = str(error.value)
    assert "architecture: 'Qwen3ForCausalLM', wanted 'LlamaForCausalLM'" in text
    assert "num_layers: 3, wanted 2" in text
    assert "head_dim" not in text
    bare = make(head_dim=4)  # no fingerprint: shapes are still compared
    with pytest.raises(HeadsError, match="head_dim: 8, wanted 4"):
        bare.check(backbone)


def edit_config(folder: Path, **changes) -> None:
    values = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({k: v for k, v in {**values, **changes}.items() if v != "remove"}))


def edit_weights(folder: Path, **changes: object) -> None:
    """layers__0__fc1=tensor: replaced; None: removed."""
    tensors = load_file(folder / WEIGHTS_FILE)
    for name, tensor in changes.items():
        tensors[name.replace("__", ".") + ".weight"] = tensor
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS_FILE)


BROKEN = {
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), "config.json is missing"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), "heads.safetensors is missing"),
    "config cut": (lambda f: (f / CONFIG_FILE).write_text('{"num_layers": 2,'), "cannot be read as JSON"),
    "config not utf-8": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe"), "cannot be read as JSON"),
    "config of a model": (
        lambda f: (f / CONFIG_FILE).write_text('{"model_type": "llama", "num_layers": 2}'),
        r"missing keys \['num_q_heads'.*unknown keys \['model_type'\].*folder of a model",
    ),
    "key gone": (lambda f: edit_config(f, head_dim="remove"), r"missing keys \['head_dim'\]"),
    "key unknown": (lambda f: edit_config(f, d_R=16), r"unknown keys \['d_R'\]"),
    "newer": (lambda f: edit_config(f, version=2), "version 2, but this locret reads versions up to 1; upgrade"),
    "bad number": (lambda f: edit_config(f, num_layers="2"), "num_layers is '2'; it must be a whole number"),
    "activation": (lambda f: edit_config(f, activation="sillu"), "activation is 'sillu'; this locret knows: .*silu"),
    "input": (lambda f: edit_config(f, input="hiden"), "input is 'hiden'; this locret knows: hidden, qkv"),
    "label": (lambda f: edit_config(f, label="mass"), "label is 'mass'; this locret knows: log-mass, log-value, max"),
    "mixed saves": (
        lambda f: edit_config(f, num_layers=3),
        "not from one save: num_layers is 3 in the first, 2 in the",
    ),
    "weights cut": (
        lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:-10]),
        "truncated or no safetensors file",
    ),
    "weights empty": (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), r"\(0 bytes\) is truncated"),
    "weights garbage": (lambda f: (f / WEIGHTS_FILE).write_bytes(b"PK\x03\x04" * 99), "no safetensors file"),
    "layer gone": (
        lambda f: edit_weights(f, layers__1__fc2=None),
        "missing layers.1.fc2.weight; wanted fc1 and fc2 of 2",
    ),
    "layer too many": (
        lambda f: edit_weights(f, layers__2__fc2=torch.zeros(2, 16)),
        "unexpected layers.2.fc2.weight; wanted fc1 and fc2 of 2",
    ),
    "shape": (
        lambda f: edit_weights(f, layers__0__fc2=torch.zeros(4, 16)),
        re.escape("layers.0.fc2.weight has shape [4, 16], wanted [2, 16]"),
    ),
    "integers": (lambda f: edit_weights(f, layers__0__fc2=torch.ones(2, 16, dtype=torch.int8)), "is torch.int8"),
    "nan": (
        lambda f: edit_weights(f, layers__0__fc2=torch.full((2, 16), float("nan"))),
        "layers.0.fc2.weight has 32 NaN or infinite of 32",
    ),
    "inf": (lambda f: edit_weights(f, layers__1__fc2=torch.full((2, 16), float("inf"))), "32 NaN or infinite"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_an_error_and_never_random_heads(what, saved):
    """The released loader kept going with strict=False: a wrong file left random heads in place."""
    damage, message = BROKEN[what]
    damage(saved)
    with pytest.raises(HeadsError, match=message):
        RetainingHeads.from_pretrained(saved)


def test_an_old_training_note_beside_new_weights_loads(saved):
    """What a kill between the two renames leaves: the weights are whole, so they load."""
    edit_config(saved, training={"steps": 1})
    assert RetainingHeads.from_pretrained(saved).config.training == {"steps": 1}


def test_a_full_disk_while_saving_leaves_the_old_files(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(heads_module, "save_file", full)
    with pytest.raises(HeadsError, match=r"cannot be written: .*No space left on device.*untouched"):
        make(seed=9).save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_heads_that_are_not_finite_are_not_saved(saved):
    before = (saved / WEIGHTS_FILE).read_bytes()
    heads = make()
    with torch.no_grad():
        heads.layers[1].fc1.weight[3, 3] = float("inf")
    with pytest.raises(HeadsError, match=r"not saved: layers.1.fc1.weight has 1 NaN or infinite"):
        heads.save_pretrained(saved)
    assert (saved / WEIGHTS_FILE).read_bytes() == before


# ---------------------------------------------------------------------- the Hub


def test_a_hub_id_is_downloaded(saved, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(kw, name=name) or str(saved)
    )
    loaded = RetainingHeads.from_pretrained("someone/some-heads", revision="v1")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), make().parameters()))
    assert asked == {
        "name": "someone/some-heads",
        "allow_patterns": [CONFIG_FILE, WEIGHTS_FILE],
        "revision": "v1",
        "token": None,
    }


def test_a_hub_id_that_cannot_be_had_says_why(monkeypatch):
    def refuse(name, **kw):
        raise ConnectionError("no network\nlong trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        HeadsError, match=r"no folder 'some/heads' here.*ConnectionError: no network\. Check the spelling"
    ):
        RetainingHeads.from_pretrained("some/heads")


@pytest.mark.parametrize("path", ["/nowhere/at/all", "nowhere", "a/b/c", "../x"])
def test_what_is_neither_a_folder_nor_an_id_is_an_error(path, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(HeadsError, match="is not a folder and not a Hub id"):
        RetainingHeads.from_pretrained(path)


def test_push_uploads_both_files_and_a_card(monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token=None): ...

        def create_repo(self, repo_id, private, exist_ok):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen.update({p.name: p.read_text(errors="replace") for p in Path(folder_path).iterdir()})
            return type("Commit", (), {"commit_url": f"hub/{repo_id}"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert make().push_to_hub("me/heads") == "hub/me/heads"
    assert sorted(seen) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]
    assert 'heads="me/heads"' in seen["README.md"]


# ---------------------------------------------------------------------- published files


def published(prefix="model.layers.{i}.self_attn.", seed=0, **changes) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    fc1 = lambda: torch.randn(24, 64, generator=g) * 0.1
    fc2 = lambda: torch.randn(2, 24, generator=g)
    state = {}
    for i in range(2):
        state[prefix.format(i=i) + "fc1.weight"], state[prefix.format(i=i) + "fc2.weight"] = fc1(), fc2()
    return {**state, **changes}


def others() -> dict[str, torch.Tensor]:
    """What a whole checkpoint holds besides; MLPs named fc1 / fc2 (Phi-2, OPT) must not be taken for heads."""
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.fc1.weight"]
    return {name: torch.zeros(3, 3) for name in names}


def write_published(kind: str, folder: Path) -> Path:
    state, shards = published(), (folder / "a.safetensors", folder / "b.safetensors")
    folder.mkdir()
    match kind:
        case "bin":
            torch.save(state, folder / "llama.bin")
            return folder / "llama.bin"
        case "old bin":
            torch.save(state, folder / "llama.bin", _use_new_zipfile_serialization=False)
            return folder / "llama.bin"
        case "safetensors":
            save_file(state, folder / "heads.safetensors")
            return folder / "heads.safetensors"
        case "bare":
            torch.save(published("layers.{i}."), folder / "heads.pt")
            return folder / "heads.pt"
        case "folder of a bin":  # hyx21/Locret-*, thunlp/APB-Locret-*
            torch.save(state, folder / "llama.bin")
        case "full checkpoint":
            bare = {"layers.0.fc1.weight": torch.zeros(3, 3)}  # some other module's
            save_file({**state, **others(), **bare}, folder / "model.safetensors")
        case "sharded":
            everything = {**state, **others()}
            names = sorted(everything)
            for path, part in zip(shards, (names[::2], names[1::2])):
                save_file({n: everything[n] for n in part}, path)
            index = {"weight_map": {n: (shards[0] if n in names[::2] else shards[1]).name for n in names}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            save_file(published(seed=99), folder / "stale.safetensors")  # not in the index: not read
        case "sharded bin, no index":
            names = sorted(state)
            torch.save({n: state[n] for n in names[:1]}, folder / "pytorch_model-1.bin")
            torch.save({n: state[n] for n in names[1:]}, folder / "pytorch_model-2.bin")
            torch.save({"state": {}, "param_groups": []}, folder / "optimizer.bin")  # accelerate's save_state
        case "wrapped":
            torch.save({f"module.{k}": v for k, v in state.items()}, folder / "ddp.bin")
    return folder


KINDS = ["bin", "old bin", "safetensors", "bare", "folder of a bin", "full checkpoint", "sharded"]
KINDS += ["sharded bin, no index", "wrapped"]


@pytest.mark.parametrize("kind", KINDS)
def test_published_layouts_import_and_score_as_the_release_does(kind, tmp_path, backbone):
    heads = RetainingHeads.from_published(write_published(kind, tmp_path / "published"), backbone)
    assert heads.config.hidden_size == 24
    heads.check(backbone)
    q, k, v = qkv()
    state = published()
    for layer in range(2):
        weights = {
            f"layers.{layer}.{n}.weight": state[f"model.layers.{layer}.self_attn.{n}.weight"] for n in ("fc1", "fc2")
        }
        want = reference_scores(weights, layer, q, k, v)
        torch.testing.assert_close(heads.score(layer, q, k, v).double(), want, atol=1e-6, rtol=1e-6)


def test_imported_heads_survive_our_own_files(tmp_path, backbone):
    heads = RetainingHeads.from_published(write_published("bin", tmp_path / "published"), backbone)
    heads.save_pretrained(tmp_path / "ours")
    again = RetainingHeads.from_pretrained(tmp_path / "ours")
    assert again.config.training == {"imported from": str(tmp_path / "published" / "llama.bin")}
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), again.parameters()))


class Evil:
    """A pickle that runs code when it is read carelessly."""

    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, backbone, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model.layers.0.self_attn.fc1.weight": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(HeadsError, match="not a file of plain tensors"):
        RetainingHeads.from_published(tmp_path / "evil.bin", backbone)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (others(), "no retaining heads in .*looked at"),
        (published("model.layers.{i}.mlp."), "no retaining heads"),
        ({k: v for k, v in published().items() if "layers.1.self_attn.fc1" not in k}, "missing layers.1.fc1.weight"),
        ({**published(), **published("model.layers.3{i}.self_attn.")}, "unexpected layers.30.fc1.weight"),
        ({**published(), "module.model.layers.0.self_attn.fc1.weight": torch.zeros(24, 64)}, "the second layers.0.fc1"),
        (
            {**published(), "model.layers.0.self_attn.fc2.weight": torch.zeros(8, 24)},
            r"has shape \[8, 24\], wanted \[2, 24\]",
        ),
        (
            {**published(), "model.layers.0.self_attn.fc1.weight": torch.full((24, 64), float("nan"))},
            "layers.0.fc1.weight has 1536 NaN",
        ),
    ],
)
def test_published_files_that_do_not_fit_are_errors(state, message, tmp_path, backbone):
    torch.save(state, tmp_path / "x.bin")
    with pytest.raises(HeadsError, match=message):
        RetainingHeads.from_published(tmp_path / "x.bin", backbone)


def test_broken_published_files_are_errors(tmp_path, backbone):
    torch.save(published(), tmp_path / "x.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:-300])
    with pytest.raises(HeadsError, match=r"cut\.bin \(\d+ bytes\) is truncated"):
        RetainingHeads.from_published(tmp_path / "cut.bin", backbone)
    torch.save([1], tmp_path / "list.bin")
    with pytest.raises(HeadsError, match="holds a list"):
        RetainingHeads.from_published(tmp_path / "list.bin", backbone)
    shards = write_published("sharded", tmp_path / "shards")
    (shards / "b.safetensors").unlink()
    with pytest.raises(HeadsError, match=r"names shards that are missing: b\.safetensors"):
        RetainingHeads.from_published(shards, backbone)


def test_products_may_run_in_bf16_over_fp32_weights():
    """As training does on a GPU: scores and gradients are those of fp32 up to bf16's rounding, weights stay fp32."""
    q, k, v = qkv(length=200)
    results = []
    for dtype in (None, torch.bfloat16):
        heads = make()
        with torch.no_grad():
            for weight in heads.parameters():
                weight.mul_(10)
        heads.compute_dtype = dtype
        scores = heads.score(0, q, k, v)
        (scores**2).mean().backward()
        weights = list(heads.layers[0].parameters())
        assert {p.grad.dtype for p in weights} == {p.dtype for p in weights} == {scores.dtype} == {torch.float32}
        results.append((scores.detach(), *(p.grad for p in weights)))
    for exact, rounded in zip(*results):
        assert 0 < (exact - rounded).norm() < 0.02 * exact.norm()


# ---------------------------------------------------------------------- heads that read hidden states


def test_hidden_heads_equal_an_independent_reading():
    """score[t, j] = (W2 . silu(W1 . h_t))_j, float64."""
    heads = make(input="hidden", backbone={"hidden_size": 12})
    q, k, v = qkv()
    hidden = torch.randn(2, 11, 12, generator=torch.Generator().manual_seed(4))
    for layer in range(2):
        w1, w2 = (heads.state_dict()[f"layers.{layer}.{name}.weight"].double() for name in ("fc1", "fc2"))
        x = hidden.double() @ w1.T
        want = ((x * torch.sigmoid(x)) @ w2.T).transpose(1, 2)
        got = heads.score(layer, q, k, v, hidden)
        torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-4)


def test_hidden_heads_need_the_size_of_the_hidden_state():
    with pytest.raises(HeadsError, match='input is "hidden", but backbone names no hidden_size'):
        HeadsConfig(**SHAPE, input="hidden")


def test_inference_gives_hidden_heads_what_the_projections_read(backbone):
    """Chunked prefill through the method: the scores are those of the same tokens' normed hidden states."""
    heads = RetainingHeads(HeadsConfig.of(backbone, hidden_size=16, input="hidden"))
    method, seen, read = get_method("locret", heads=heads), {}, {}
    for i, layer in enumerate(backbone.model.model.layers):
        layer.self_attn.q_proj.register_forward_pre_hook(lambda m, a, i=i: read.setdefault(i, []).append(a[0]))
    score = heads.score
    heads.score = lambda layer, *x: seen.setdefault(layer, []).append(x[3]) or score(layer, *x)
    ids = torch.arange(8, 60)[None]
    config = CacheConfig(budget=24, chunk_size=16, num_sinks=0, num_stabilizers=0, local_window=0, decode_interval=1)
    with torch.no_grad():
        Reader.start(backbone, method, config, batch=1, prompt_len=52).read(ids)
    for i in range(2):
        assert torch.equal(torch.cat(seen[i], 1), torch.cat(read[i], 1)[:, -52:])


def test_a_config_of_before_there_were_choices_loads(saved):
    """Files written by 0.1.0 name neither objective nor query_aware."""
    values = json.loads((saved / CONFIG_FILE).read_text())
    old = {name: value for name, value in values.items() if name not in ("objective", "query_aware")}
    config = HeadsConfig.from_dict(old)
    assert (config.objective, config.query_aware, config.input, config.label) == ("paper", False, "qkv", "max-logit")
