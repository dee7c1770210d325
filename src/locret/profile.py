"""Which heads fetch things from far back: profiles for budgets that differ between heads.

* Retrieval heads (arXiv:2404.15574): a head that, where the model is about to say a token of a planted sentence, looks
  at that very token in the text, has copied it. Score: copied tokens over the sentence's tokens, mean over samples.
* Echo and induction heads (RazorAttention, arXiv:2407.15891): random tokens repeated several times; how much a token
  attends to its earlier copies (echo) and to what came behind them (induction).

Both run on the project's seam, one forward pass a text, at original positions with a full cache; attention rows are
computed in blocks and never kept. The published retrieval score decodes; here the sentence is the given continuation,
and the model's own choice at each of its positions is what counts as said: the same where the model is right. Samples
where it mostly is not are left out, as published.

Shapes: L layers, Hq/Hkv query/KV heads, n tokens, r rows.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from locret.backbone import AttentionCall, Backbone
from locret.errors import DataError
from locret.files import write_text
from locret.kernels.attention import prefix_causal_attention

_ROWS = 256  # attention rows at once: [Hq, 256, n] numbers


@dataclass(frozen=True)
class HeadProfile:
    """A number per query head of every layer, and the model that it was measured on.

    Attributes:
        kind: "retrieval", "echo" or "induction".
        scores: L lists of Hq numbers in 0 .. 1.
        backbone: `Backbone.fingerprint()`.
        samples: how many texts counted.
    """

    kind: str
    scores: list[list[float]]
    backbone: dict[str, Any]
    samples: int

    def per_kv_head(self) -> Tensor:
        """[L, Hkv]: of the query heads that share a KV head the highest."""
        scores = torch.tensor(self.scores)
        return scores.unflatten(1, (self.backbone["num_kv_heads"], -1)).amax(-1)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, in one atomic rename."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> HeadProfile:
        """Read what `save` wrote. Raises: DataError: no such file, other keys, or scores that do not fit its model."""
        try:
            profile = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
            shape = torch.tensor(profile.scores).shape
            wanted = (profile.backbone["num_layers"], profile.backbone["num_q_heads"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is no head profile: {type(error).__name__}: {error}") from error
        if shape != wanted:
            raise DataError(
                f"{path}: scores are {list(shape)}, but its model has {list(wanted)} layers and query heads"
            )
        return profile


class Needle(NamedTuple):
    """A text with a planted sentence, then a question and the sentence again as the answer."""

    ids: Tensor  # all tokens, [n]
    start: int  # the planted sentence: ids[start:stop]
    stop: int
    answer: int  # the answer: ids[answer:]


def retrieval_profile(backbone: Backbone, samples: Iterable[Needle], *, recall: float = 0.5) -> HeadProfile:
    """Retrieval score of every query head (arXiv:2404.15574); heads of at least 0.1 are retrieval heads there.

    Args:
        recall: samples count where the model's choices hold more than this share of the sentence's tokens.
    Raises: DataError: spans that do not lie in their text, or no sample that the model answers.
    """
    total = torch.zeros(backbone.num_layers, backbone.num_q_heads)
    counted = 0
    for sample in samples:
        _check_needle(sample)
        first, n = sample.answer - 1, len(sample.ids)  # rows first .. n - 2 choose the tokens of the answer
        looked: dict[int, Tensor] = {}

        def look(layer: int, start: int, rows: Tensor, into: dict[int, Tensor] = looked) -> None:
            into[layer] = torch.cat((into[layer], rows.argmax(-1)), -1) if layer in into else rows.argmax(-1)

        logits = _watch(backbone, sample.ids, look, range(first, n - 1), logits=n - first)
        said = logits[:-1].argmax(-1)  # [r]
        needle = sample.ids[sample.start : sample.stop]
        if _recall(said.tolist(), needle.tolist()) <= recall:
            continue
        places = torch.stack([looked[layer] for layer in range(backbone.num_layers)])  # [L, Hq, r]
        total += copied(places, sample.ids.to(said.device), said, sample.start, sample.stop).cpu()
        counted += 1
    if counted == 0:
        raise DataError("the model answers none of these samples, so no head can be seen fetching; "
                        "take shorter texts, another question, or a lower recall")  # fmt: skip
    return HeadProfile("retrieval", (total / counted).tolist(), backbone.fingerprint(), counted)


def copied(places: Tensor, ids: Tensor, said: Tensor, start: int, stop: int) -> Tensor:
    """Share of a planted sentence ids[start:stop] that heads copied: [...] for places [..., r] that they looked at most
    while the model said the tokens `said` [r]. A place counts in the sentence and where it holds the token said."""
    hit = (places >= start) & (places < stop) & (ids[places] == said)
    return (hit.sum(-1) / (stop - start)).clamp(max=1.0)


def repetition_profiles(
    backbone: Backbone, *, length: int = 2500, repeats: int = 4, seed: int = 0
) -> tuple[HeadProfile, HeadProfile]:
    """Echo and induction scores of every query head (arXiv:2407.15891), on `length` random tokens said `repeats` times.

    A score is the attention mass on all earlier copies (or on the tokens behind them), mean over the tokens from the
    second time on: 1 for a head that does nothing else. The model's BOS token comes first where it has one.
    """
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(int(backbone.model.config.vocab_size), (length,), generator=generator)
    bos = backbone.model.config.bos_token_id
    start = 0 if bos is None else 1
    ids = torch.cat((torch.full((start,), bos or 0), once.repeat(repeats)))
    sums = torch.zeros(2, backbone.num_layers, backbone.num_q_heads, device=backbone.device)

    def look(layer: int, first: int, rows: Tensor) -> None:
        sums[:, layer] += repetition_mass(rows, first, length, start)

    watched = range(start + length, len(ids))
    _watch(backbone, ids, look, watched)
    echo, induction = (sums / len(watched)).tolist()
    made = backbone.fingerprint()
    return HeadProfile("echo", echo, made, 1), HeadProfile("induction", induction, made, 1)


def repetition_mass(rows: Tensor, first: int, length: int, start: int) -> Tensor:
    """Summed attention of rows [Hq, r, n], of queries first, first + 1, ..., on copies and on what follows them.

    Args:   length: of what is repeated;  start: where it begins.
    Returns: [2, Hq].
    """
    at = torch.arange(first, first + rows.shape[1], device=rows.device)[:, None]
    key = torch.arange(rows.shape[2], device=rows.device)
    back = at - key  # a copy is k * length back, k >= 1; the token behind it one less
    echo = (back > 0) & (back % length == 0) & (key >= start)
    induction = (back >= 0) & ((back + 1) % length == 0) & (key > start)
    return torch.stack([(rows * mask).sum((1, 2)) for mask in (echo, induction)])


def retrieval_heads(
    echo: Tensor, induction: Tensor, *, echo_share: float = 0.01, induction_share: float = 0.14
) -> Tensor:
    """RazorAttention's heads that keep everything: the top shares by either score, over all layers.

    Args: echo, induction: [L, Hkv] (`HeadProfile.per_kv_head`). Shares are rounded up to whole heads.
    Returns: bool [L, Hkv].
    """
    chosen = torch.zeros(echo.numel(), dtype=torch.bool)
    for scores, share in ((echo, echo_share), (induction, induction_share)):
        count = math.ceil(share * scores.numel() - 1e-9)  # 0.14 * 100 is a little more than 14
        chosen[scores.flatten().topk(count).indices] = True
    return chosen.view_as(echo)


def _check_needle(sample: Needle) -> None:
    if not 0 <= sample.start < sample.stop <= sample.answer < len(sample.ids):
        raise DataError(f"a needle at {sample.start} .. {sample.stop} with an answer from {sample.answer} on in a text "
                        f"of {len(sample.ids)} tokens; wanted 0 <= start < stop <= answer < length")  # fmt: skip


def _recall(said: list[int], wanted: list[int]) -> float:
    """ROUGE-1 recall on token ids."""
    return sum((Counter(said) & Counter(wanted)).values()) / len(wanted)


Look = Callable[[int, int, Tensor], None]


@torch.no_grad()
def _watch(backbone: Backbone, ids: Tensor, look: Look, rows: range, *, logits: int = 1) -> Tensor:
    """One full-cache pass over ids [n]; `look` is called with (layer, first row, attention [Hq, r, n]), block by block.

    Returns: the logits of the last tokens, [logits, V].
    """
    rope = backbone.rope(len(ids), len(ids))
    at = torch.arange(len(ids), device=backbone.device)

    class Context:
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
            q, k = rope.rotate(layer, q, at), rope.rotate(layer, k, at)
            for first in range(rows.start, rows.stop, _ROWS):
                last = min(first + _ROWS, rows.stop)
                look(layer, first, attention_rows(q[0, :, first:last], k[0], first, call))
            return prefix_causal_attention(q, k, v, scale=call.scale, softcap=call.softcap, window=call.window)

    out = backbone.run(ids[None].to(backbone.device), Context(), logits=logits)
    assert out is not None
    return out[0]


def attention_rows(q: Tensor, k: Tensor, first: int, call: AttentionCall) -> Tensor:
    """Attention of queries first, first + 1, ... over the keys 0 .. n - 1 of one sequence.

    Args:    q: rotated [Hq, r, D];  k: rotated [Hkv, n, D].
    Returns: fp32 [Hq, r, n].
    """
    logits = q.float() @ k.float().repeat_interleave(q.shape[0] // k.shape[0], 0).mT * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    back = torch.arange(first, first + q.shape[1], device=q.device)[:, None] - torch.arange(k.shape[1], device=q.device)
    seen = back >= 0 if call.window is None else (back >= 0) & (back < call.window)
    return logits.masked_fill(~seen, float("-inf")).softmax(-1)
