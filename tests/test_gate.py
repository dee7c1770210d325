"""Attention-Gate: gates written out, training that hides what inference evicts, and bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import build_tiny_model
from oracles import kept, reader_of, relative, tokens, write_gates

from locret.backbone import Backbone
from locret.errors import BackboneError, ConfigError, DataError
from locret.gate import Gate, GatedPass, Gates, flags, gated_loss, hidden_attention, train
from locret.methods import get_method


@pytest.fixture(scope="module")
def exact():
    return Backbone(build_tiny_model("llama", dtype=torch.float64))


@pytest.fixture
def file(tmp_path, exact):
    return write_gates(tmp_path / "gates", exact)


def gate_reference(x, gate):
    """Logits [T, Hkv] in float64: one token's attention to all of its chunk after the other, softmax by hand."""
    weight, out, bias = (p.double() for p in (gate.qkv.weight, gate.out.weight, gate.out.bias))
    q, k, v = (x.double() @ part.T for part in weight.chunk(3))
    width = q.shape[1] // gate.heads
    rows = []
    for t in range(len(x)):
        mixed = []
        for h in range(gate.heads):
            own = slice(h * width, (h + 1) * width)
            e = [math.exp(float(q[t, own] @ k[s, own]) / math.sqrt(width)) for s in range(len(x))]
            mixed.append(sum(w / sum(e) * v[s, own] for s, w in enumerate(e)))
        rows.append(out @ torch.cat(mixed) + bias)
    return torch.stack(rows)


def hidden_states(model, ids):
    """What the projections of every layer read, by a hook of the test's own."""
    states, hooks = [], []
    for layer in model.model.layers:
        hooks.append(layer.input_layernorm.register_forward_hook(lambda m, i, out: states.append(out)))
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states


def test_scores_in_the_cache_are_the_gates_of_each_chunk_written_out(exact, file):
    """Three chunks and the local window; every token is judged with its own chunk in view and no other."""
    gates, ids = Gates.load(file), tokens(40)
    reader = reader_of(
        exact, get_method("attention_gate", path=str(file)), 40, budget=64, chunk_size=16, local_window=5
    )
    with torch.inference_mode():
        reader.read(ids)
    states = hidden_states(exact.model, ids)
    for layer in range(2):
        edges = [0, 16, 32, 35, 40]
        want = torch.cat([gate_reference(states[layer][0, a:b], gates[layer]) for a, b in itertools.pairwise(edges)])
        got = reader.cache.layers[layer].units().score[0]
        torch.testing.assert_close(got.T.double(), want, rtol=1e-5, atol=1e-6)


def test_by_hand():
    """Two tokens with hidden states 1 and 0, a gate of one head of width 1 with q = k = ln 2 x, v = x: the first token
    gives itself the weight 2^(ln 2) / (1 + 2^(ln 2)), the second, whose query is 0, one half."""
    gate = Gate(1, 1, heads=1, width=1).double().requires_grad_(False)
    gate.qkv.weight.copy_(torch.tensor([[math.log(2)], [math.log(2)], [1.0]]))
    gate.out.weight.fill_(3.0)
    gate.out.bias.fill_(-1.0)
    own = 2 ** math.log(2) / (1 + 2 ** math.log(2))
    got = gate(torch.tensor([[[1.0], [0.0]]], dtype=torch.float64))
    assert got.flatten().tolist() == pytest.approx([3 * own - 1, 3 / 2 - 1])


def threshold(exact, gates, states, count):
    """Move the biases so that exactly `count` of the prompt's units are flagged in every head."""
    for layer, gate in enumerate(gates):
        logits = gate(states[layer])[0]
        ranked = logits.sort(0, descending=True).values
        gate.out.bias -= (ranked[count - 1] + ranked[count]) / 2


def test_what_training_hides_is_what_inference_evicts(exact, file, tmp_path):
    """U4: hard flags in the trainer's forward pass, and a cache that holds the flagged units and no others."""
    n, count, ids = 36, 14, tokens(60)
    gates = Gates.load(file).double()
    with torch.inference_mode():
        threshold(exact, gates, hidden_states(exact.model, ids[:, :n]), count)
        gates.save(tmp_path / "moved")
        context = GatedPass(exact.rope(60, 60), gates, n)
        want = exact.run(ids, context, logits=60 - n)
        method = get_method("attention_gate", path=str(tmp_path / "moved"))
        reader = reader_of(exact, method, n, budget=count, chunk_size=n, num_sinks=0, num_stabilizers=0, local_window=0,
                           decode_interval=1, positions="original")  # fmt: skip
        reader.read(ids[:, :n])
        assert all(len(head) == count for layer in kept(reader) for head in layer)
        got = reader.follow(ids[:, n:])
    assert relative(got, want) < 1e-10
    plain = exact.model(ids, use_cache=False).logits[:, n:]
    assert relative(want, plain) > 1e-3  # it does hide something


