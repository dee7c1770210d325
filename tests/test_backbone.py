"""The seam: an unmodified model run through locret is the plain model, and what cannot be run faithfully is refused."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import shutil
import types
import weakref

import pytest
import torch
import transformers as tf
from conftest import _BASE, FAMILIES, build_tiny_model
from oracles import Recorder, llm_of, reader_of, relative, tokens
from safetensors.torch import load_file, save_file

from locret.backbone import ATTENTION_NAME, Backbone
from locret.config import POSITIONS
from locret.errors import BackboneError, ConfigError

MOE = {"qwen3-moe", "mixtral"}  # torch's grouped matmul takes no doubles, so these families have no fp64 reference
# fp64 runs differ by fp64 rounding only, except where the *reference* leaves fp64: eager Gemma-2 (the only transformers
# path that has its softcap) computes softmax in float32
FP64 = {"gemma2": 1e-6, "gemma2-window": 1e-6}
# ... and where compact positions re-number a window's units: RoPE depends on distances only, but its tables are rounded
# to fp32 in every transformers model
SHIFTED = {"mistral-window": 5e-6, "gemma3": 5e-6}
FP32 = 1e-5

PROMPT, STEPS = 100, 8


def plain_logits(model, ids, prompt_len):
    """The unmodified model in one pass, [T, V].

    A "dynamic" rotary module chooses new frequencies whenever an input is longer than any before it, so a plain
    model that decodes changes the angles of keys it has cached. Equal terms: chosen once, by the prompt.
    """
    rotary = model.base_model.rotary_emb
    if getattr(rotary, "rope_type", None) == "dynamic":
        model = copy.deepcopy(model)
        rotary = model.base_model.rotary_emb
        rotary(torch.zeros(1, 1, dtype=model.dtype), torch.tensor([[prompt_len - 1]]))
        rotary.forward = types.MethodType(inspect.unwrap(type(rotary).forward), rotary)
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0]


def our_logits(backbone, ids, prompt_len, **options):
    """The last prompt token's logits and those of every decode step, [1 + steps, V]."""
    with torch.inference_mode():
        reader = reader_of(backbone, "knorm", prompt_len, **options)
        rows = [reader.read(ids[:, :prompt_len])]
        rows += [reader.step(ids[:, i]) for i in range(prompt_len, ids.shape[1])]
    return torch.cat(rows)


def check_family(family, dtype, bound):
    model = build_tiny_model(family, dtype=dtype)
    ids = tokens(PROMPT + STEPS)
    want = plain_logits(model, ids, PROMPT)[PROMPT - 1 :]
    backbone = Backbone(model)
    for positions, chunk in zip(POSITIONS, (24, 17)):
        got = our_logits(backbone, ids, PROMPT, budget=300, chunk_size=chunk, positions=positions, local_window=9)
        loosest = max(bound, SHIFTED.get(family, 0.0) if positions == "compact" else 0.0)
        assert relative(got, want) < loosest, (positions, chunk)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_budget_for_all_prefill_and_decode_equal_the_plain_model_fp32(family):
    check_family(family, torch.float32, FP32)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in MOE])
def test_with_budget_for_all_prefill_and_decode_equal_the_plain_model_fp64(family):
    check_family(family, torch.float64, FP64.get(family, 1e-12))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3-longrope", "smollm3", "gemma2-window"])
def test_a_batch_through_the_seam_equals_the_plain_model(family):
    model = build_tiny_model(family, dtype=torch.float64)
    ids = tokens(50, batch=3)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits[:, -1]
    with torch.inference_mode():
        got = reader_of(Backbone(model), "knorm", 50, batch=3, budget=300, chunk_size=16).read(ids)
    assert relative(got, want) < FP64.get(family, 1e-12)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 60])
def test_longrope_factors_are_chosen_once_whatever_the_chunks_are(length):
    """Phi-3 switches its factors at 32 tokens here: chunks of 8 must not read a prompt of 60 with the short ones."""
    model = build_tiny_model("phi3-longrope", dtype=torch.float64)
    ids = tokens(length)
    want = plain_logits(model, ids, length)[-1:]
    for chunk, positions in itertools.product((8, 33), POSITIONS):
        got = our_logits(Backbone(model), ids, length, budget=300, chunk_size=chunk, positions=positions)
        assert relative(got, want) < 1e-12, (chunk, positions)


