"""Tiny random models of many families and a byte tokenizer: no downloads, milliseconds to build.

`tiny_model(family)` builds an unmodified transformers model with random weights, biases and norms, so that a seam
that drops one of them gives other logits. `tiny_tokenizer` maps every byte to one token and has a chat template.
`tiny_folder(family)` saves both, as `locret.load(folder)` wants them.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIALS = ["<pad>", "<bos>", "<end>", "<|system|>", "<|user|>", "<|assistant|>", "<|a|>", "<|b|>"]
VOCAB_SIZE = 256 + len(SPECIALS)  # 264

# `{% generation %}` marks what the assistant says: answer spans come from the template, not from guessing.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}<end>{% endgeneration %}{% else %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_BASE: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.25,
    attn_implementation="sdpa",
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1e4, **options}


# family -> (config class, what differs from _BASE)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        dict(
            rope_parameters=_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            )
        ),
    ),
    "llama-plain": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", dict(sliding_window=None)),
    "mistral-window": ("MistralConfig", dict(sliding_window=24)),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", dict(head_dim=16)),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    ),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4, sliding_window=None)),
    "phi3": ("Phi3Config", dict(num_key_value_heads=8, sliding_window=262144)),
    "phi3-longrope": (
        "Phi3Config",
        dict(
            original_max_position_embeddings=32,
            sliding_window=None,
            rope_parameters=_rope(
                "longrope",
                short_factor=[1.0] * 3,
                long_factor=[1.0, 4.0, 16.0],
                original_max_position_embeddings=32,
                partial_rotary_factor=0.75,
            ),
        ),
    ),
    "gemma": ("GemmaConfig", dict(head_dim=16)),
    # softcap on; the window reaches past every test prompt / cuts into it
    "gemma2": (
        "Gemma2Config",
        dict(head_dim=16, sliding_window=4096, attn_logit_softcapping=20.0, query_pre_attn_scalar=16),
    ),
    "gemma2-window": (
        "Gemma2Config",
        dict(head_dim=16, sliding_window=24, attn_logit_softcapping=20.0, query_pre_attn_scalar=16),
    ),
    # two rotary tables, one per layer type; the local layer also has a window
    "gemma3": (
        "Gemma3TextConfig",
        dict(
            head_dim=16,
            sliding_window=24,
            query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        ),
    ),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", dict(attention_multiplier=0.2)),
    "glm": ("GlmConfig", dict(head_dim=16)),  # interleaved, partial RoPE
    "cohere": ("CohereConfig", {}),  # interleaved RoPE, parallel block
    "starcoder2": ("Starcoder2Config", dict(sliding_window=None)),
    "smollm3": ("SmolLM3Config", dict(num_hidden_layers=4)),  # the fourth layer has no RoPE
    "yarn": (
        "Qwen3Config",
        dict(
            head_dim=16,
            rope_parameters=_rope("yarn", factor=8.0, original_max_position_embeddings=64),
        ),
    ),
    "llama-dynamic": (
        "LlamaConfig",
        dict(max_position_embeddings=48, rope_parameters=_rope("dynamic", factor=4.0)),
    ),
}

FAMILIES = list(_FAMILIES)


def build_tiny_model(
    family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A random model of `family`; `overrides` are config fields. Global random state is left as it was."""
    config_class, extra = _FAMILIES[family]
    options = {**_BASE, **extra, **overrides}
    if family.startswith("gemma2"):  # transformers' sdpa path ignores the softcap: the reference must be eager
        options["attn_implementation"] = "eager"
    config = getattr(tf, config_class)(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
        with torch.no_grad():  # biases and norms start at 0 or 1: make them matter
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.requires_grad_(False)


def build_byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Ids 0..7 are SPECIALS, 8.. the 256 bytes: any text round-trips, one token per UTF-8 byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate(SPECIALS + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<end>",
        additional_special_tokens=SPECIALS[3:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model("qwen3", dtype=torch.float64, num_hidden_layers=3)`: a new model at each call."""
    return build_tiny_model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_folder("llama")`: model and tokenizer saved once per family, read-only for tests."""
    folders: dict[tuple[str, str], Path] = {}

    def build(family: str = "llama", **overrides: Any) -> Path:
        key = (family, repr(sorted(overrides.items())))
        if key not in folders:
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            build_tiny_model(family, **overrides).save_pretrained(folder)
            build_byte_tokenizer().save_pretrained(folder)
            folders[key] = folder
        return folders[key]

    return build


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Let stdin be these bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