def test_with_everything_flagged_training_sees_the_plain_model(exact, file):
    """U1."""
    gates = Gates.load(file)
    for gate in gates:
        gate.out.bias.fill_(50.0)
    loss, flagged = gated_loss(exact, tokens(50), gates, chunk=16, rate=0.4, weight=0.0)
    logits = exact.model(tokens(50), use_cache=False).logits[0, 16:-1]
    assert flagged == 1
    assert relative(loss, torch.nn.functional.cross_entropy(logits.float(), tokens(50)[0, 17:])) < 1e-6


def test_the_gradient_passes_the_threshold_and_the_rate_term_is_zero_at_the_rate(exact, file):
    p = torch.tensor([0.3, 0.5, 0.7]).logit().requires_grad_()
    found = flags(p)
    assert found.tolist() == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)
    found.sum().backward()
    torch.testing.assert_close(p.grad, torch.tensor([0.21, 0.25, 0.21]))  # of a sigmoid: the flag's gradient is p's
    gates = Gates.load(file)
    with torch.no_grad():
        _, share = gated_loss(exact, tokens(50), gates, chunk=16, rate=0.4, weight=1.0)
        context = GatedPass(exact.rope(50, 50), gates, 16)
        exact.run(tokens(50), context, logits=1)
        assert share.item() == pytest.approx(sum(float(s) for s in context.shares) / 2)
        text, _ = gated_loss(exact, tokens(50), gates, chunk=16, rate=0.4, weight=0.0)
        both, _ = gated_loss(exact, tokens(50), gates, chunk=16, rate=0.4, weight=3.0)
        term = sum(abs(float(s) - 0.4) for s in context.shares) / 2
        assert float(both - text) == pytest.approx(3 * term, abs=1e-5)


def test_a_hidden_unit_has_the_gradient_of_showing_it():
    """Against a finite difference of the attention with a factor that grows from 0."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 4, 8, generator=g, dtype=torch.float64) for h in (2, 1, 1))
    seen = torch.ones(1, 1, 4, 4, dtype=torch.float64).tril()
    seen[..., 3, 1] = 0.0
    seen.requires_grad_()
    hidden_attention(q, k, v, seen, 0.3).sum().backward()
    step = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    step[..., 3, 1] = 1e-6
    with torch.no_grad():
        found = (hidden_attention(q, k, v, seen + step, 0.3) - hidden_attention(q, k, v, seen, 0.3)).sum() / 1e-6
    assert seen.grad[0, 0, 3, 1].item() == pytest.approx(found.item(), rel=1e-4)


def test_training_nears_the_rate_and_touches_the_gates_only():
    model = build_tiny_model("llama")
    backbone = Backbone(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = dict(chunk=24, rate=0.4, weight=4.0, heads=2, width=8, learning_rate=0.03)
    gates, steps = train(backbone, [tokens(80)] * 60, **options)
    assert steps[0][1] > 0.9  # open at the start
    assert abs(steps[-1][1] - 0.4) < 0.5 * abs(steps[0][1] - 0.4)
    assert steps[-1][0] < steps[0][0]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    again, same = train(backbone, [tokens(80)] * 60, **options)
    assert same == steps
    assert all(torch.equal(a, b) for a, b in zip(gates.parameters(), again.parameters(), strict=True))


def test_bad_input_is_refused(exact, file):
    with pytest.raises(ConfigError, match=r"rate is 1\.5; it must lie between 0 and 1"):
        train(exact, [], chunk=8, rate=1.5)
    with pytest.raises(DataError, match=r"a sample of 20 tokens; wanted at least chunk 40 \+ 2"):
        train(exact, [tokens(20)], chunk=40)
    with pytest.raises(BackboneError, match="softcap or a sliding window"):
        train(Backbone(build_tiny_model("gemma2")), [tokens(50)], chunk=20)
    with pytest.raises(ConfigError, match=r"'attention_gate' scores with weights from a file; give path: a file that"):
        get_method("attention_gate")
    deep = Backbone(build_tiny_model("llama", num_hidden_layers=3))
    with pytest.raises(ConfigError, match="made for another model"):
        reader_of(deep, get_method("attention_gate", path=str(file)), 40, budget=32)