@pytest.mark.parametrize("family", ["phi3-longrope", "llama-dynamic"])
def test_angles_do_not_change_when_the_table_grows(family):
    """Decoding past the trained length goes on with the prompt's frequencies, so cached keys keep their angles."""
    rope = Backbone(build_tiny_model(family)).rope(21, 20)
    x = torch.randn(1, 1, 20, 8)
    before = rope.rotate(0, x, torch.arange(20))
    rope.grow(500)
    assert rope.length >= 500
    assert torch.equal(rope.rotate(0, x, torch.arange(20)), before)
    fresh = Backbone(build_tiny_model(family)).rope(500, 20)
    x = torch.randn(1, 1, 500, 8)
    assert torch.equal(rope.rotate(0, x, torch.arange(500)), fresh.rotate(0, x, torch.arange(500)))


@pytest.mark.parametrize("family", FAMILIES)
def test_per_head_positions_rotate_as_shared_ones(family):
    backbone = Backbone(build_tiny_model(family))
    rope = backbone.rope(40, 40)
    x = torch.randn(2, backbone.num_kv_heads, 6, backbone.head_dim)
    at = torch.tensor([0, 3, 4, 17, 20, 39])
    for layer in range(backbone.num_layers):
        want = rope.rotate(layer, x, at)
        assert torch.equal(rope.rotate(layer, x, at.expand(2, -1)), want)
        assert torch.equal(rope.rotate(layer, x, at.expand(2, backbone.num_kv_heads, -1)), want)


# ---------------------------------------------------------------------- the model is left as it was


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_unchanged_afterwards(family):
    model = build_tiny_model(family)
    ids = tokens(90)
    name, rotary = model.config._attn_implementation, model.base_model.rotary_emb
    state = {key: value.clone() for key, value in model.state_dict().items()}
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    with torch.no_grad():
        twin = copy.deepcopy(model)  # a "dynamic" module remembers inputs: the reference must not be the first to do it
        before = twin(ids, use_cache=False).logits
    our_logits(Backbone(model), ids, 80, budget=40, chunk_size=16)
    assert model.config._attn_implementation == name
    assert model.base_model.rotary_emb is rotary
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, before)


def test_an_error_inside_a_layer_puts_the_model_back():
    class Broken:
        def attend(self, layer, q, k, v, call):
            raise RuntimeError("broken")

    model = build_tiny_model("llama")
    backbone = Backbone(model)
    name, rotary = model.config._attn_implementation, model.base_model.rotary_emb
    with pytest.raises(RuntimeError, match="broken"), backbone.seam():
        backbone.run(tokens(3), Broken())
    assert model.config._attn_implementation == name
    assert model.base_model.rotary_emb is rotary
    with torch.no_grad():
        model(tokens(3), use_cache=False)


def test_a_refused_model_is_put_back_too():
    model = build_tiny_model("llama")
    model.model.layers[1].self_attn.is_causal = False
    rotary = model.base_model.rotary_emb
    with pytest.raises(BackboneError):
        Backbone(model)
    assert model.config._attn_implementation == "sdpa"
    assert model.base_model.rotary_emb is rotary


def test_our_attention_without_a_context_says_what_happened():
    model = build_tiny_model("llama")
    model.set_attn_implementation(ATTENTION_NAME)
    with pytest.raises(BackboneError, match="without a context"):
        model(tokens(3), use_cache=False)


def test_no_output_matrix_when_no_logits_are_wanted():
    backbone = Backbone(build_tiny_model("llama"))
    backbone.model.lm_head.forward = None  # calling it would fail
    assert backbone.run(tokens(5), Recorder(backbone, 5), logits=0) is None


# ---------------------------------------------------------------------- what reaches the heads


RAW = {  # family -> names of the projections whose outputs, side by side, are [q | k | v]
    "llama": ("q_proj", "k_proj", "v_proj"),
    "mistral": ("q_proj", "k_proj", "v_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj"),  # with biases
    "phi3": ("qkv_proj",),
    "gemma": ("q_proj", "k_proj", "v_proj"),
    "granite": ("q_proj", "k_proj", "v_proj"),
    "glm": ("q_proj", "k_proj", "v_proj"),
    "cohere": ("q_proj", "k_proj", "v_proj"),
    "starcoder2": ("q_proj", "k_proj", "v_proj"),
    "mixtral": ("q_proj", "k_proj", "v_proj"),
    "smollm3": ("q_proj", "k_proj", "v_proj"),
}


