"""A Llama as training wants it: the parameters and the mathematics of `LlamaForCausalLM`, in three compiled regions.

Every step has the same number of tokens N, whatever the length of its sequences, so all that is not attention is one
shape: [N, ...]. It is compiled once for all lengths; attention, the only part that sees [B, T], runs between regions:

    enter (embed, norm, qkv, rope) -> attention -> between (o, MLP, next norm, qkv, rope) -> attention -> ... -> leave

Shapes: N = B * T tokens, H hidden, Hq/Hkv query/KV heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model; names and meaning as in transformers' LlamaConfig."""

    vocab_size: int = 8192
    num_layers: int = 8
    hidden_size: int = 384
    num_heads: int = 6
    num_kv_heads: int = 3
    head_dim: int = 64
    intermediate_size: int = 1024
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    init_std: float = 0.02


class Attend(NamedTuple):
    """A layer's weights before attention."""

    norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


class Finish(NamedTuple):
    """A layer's weights after attention."""

    o: Tensor
    norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in fp32; x [N, heads, D], cos and sin [N, 1, D / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attend_inputs(x: Tensor, w: Attend, cos: Tensor, sin: Tensor, head_dim: int, eps: float):
    """x [N, H] -> q [N, Hq, D], k and v [N, Hkv, D]; q and k rotated."""
    h = rms_norm(x, w.norm, eps)
    qkv = F.linear(h, torch.cat([w.q, w.k, w.v]).to(x.dtype)).unflatten(-1, (-1, head_dim))
    num_q, num_kv = w.q.shape[0] // head_dim, w.k.shape[0] // head_dim
    q, k, v = qkv.split([num_q, num_kv, num_kv], dim=1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()


def finish_layer(x: Tensor, attended: Tensor, w: Finish, eps: float) -> Tensor:
    """The residual stream after attention's output projection and the MLP, [N, H]."""
    x = x + F.linear(attended, w.o.to(x.dtype))
    h = rms_norm(x, w.norm, eps)
    gate, up = F.linear(h, torch.cat([w.gate, w.up]).to(x.dtype)).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, w.down.to(x.dtype))


# The three regions. Plain functions of tensors, so that one compilation serves every layer.


def enter(ids: Tensor, embedding: Tensor, w: Attend, cos: Tensor, sin: Tensor, head_dim: int, eps: float, dtype):
    x = F.embedding(ids, embedding).to(dtype)
    return x, *attend_inputs(x, w, cos, sin, head_dim, eps)


def between(x: Tensor, attended: Tensor, done: Finish, w: Attend, cos: Tensor, sin: Tensor, head_dim: int, eps: float):
    x = finish_layer(x, attended, done, eps)
    return x, *attend_inputs(x, w, cos, sin, head_dim, eps)


def leave(x: Tensor, attended: Tensor, done: Finish, norm: Tensor, embedding: Tensor, targets: Tensor, eps: float):
    """Cross-entropy of each token, fp32 [N]; the logits exist in the compute dtype only."""
    x = rms_norm(finish_layer(x, attended, done, eps), norm, eps)
    logits = F.linear(x, embedding.to(x.dtype))
    return F.cross_entropy(logits.float(), targets, reduction="none")


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, d = config.hidden_size, config.head_dim
        self.self_attn = nn.Module()
        self.self_attn.q_proj = nn.Linear(hidden, config.num_heads * d, bias=False)
        self.self_attn.k_proj = nn.Linear(hidden, config.num_kv_heads * d, bias=False)
        self.self_attn.v_proj = nn.Linear(hidden, config.num_kv_heads * d, bias=False)
        self.self_attn.o_proj = nn.Linear(config.num_heads * d, hidden, bias=False)
        self.mlp = nn.Module()
        self.mlp.gate_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.mlp.up_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.mlp.down_proj = nn.Linear(config.intermediate_size, hidden, bias=False)
        self.input_layernorm = nn.RMSNorm(hidden)
        self.post_attention_layernorm = nn.RMSNorm(hidden)

    def before(self) -> Attend:
        a = self.self_attn
        return Attend(self.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight)

    def after(self) -> Finish:
        m = self.mlp
        return Finish(
            self.self_attn.o_proj.weight,
            self.post_attention_layernorm.weight,
            m.gate_proj.weight,
            m.up_proj.weight,
            m.down_proj.weight,
        )


class LeanLlama(nn.Module):
    """The training model: fp32 master weights under transformers' names, computed in `dtype`."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype = torch.bfloat16, attention: str = "cudnn"):
        super().__init__()
        self.config, self.dtype, self.attention = config, dtype, ATTENTION[attention]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size)
        self.enter, self.between, self.leave = enter, between, leave

    def initialise(self, seed: int) -> None:
        """Normal weights; what writes to the residual stream starts small, as in GPT-2. The same on every device."""
        generator = torch.Generator().manual_seed(seed)
        residual = self.config.init_std / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
                continue
            std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else self.config.init_std
            values = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
            with torch.no_grad():
                parameter.copy_(values)

    def compile(self, mode: str | None = None) -> None:
        """Compile the three regions (at their first call); `model.enter is lean.enter` before."""
        for name in ("enter", "between", "leave"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False, fullgraph=True, mode=mode))

    def rope_tables(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of every token of a batch of equally long sequences: fp32, [N, 1, D / 2]."""
        c, device = self.config, self.model.norm.weight.device
        inverse = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)
        angles = torch.outer(torch.arange(length, device=device).float(), inverse).repeat(batch, 1)[:, None, :]
        return angles.cos(), angles.sin()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
        """Causal attention inside each of `batch` sequences; [N, heads, D] -> [N, Hq * D]."""
        q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, T, D]
        with sdpa_kernel(self.attention):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def token_losses(self, ids: Tensor, targets: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of each token of ids [B, T]: fp32 [B * T], through the (compiled) regions."""
        c, layers, embedding = self.config, self.model.layers, self.model.embed_tokens.weight
        options = (c.head_dim, c.rms_norm_eps)
        x, q, k, v = self.enter(ids.flatten(), embedding, layers[0].before(), *rope, *options, self.dtype)
        for layer, following in pairwise(layers):
            attended = self.attend(q, k, v, ids.shape[0])
            x, q, k, v = self.between(x, attended, layer.after(), following.before(), *rope, *options)
        attended = self.attend(q, k, v, ids.shape[0])
        return self.leave(
            x, attended, layers[-1].after(), self.model.norm.weight, embedding, targets.flatten(), c.rms_norm_eps
        )

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """The last hidden states of ids [B, T], [B * T, H]; not compiled: any shape."""
        c, layers = self.config, self.model.layers
        rope = self.rope_tables(*ids.shape)
        x = F.embedding(ids.flatten(), self.model.embed_tokens.weight).to(self.dtype)
        for layer in layers:
            q, k, v = attend_inputs(x, layer.before(), *rope, c.head_dim, c.rms_norm_eps)
            x = finish_layer(x, self.attend(q, k, v, ids.shape[0]), layer.after(), c.rms_norm_eps)
        return rms_norm(x, self.model.norm.weight, c.rms_norm_eps)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits of hidden states, [..., V]."""
        return F.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype)).float()

    def hf_config(self) -> dict:
        """The `LlamaConfig` of the exported model, as keyword arguments."""
        c = self.config
        return dict(
            vocab_size=c.vocab_size,
            num_hidden_layers=c.num_layers,
            hidden_size=c.hidden_size,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            intermediate_size=c.intermediate_size,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            max_position_embeddings=c.max_position_embeddings,
            rms_norm_eps=c.rms_norm_eps,
            initializer_range=c.init_std,
            tie_word_embeddings=True,
            attention_bias=False,
            mlp_bias=False,
            hidden_act="silu",
        )
