"""Labels: streamed in blocks = the naive definition in float64, for any block size."""

from __future__ import annotations

import pytest
import torch

from locret.errors import ConfigError, DataError
from locret.labels import LABELS, attention_labels, importance_labels


def naive(q: torch.Tensor, k: torch.Tensor, prompt_len: int, scale: float) -> torch.Tensor:
    """S[k]_j = max over answer p and over the query heads of group j of scale * q_p . k, by loops, float64."""
    batch, num_q, length, _ = q.shape
    num_kv = k.shape[1]
    out = torch.full((batch, num_kv, prompt_len), float("-inf"), dtype=torch.float64)
    for b in range(batch):
        for head in range(num_q):
            for p in range(prompt_len, length):
                logits = scale * (k[b, head * num_kv // num_q, :prompt_len].double() @ q[b, head, p].double())
                row = out[b, head * num_kv // num_q]
                torch.maximum(row, logits, out=row)
    return out


def random_qk(batch=2, num_q=4, num_kv=2, length=37, dim=8, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, h, length, dim, generator=g).to(dtype) for h in (num_q, num_kv))


@pytest.mark.parametrize("block_elements", [1, 8, 61, 1000, 1 << 24])
@pytest.mark.parametrize(("num_q", "num_kv"), [(4, 2), (4, 4), (6, 1)])
def test_streamed_labels_equal_the_naive_definition(block_elements, num_q, num_kv):
    q, k = random_qk(num_q=num_q, num_kv=num_kv)
    got = importance_labels(q, k, 23, 0.37, block_elements=block_elements)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), naive(q, k, 23, 0.37), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompt_len", [1, 20, 36])
def test_one_prompt_token_or_one_answer_token_is_enough(prompt_len):
    q, k = random_qk()
    got = importance_labels(q, k, prompt_len, 1.0, block_elements=7)
    assert got.shape == (2, 2, prompt_len)
    torch.testing.assert_close(got.double(), naive(q, k, prompt_len, 1.0), atol=1e-5, rtol=1e-5)


def test_scale_defaults_to_the_inverse_root_of_the_head_dim():
    q, k = random_qk(dim=16)
    torch.testing.assert_close(importance_labels(q, k, 20), importance_labels(q, k, 20, 0.25))


def test_softcap_bounds_the_largest_logit():
    q, k = random_qk()
    want = 3.0 * torch.tanh(naive(q, k, 20, 1.0) / 3.0)
    torch.testing.assert_close(importance_labels(q, k, 20, 1.0, softcap=3.0).double(), want, atol=1e-5, rtol=1e-5)


def test_bf16_inputs_are_multiplied_in_fp32():
    q, k = random_qk(dtype=torch.bfloat16, dim=64)
    torch.testing.assert_close(importance_labels(q, k, 20, 1.0).double(), naive(q, k, 20, 1.0), atol=1e-4, rtol=1e-5)


def test_no_block_is_larger_than_asked(monkeypatch):
    """The attention matrix of the whole prompt never exists: 400 x 600 logits, blocks of at most 4096."""
    sizes = []
    amax = torch.Tensor.amax
    monkeypatch.setattr(torch.Tensor, "amax", lambda self, **kw: sizes.append(self.numel()) or amax(self, **kw))
    q, k = random_qk(batch=1, length=1000)
    importance_labels(q, k, 600, 1.0, block_elements=4096)
    assert max(sizes) <= 4096
    assert sum(sizes) == 4 * 400 * 600  # every (answer row of a query head, prompt key) once


@pytest.mark.parametrize("prompt_len", [0, 37, 40, -1])
def test_no_prompt_or_no_answer_is_an_error(prompt_len):
    q, k = random_qk()
    with pytest.raises(DataError, match="labels need 1 to 36"):
        importance_labels(q, k, prompt_len, 1.0)


# ---------------------------------------------------------------------- other labels, several answers


def naive_attention(kind, q, k, v, answers, scale, softcap=None) -> torch.Tensor:
    """One prompt unit at a time, whole rows of softmax, float64: the definitions in labels.py, read literally."""
    (batch, num_q, _, _), num_kv = q.shape, k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    out = torch.full((batch, num_kv, answers[-1][0]), float("-inf"), dtype=torch.float64)
    for b in range(batch):
        for j in range(num_kv):
            for start, stop in answers:
                rows = []  # per answer token and query head: (logits, n_p a) over the answer's prompt
                for p in range(start, stop):
                    for head in range(j * num_q // num_kv, (j + 1) * num_q // num_kv):
                        z = scale * (k[b, j, : p + 1] @ q[b, head, p])
                        z = z if softcap is None else softcap * torch.tanh(z / softcap)
                        rows.append((z[:start], (p + 1) * z.softmax(0)[:start]))
                z, a = (torch.stack(part) for part in zip(*rows))
                label = {
                    "max-logit": lambda: z.max(0).values,  # noqa: B023
                    "log-mass": lambda: a.mean(0).log(),  # noqa: B023
                    "log-value": lambda: (a.max(0).values * v[b, j, :start].norm(dim=-1)).log(),  # noqa: B023
                }[kind]()
                out[b, j, :start] = torch.maximum(out[b, j, :start], label)
    return out


@pytest.mark.parametrize("block_elements", [1, 61, 1 << 24])
@pytest.mark.parametrize("answers", [[(23, 37)], [(5, 9), (9, 12), (30, 33)], [(1, 2), (36, 37)]])
@pytest.mark.parametrize("kind", LABELS)
def test_every_label_of_every_answer_equals_its_definition(kind, answers, block_elements):
    q, k = random_qk()
    v = random_qk(seed=3)
    v = next(v)[:, :2]
    got = attention_labels(kind, q, k, v, answers, 0.37, block_elements=block_elements)
    assert got.dtype == torch.float32
    want = naive_attention(kind, q, k, v, answers, 0.37)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", LABELS)
def test_a_softcap_is_part_of_every_label(kind):
    q, k = random_qk(num_q=6, num_kv=2)
    v = k + 1
    want = naive_attention(kind, q, k, v, [(20, 30)], 1.0, 3.0)
    got = attention_labels(kind, q, k, v, [(20, 30)], 1.0, softcap=3.0, block_elements=50)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)


def test_uniform_attention_is_zero_log_mass_at_any_length():
    """Worked by hand: with zero queries every unit gets a = 1 / n_p, so n_p a = 1 and its log is 0."""
    for length in (5, 50):
        q, k = torch.zeros(1, 2, length, 8), torch.randn(1, 1, length, 8)
        got = attention_labels("log-mass", q, k, k, [(length - 2, length)], 1.0)
        torch.testing.assert_close(got, torch.zeros(1, 1, length - 2), atol=1e-6, rtol=0)


def test_a_value_of_zero_has_a_finite_label():
    q, k = random_qk()
    assert torch.isfinite(attention_labels("log-value", q, k, torch.zeros_like(k), [(20, 30)], 1.0)).all()


def test_one_answer_is_the_published_label_bit_for_bit():
    q, k = random_qk()
    got = attention_labels("max-logit", q, k, k, [(23, 37)], 0.37)
    assert torch.equal(got, importance_labels(q, k, 23, 0.37))


def test_an_unknown_label_is_named():
    q, k = random_qk()
    with pytest.raises(ConfigError, match=r"unknown label 'log-mas'.*did you mean 'log-mass'"):
        attention_labels("log-mas", q, k, k, [(20, 30)], 1.0)