@pytest.mark.parametrize("family", RAW)
def test_heads_see_the_raw_projections(family):
    model = build_tiny_model(family)
    backbone = Backbone(model)
    seen = {}
    for i, layer in enumerate(model.model.layers):
        for name in RAW[family]:
            module = getattr(layer.self_attn, name)
            module.register_forward_hook(lambda _, __, out, i=i: seen.setdefault(i, []).append(out))
    record = Recorder(backbone, 11)
    with torch.no_grad():
        backbone.run(tokens(11), record)
    for i in range(backbone.num_layers):
        ours = torch.cat([part[i].transpose(1, 2).flatten(2) for part in (record.q, record.k, record.v)], -1)
        assert torch.equal(ours, torch.cat(seen[i], -1)), i


# ---------------------------------------------------------------------- the probe


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_finds_the_dimensions(family):
    model = build_tiny_model(family)
    backbone = Backbone(model)
    c = model.config
    assert backbone.num_layers == c.num_hidden_layers == len(backbone.layers)
    assert (backbone.num_q_heads, backbone.num_kv_heads) == (c.num_attention_heads, c.num_key_value_heads)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    assert backbone.head_dim == head_dim
    print_ = backbone.fingerprint()
    assert print_["architecture"] == type(model).__name__
    assert print_["hidden_act"] in ("silu", "gelu", "gelu_pytorch_tanh")


def test_layers_without_positions_are_found():
    assert [s.rotated for s in Backbone(build_tiny_model("smollm3")).layers] == [True, True, True, False]
    assert all(s.rotated for s in Backbone(build_tiny_model("llama")).layers)


def test_windows_are_found_and_one_that_never_bites_takes_a_budget():
    windows = {
        "mistral": [None, None],
        "mistral-window": [24, 24],
        "phi3": [None, None],  # names a window of 262,144, as Phi-3-128K does
        "gemma2": [None, None],
        "gemma2-window": [24, None],
        "gemma3": [24, None],
    }
    for family, wanted in windows.items():
        assert [s.window for s in Backbone(build_tiny_model(family)).layers] == wanted, family


def test_one_rotary_table_per_layer_type_is_found():
    backbone = Backbone(build_tiny_model("gemma3"))
    assert [s.rope_type for s in backbone.layers] == ["sliding_attention", "full_attention"]
    rope = backbone.rope(30, 30)
    x = torch.randn(1, 1, 30, 16)
    assert not torch.allclose(*(rope.rotate(i, x, torch.arange(30)) for i in range(2)))


