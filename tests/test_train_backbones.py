"""Backbones as their users have them: quantised, spread over devices, merged with an adapter."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf
from conftest import build_byte_tokenizer, build_tiny_model
from test_train import SMALL, TINY, make_backbone, make_samples, run_of

from locret.backbone import Backbone
from locret.cli.loading import load_backbone
from locret.errors import BackboneError, ConfigError
from locret.heads import RetainingHeads
from locret.train import TrainConfig, train


def test_further_keywords_reach_from_pretrained(tiny_folder):
    backbone = Backbone.load(tiny_folder("llama"), device="cpu", options={"attn_implementation": "eager"})
    assert backbone.model.config._attn_implementation == "eager"


def test_a_missing_quantiser_is_a_clear_error(tiny_folder, monkeypatch):
    def absent(*args, **options):
        raise ImportError("needs the package gptqmodel\nand more")

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", absent)
    with pytest.raises(BackboneError, match=r"cannot load a model from .*: needs the package gptqmodel;"):
        Backbone.load(tiny_folder("llama"), device="cpu", options={"quantization_config": {}})


def test_an_int8_backbone_trains_heads(tiny_folder, tmp_path):
    """torchao's weight-only int8 on a CPU: weights stay int8, labels are near those of the plain model."""
    quantization = pytest.importorskip("torchao.quantization")
    folder = tiny_folder("llama", **TINY)
    config = tf.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    backbone = Backbone.load(folder, device="cpu", options={"quantization_config": config})
    weight = backbone.model.model.layers[0].self_attn.q_proj.weight
    assert "Int8" in type(weight).__name__
    result = train(backbone, make_samples(), tmp_path / "int8", TrainConfig(**SMALL))
    plain = train(Backbone.load(folder, device="cpu"), make_samples(), tmp_path / "plain", TrainConfig(**SMALL))
    assert result.loss == pytest.approx(plain.loss, rel=0.05)
    assert result.loss != plain.loss
    RetainingHeads.from_pretrained(tmp_path / "int8").check(backbone)


@pytest.mark.filterwarnings("ignore")  # the libraries' own, about types
@pytest.mark.parametrize(
    ("package", "name", "weight"),
    [
        ("bitsandbytes", "bnb-4bit", "Params4bit"),
        ("bitsandbytes", "bnb-8bit", "Int8Params"),
        ("optimum.quanto", "quanto-int4", "WeightQBits"),
    ],
)
def test_a_four_or_eight_bit_backbone_trains_heads(package, name, weight, tiny_folder, tmp_path):
    """As `--quantize` loads it: weights are packed, head inputs and labels are near those of the plain model."""
    pytest.importorskip(package)
    pytest.importorskip("accelerate")
    shape = {**TINY, "hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
    folder = str(tiny_folder("llama", **shape))
    backbone = load_backbone({"model": folder, "device": "cpu", "quantize": name})
    assert weight in type(backbone.model.model.layers[0].self_attn.q_proj.weight).__name__
    result = train(backbone, make_samples(), tmp_path / "packed", TrainConfig(**SMALL))
    plain = train(load_backbone({"model": folder, "device": "cpu"}), make_samples(), tmp_path / "plain",
                  TrainConfig(**SMALL))  # fmt: skip
    assert result.loss == pytest.approx(plain.loss, rel=0.1)
    assert result.loss != plain.loss
    RetainingHeads.from_pretrained(tmp_path / "packed").check(backbone)


def test_a_device_map_goes_through(tiny_folder, tmp_path):
    pytest.importorskip("accelerate")
    backbone = Backbone.load(tiny_folder("llama", **TINY), device="cpu", options={"device_map": {"": "cpu"}})
    assert math.isfinite(train(backbone, make_samples(), tmp_path, TrainConfig(**SMALL)).loss)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_a_merged_adapter_is_an_ordinary_backbone(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build_tiny_model("llama", **TINY), config).merge_and_unload()
    merged = Backbone(model, build_byte_tokenizer())
    base = make_backbone()
    assert not torch.equal(
        merged.model.model.layers[0].self_attn.q_proj.weight, base.model.model.layers[0].self_attn.q_proj.weight
    )
    result = train(merged, make_samples(), tmp_path, TrainConfig(**SMALL))
    result.heads.check(base)


def test_heads_live_with_their_layers(tmp_path, monkeypatch):
    """The device of each layer is asked for by layer; what needs the cache on one device says so."""
    backbone = make_backbone()
    asked = []
    monkeypatch.setattr(backbone, "layer_device", lambda i: asked.append(i) or torch.device("cpu"))
    run_of(backbone, make_samples(1), tmp_path / "a")
    assert {0, 1} <= set(asked)
    devices = [torch.device("cpu"), torch.device("meta")]
    monkeypatch.setattr(backbone, "layer_device", lambda i: devices[i])
    run = run_of(backbone, make_samples(1), tmp_path / "b")
    assert [head.fc1.weight.device for head in run.heads.layers] == devices
    with pytest.raises(ConfigError, match="lies on one device, but the layers lie on cpu, meta"):
        run_of(backbone, make_samples(1), tmp_path / "c", evict_budget=64)


@pytest.mark.gpu
def test_layers_on_two_devices_train_as_on_one(tmp_path):
    """One layer on the CPU, one on the GPU, activations moved as accelerate moves them."""
    model = build_tiny_model("llama", **TINY)
    for module in (model.model.layers[1], model.model.norm, model.lm_head):
        module.cuda()

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.cuda()
        return type(value)(map(move, value)) if type(value) in (tuple, list) else value

    for module in (model.model.layers[1], model.model.norm):
        module.register_forward_pre_hook(
            lambda m, args, kwargs: (move(args), {name: move(value) for name, value in kwargs.items()}),
            with_kwargs=True,
        )
    split = Backbone(model, build_byte_tokenizer())
    assert [split.layer_device(i).type for i in range(2)] == ["cpu", "cuda"]
    results = [
        train(backbone, make_samples(), tmp_path / str(i), TrainConfig(**SMALL))
        for i, backbone in enumerate((split, make_backbone()))
    ]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-3)
    assert [head.fc1.weight.device.type for head in results[0].heads.layers] == ["cpu", "cuda"]
