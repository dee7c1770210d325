"""What a chunk takes beside weights and cache, counted tensor by tensor, at Llama-3.1-8B's shape.

Half its width in fp32 has as many bytes as the real one in bf16. What Triton, cuDNN and cuBLAS do is put in place of
the CPU's operations as far as memory goes: outputs, and nothing else.
"""

from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_model
from oracles import Meter, reader_of, tokens

from locret.backbone import Backbone
from locret.fused import recognise
from locret.kernels import linear
from locret.kernels.attention import Part
from locret.kernels.linear import Norm, gated, piece, torch_gated

CHUNK, BUDGET = 3072, 16_384
LLAMA = dict(hidden_size=2048, intermediate_size=7168, num_attention_heads=32, num_key_value_heads=8, head_dim=64)
aten = torch.ops.aten
PRODUCTS = {
    aten.linear.default: lambda x, w, bias=None: x.new_zeros(*x.shape[:-1], len(w)),
    aten.mm.default: lambda x, w: x.new_zeros(len(x), w.shape[1]),
    aten.mm.out: lambda x, w, *, out: out,
    aten.addmm.default: lambda y, x, w: y.new_zeros(y.shape),
    aten.addmm_.default: lambda y, x, w: y,
}


class Idle(Meter):
    """Products have outputs and are not computed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return super().__torch_dispatch__(PRODUCTS.get(func, func), types, args, kwargs)


@pytest.fixture
def lean(monkeypatch):
    """Outputs of the right size and content nobody asks for, with the temporaries that kernels have: none."""

    def part(q, k, v, scale, *, causal):
        return Part(torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=torch.float32))

    def merged(own, q, k, v, *, scale):
        return part(q, k, v, scale, causal=False).out if k.shape[2] else own.out

    def turn(self, layer, x, first, out=None, slots=None):
        return torch.zeros_like(x) if out is None else out

    def first_ones(scores, pinned, budget):
        return scores.new_zeros(*scores.shape[:2], budget, dtype=torch.int64)

    stand_ins = {
        "locret.kernels.linear.rms_norm": lambda x, norm: x if norm is None else torch.zeros_like(x),
        "locret.kernels.linear.piece": lambda rows, outputs: piece(rows, 2 * outputs),  # the real width's
        "locret.kernels.attention._part": part,
        "locret.kernels.attention.add_prefix": merged,
        "locret.prefill.add_prefix": merged,
        "locret.backbone.Rope.run": turn,
        "locret.select.kept": first_ones,
        "locret.kernels.compact.reference_compact": lambda columns, keep: None,
    }
    return lambda: [monkeypatch.setattr(name, stand_in) for name, stand_in in stand_ins.items()]


def test_a_chunk_takes_150_megabytes_at_most_beside_weights_and_cache(lean):
    backbone = Backbone(build_tiny_model("llama-plain", **LLAMA))
    backbone.fused = recognise(backbone)
    assert backbone.fused is not None
    lean()
    reader = reader_of(backbone, "locret", None, budget=BUDGET, chunk_size=CHUNK)
    took = []
    with torch.inference_mode():
        chunks = reader.chunks(tokens(8 * CHUNK), more=True)
        for _ in range(7):
            with Idle() as meter:
                next(chunks)
            took.append(meter.peak / 1e6)
    assert max(layer.held for layer in reader.cache.layers) == BUDGET
    assert max(took) < 150, took


def test_the_gate_of_many_rows_goes_a_piece_at_a_time():
    x = torch.randn(CHUNK, 32)
    weights, norm = [torch.randn(500, 32) for _ in range(2)], Norm(torch.ones(32), 1e-6)
    with Meter() as meter:
        gated(x, weights, norm=norm)
    whole = CHUNK * 500 * 4
    assert whole < meter.peak < 1.6 * whole


@pytest.mark.parametrize("rows", [1, 2, 127, 1024, 1025, 1400, 3000, 3072])
@pytest.mark.parametrize("outputs", [7, 14_336 // 8])
def test_pieces_give_what_the_whole_gives(rows, outputs):
    """Every row is written, wherever the last piece ends."""
    g = torch.Generator().manual_seed(rows)
    x, norm = torch.randn(rows, 8, generator=g).double(), Norm(torch.rand(8, generator=g).double(), 1e-6)
    weights = [torch.randn(outputs, 8, generator=g).double() for _ in range(2)]
    n = linear.rms_norm(x, norm)
    want = torch.nn.functional.silu(n @ weights[0].T) * (n @ weights[1].T)
    torch.testing.assert_close(torch_gated(x, weights, norm=norm), want)


def test_pieces_fill_the_multiprocessors():
    assert piece(CHUNK, 14_336) == 896  # 7 x 56 tiles are 2.97 waves; 11 waves in all, as without pieces
    assert piece(CHUNK, 8192) == 1024