def test_an_unknown_rotation_is_refused_and_names_the_layer():
    model = build_tiny_model("llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def backwards(hidden_states, position_embeddings, **kwargs):
        cos, sin = position_embeddings
        return forward(hidden_states, position_embeddings=(cos, -sin), **kwargs)

    attention.forward = backwards
    with pytest.raises(BackboneError, match="layer 1 of LlamaForCausalLM rotates"):
        Backbone(model)


def test_only_keys_rotated_differently_is_refused_too():
    model = build_tiny_model("llama")
    attention = model.model.layers[0].self_attn

    def scaled(module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        kwargs["position_embeddings"] = (cos, sin * 1.1)
        return args, kwargs

    attention.register_forward_pre_hook(scaled, with_kwargs=True)
    with pytest.raises(BackboneError, match="layer 0"):
        Backbone(model)


def test_a_non_causal_layer_is_refused_by_number():
    model = build_tiny_model("qwen2")
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(BackboneError, match="layer 1 is not causal"):
        Backbone(model)


def test_a_model_without_a_rotary_module_is_refused():
    config = tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    with pytest.raises(BackboneError, match="GPT2LMHeadModel has no rotary module"):
        Backbone(tf.GPT2LMHeadModel(config).eval())


def test_an_unknown_layer_type_is_refused_by_number():
    model = build_tiny_model("llama")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(BackboneError, match="layer 1 is of type 'chunked_attention'; locret knows full_attention"):
        Backbone(model)


def test_a_window_layer_that_names_no_window_is_refused():
    model = build_tiny_model("llama")
    model.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(BackboneError, match="layer 0 is a sliding-window layer"):
        Backbone(model)


def _build(config_name, **extra):
    names = set(inspect.signature(getattr(tf, config_name).__init__).parameters)
    options = {**_BASE, **extra}
    config = getattr(tf, config_name)(**{k: v for k, v in options.items() if k in names or k in extra})
    return tf.AutoModelForCausalLM.from_config(config).eval()


def test_attention_sinks_learned_by_the_model_are_refused():
    model = _build("GptOssConfig", head_dim=16, num_local_experts=2, num_experts_per_tok=1, hidden_size=64)
    with pytest.raises(BackboneError, match="s_aux"):
        Backbone(model)


def test_latent_attention_with_other_value_sizes_is_refused_by_number():
    model = _build(
        "DeepseekV3Config", hidden_size=64, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=12, n_routed_experts=4, num_experts_per_tok=1, first_k_dense_replace=9, num_key_value_heads=8,
        intermediate_size=32, n_group=1, topk_group=1,
    )  # fmt: skip
    with pytest.raises(BackboneError, match=r"layer 0: q .* differ in head dim"):
        Backbone(model)


def test_a_model_with_layers_of_another_kind_is_refused():
    model = build_tiny_model("llama")

    class Elsewhere(torch.nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    model.model.layers[1].self_attn = Elsewhere()
    with pytest.raises(BackboneError, match="1 of 2 layers use plain attention"):
        Backbone(model)


def test_layers_of_different_shapes_are_refused_with_the_shapes():
    model = build_tiny_model("llama")
    layer = build_tiny_model("llama", num_key_value_heads=4).model.layers[1]
    layer.self_attn.config = model.config
    model.model.layers[1].self_attn = layer.self_attn
    with pytest.raises(BackboneError, match=r"layers differ .*\(8, 2, 8\), \(8, 4, 8\)"):
        Backbone(model)


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_cuda_with_budget_for_all_logits_equal_the_plain_model(family):
    model = build_tiny_model(family).cuda()
    ids = tokens(PROMPT + STEPS).cuda()
    want = plain_logits(copy.deepcopy(model).cpu(), ids.cpu(), PROMPT)[PROMPT - 1 :].cuda()
    for positions in POSITIONS:
        got = our_logits(Backbone(model), ids, PROMPT, budget=300, chunk_size=24, positions=positions)
        assert relative(got, want) < 1e-3, positions  # another device sums in another order, MoE routers amplify it


@pytest.mark.gpu
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in MOE])
def test_on_cuda_bf16_logits_are_as_near_as_the_plain_models(family):
    """bf16 has no exact answer: we may be no worse than twice the distance of transformers' own bf16 run from fp32."""
    model = build_tiny_model(family, head_dim=16) if family == "llama" else build_tiny_model(family)
    ids = tokens(PROMPT)
    want = plain_logits(model, ids, PROMPT)[-1:]
    half = copy.deepcopy(model).to("cuda", torch.bfloat16)
    theirs = plain_logits(half, ids.cuda(), PROMPT)[-1:].float().cpu()
    ours = our_logits(Backbone(half), ids.cuda(), PROMPT, budget=300, chunk_size=24).float().cpu()
    assert relative(ours, want) < 2 * relative(theirs, want) + 0.02


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_hidden_states_reach_a_context_that_wants_them(family):
    """What the projections read: passing it through the module's own k_proj gives the keys that arrive."""
    backbone = Backbone(build_tiny_model(family))
    seen = {}

    class Look:
        wants_hidden = True

        def attend(self, layer, q, k, v, call):
            seen[layer] = (v, call.hidden)
            return torch.zeros_like(q)

    backbone.run(torch.arange(6)[None] + 5, Look(), logits=0)
    for layer, (v, hidden) in seen.items():
        projected = backbone.attention_modules[layer].v_proj(hidden)
        torch.testing.assert_close(projected, v.transpose(1, 2).flatten(2))
    Look.wants_hidden = False
    backbone.run(torch.arange(6)[None] + 5, Look(), logits=0)
    assert all(hidden is None for _, hidden in seen.values())


def test_rotation_tables_are_shared_while_somebody_has_them():
    backbone = Backbone(build_tiny_model("llama"))
    with torch.inference_mode():
        rope = backbone.rope(10, 100)
    assert backbone.rope(30, 100) is rope
    assert rope.length >= 30
    assert backbone.rope(10, 200) is not rope  # a family may choose its frequencies by it
    assert not any(table.is_inference() for tables in rope._tables.values() for table in tables)
    gone = weakref.ref(rope)
    del rope
    assert gone() is None


def test_a_dtype_may_be_torchs_own():
    assert Backbone.load(dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"unknown dtype 'int8'; valid: auto, bfloat16, float16, float32, float64"):
        Backbone.load(dtype=torch.int8)


def test_streams_that_overlap_leave_the_model_as_it_was():
    """Whoever came first left first, and put the model back under the others' feet."""
    llm = llm_of(build_tiny_model("llama"), "knorm", budget=40, chunk_size=16)
    prompts = [list(range(5 + i, 35 + i)) for i in range(3)]
    want = [llm.generate(prompt, max_new_tokens=8).tokens for prompt in prompts]
    for order in ((0, 1, 2), (2, 0, 1)):
        streams = [llm.stream(prompt, max_new_tokens=8) for prompt in prompts]
        for stream in streams:
            next(stream, None)
        for i in order:
            list(streams[i])
            assert streams[i].output.tokens == want[i]
        assert llm.backbone.model.config._attn_implementation != "locret"
        assert llm.generate(prompts[0], max_new_tokens=8).tokens == want[0]


def drop(tensors, config):
    del tensors["model.layers.1.self_attn.v_proj.weight"]


def fewer_layers(tensors, config):
    config.update(num_hidden_layers=1)


def more_layers(tensors, config):
    config.update(num_hidden_layers=3)


def narrower(tensors, config):
    config.update(intermediate_size=config["intermediate_size"] - 8)


def with_bias(tensors, config):
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)


