"""What a chunk's queries attend to, reduced to a number per unit: the one place where methods get attention from.

Attention weights of C queries over S units are never all there at once: they are computed for a block of query rows,
reduced, and thrown away. A block takes at most `_ELEMENTS` numbers a sequence however long the prompt is.

Shapes: B batch, C chunk, S units (the last C are the chunk's own), Hq/Hkv heads, G = Hq // Hkv, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_ELEMENTS = 2**22  # of one block of weights, for each sequence of a batch: 16 MiB in fp32
_MOST_ELEMENTS = 2**26  # and of all of them together
_ROWS = 256  # tokens whose logits are read in fp32 at once


@dataclass
class AttentionProbe:
    """A second look at the attention that a layer has just computed: same queries, keys, scale, softcap and bias.

    Attributes:
        scratch_bytes: what the largest block so far took, logits and weights; 0: nothing was asked for. A method that
            makes large temporaries of its own counts them here too (`count_scratch`).
    """

    q: Tensor  # rotated, [B, Hq, C, D]
    keys: Tensor  # rotated, [B, Hkv, S, D]
    scale: float
    softcap: float | None = None
    bias: Tensor | None = None  # added to the logits, [B, Hkv, S]; -inf hides a unit
    scratch_bytes: int = 0

    def count_scratch(self, size: int) -> None:
        """Note temporaries of so many bytes, alive at once; the largest note counts."""
        self.scratch_bytes = max(self.scratch_bytes, size)

    def column_sums(self, last: int | None = None, *, decay: float = 1.0, null: bool = False) -> Tensor:
        """Attention that each unit got from the last `last` queries (None: all), summed, fp32 [B, Hq, S].

        Args:
            decay: a query's weight is decay ** (queries after it).
            null: softmax with one more logit, 0, that belongs to no unit: exp(x) / (1 + sum exp(x)).
        """
        c = self.q.shape[2]
        out: Tensor | None = None
        for start, weights in self.blocks(last, null=null):
            if decay != 1.0:
                row = torch.arange(start, start + weights.shape[-2], device=weights.device)
                weights = weights * (decay ** (c - 1 - row).to(weights.dtype))[:, None]
            part = weights.sum(-2)
            out = part if out is None else out + part
        assert out is not None
        return out.flatten(1, 2).float()

    def column_max(self, last: int | None = None) -> Tensor:
        """The most that one of the last `last` queries gives each unit, fp32 [B, Hq, S]."""
        out: Tensor | None = None
        for _, weights in self.blocks(last):
            part = weights.amax(-2)
            out = part if out is None else torch.maximum(out, part)
        assert out is not None
        return out.flatten(1, 2).float()

    def last_row(self) -> Tensor:
        """Attention of the newest query, fp32 [B, Hq, S]."""
        return self.column_sums(1)

    def log_sum_exp(self) -> Tensor:
        """Of every row's logits, fp32 [B, Hq, C]: weights are exp(logit - log_sum_exp)."""
        parts = [logits.logsumexp(-1) for _, logits in self._logits(None)]
        return torch.cat(parts, -1).flatten(1, 2).float()

    def per_kv_head(self, columns: Tensor) -> Tensor:
        """The mean over the G query heads that share a KV head. [B, Hq, S] -> [B, Hkv, S]."""
        return columns.unflatten(1, (self.keys.shape[1], -1)).mean(2)

    def shared(self, columns: Tensor) -> Tensor:
        """The mean over all query heads, the same for every KV head. [B, Hq, S] -> [B, Hkv, S]."""
        return columns.mean(1, keepdim=True).expand(-1, self.keys.shape[1], -1)

    def blocks(self, last: int | None = None, *, null: bool = False) -> Iterator[tuple[int, Tensor]]:
        """(index of the first query, weights [B, Hkv, G, rows, S]) for the last `last` queries, block by block."""
        for start, logits in self._logits(last):
            if null:
                zero = logits.new_zeros(*logits.shape[:-1], 1)
                yield start, torch.cat((logits, zero), -1).softmax(-1)[..., :-1]
            else:
                yield start, logits.softmax(-1)

    @property
    def _rows(self) -> int:
        b, hq, _, _ = self.q.shape
        return max(1, min(b * _ELEMENTS, _MOST_ELEMENTS) // (b * hq * self.keys.shape[2]))

    def _logits(self, last: int | None) -> Iterator[tuple[int, Tensor]]:
        c, s, hkv = self.q.shape[2], self.keys.shape[2], self.keys.shape[1]
        wide = torch.float64 if self.q.dtype == torch.float64 else torch.float32
        keys = self.keys.to(wide)[:, :, None].mT
        unit = torch.arange(s, device=self.q.device)
        for start in range(0 if last is None else max(0, c - last), c, self._rows):
            stop = min(start + self._rows, c)
            rows = self.q[:, :, start:stop].to(wide).unflatten(1, (hkv, -1))  # [B, Hkv, G, rows, D]
            logits = (rows @ keys).mul_(self.scale)
            self.count_scratch(2 * logits.nbytes)
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            if self.bias is not None:
                logits = logits + self.bias[:, :, None, None].to(wide)
            own = torch.arange(s - c + start, s - c + stop, device=unit.device)[:, None]
            yield start, logits.masked_fill(unit > own, float("-inf"))


def surprisal(logits: Tensor, ids: Tensor, before: Tensor | None) -> Tensor:
    """-log p(token | text before it) in nats, fp32 [B, C].

    Args:
        logits: of the C tokens, [B, C, V].
        ids: int64, [B, C].
        before: logits of the token before the first, [B, V]. Without them the first token has no prediction and takes
            the largest value of the chunk, as in SirLLM's code; alone it takes log V.
    """
    rest = [_nats(logits[:, i : i + _ROWS], ids[:, i + 1 : i + 1 + _ROWS]) for i in range(0, ids.shape[1] - 1, _ROWS)]
    if before is not None:
        first = _nats(before[:, None], ids[:, :1])
    elif rest:
        first = torch.cat(rest, 1).amax(1, keepdim=True)
    else:
        first = torch.full_like(ids, math.log(logits.shape[-1]), dtype=torch.float32)
    return torch.cat((first, *rest), 1)


def _nats(logits: Tensor, ids: Tensor) -> Tensor:
    count = ids.shape[1]
    rows = logits[:, :count].float().flatten(0, 1)
    return functional.cross_entropy(rows, ids.flatten(), reduction="none").view(ids.shape)