def with_others(tensors, config):
    """What transformers ignores, and what is of no layer of ours."""
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    for name in ("score.weight", "vision.layers.0.self_attn.q_proj.weight"):
        tensors[name] = torch.ones(2, 2)


@pytest.fixture
def changed_folder(tiny_folder, tmp_path):
    """A model folder after `change(tensors, config)`."""

    def make(change):
        folder = shutil.copytree(tiny_folder("llama"), tmp_path / "changed")
        tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        change(tensors, config)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize(("change", "message"), [
    (drop, r"1 missing, so they would be random: model\.layers\.1\.self_attn\.v_proj\.weight\. Download"),
    (more_layers, r"9 missing, .*: model\.layers\.2\.input_layernorm\.weight, .* \.\.\."),
    (fewer_layers, r"9 of layers or biases that config.json does not have: model\.layers\.1\."),
    (narrower, r"6 of another shape: model\.layers\.0\.mlp\.down_proj\.weight \(\[\d+, \d+\] in the file, \["),
    (with_bias, r"1 of layers or biases that config.json does not have: model\.layers\.0\.self_attn\.q_proj\.bias"),
])  # fmt: skip
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(change, message, changed_folder):
    """transformers warns and goes on with random weights, or without the layers."""
    with pytest.raises(BackboneError, match=message):
        Backbone.load(changed_folder(change), device="cpu")


def test_tensors_of_other_models_beside_the_weights_are_no_trouble(changed_folder):
    assert Backbone.load(changed_folder(with_others), device="cpu").num_layers == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_of_any_family_loads(family, tiny_folder):
    """Tied weights and experts in one piece lie in the file in another way than in the model."""
    Backbone.load(tiny_folder(family), device="cpu")


def test_a_device_that_is_none_is_refused_by_name(monkeypatch):
    for name in ("foo", "cuda:x", None):
        with pytest.raises(ConfigError, match=rf"device '{name}' is not known; use auto, cpu, cuda or cuda:N"):
            Backbone.load(device=name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="device 'cuda:2': this machine's GPUs are cuda:0 to cuda:1"):
        Backbone.load(device="cuda:2")
