"""Logits to tokens, and tokens to text.

The filters are transformers' own, in the order in which `model.generate` applies them, so that a seed gives the same
tokens here and there. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from locret.config import Sampling
from locret.errors import NumericsError

NO_TOKEN = -1  # in the place of a token: the row's logits are NaN or infinite


class Sampler:
    """Chooses the next token of every row; each row has random numbers of its own, so it draws what it draws alone.

    Attributes:
        plain: the likeliest token, no more: rows of several samplers can be chosen at once.
    """

    def __init__(self, sampling: Sampling, rows: int, device: torch.device) -> None:
        self._greedy = sampling.temperature == 0
        self._filters = LogitsProcessorList()
        if sampling.repetition_penalty != 1.0:
            self._filters.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if not self._greedy:
            if sampling.temperature != 1.0:
                self._filters.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                self._filters.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1.0:
                self._filters.append(TopPLogitsWarper(sampling.top_p))
            if sampling.min_p > 0.0:
                self._filters.append(MinPLogitsWarper(sampling.min_p))
        self.plain = self._greedy and not self._filters
        seed = int.from_bytes(os.urandom(7)) if sampling.seed is None else sampling.seed
        self._generators = [torch.Generator(device).manual_seed(seed) for _ in range(rows)]

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """ids [B, tokens so far] (read by the repetition penalty only), logits [B, V]; returns [B].

        `NO_TOKEN` for a row that has none, so that whoever reads the tokens back learns it with them (`no_token`).
        """
        if not self.plain:
            logits = self._filters(cast(torch.LongTensor, ids), cast(torch.FloatTensor, logits.float()))
        if self._greedy:
            return likeliest_or_none(logits)
        weights = logits.softmax(-1)
        good = weights[:, 0] >= 0  # one NaN or infinity makes all of a row NaN
        weights.nan_to_num_(1.0)  # on a GPU drawing from NaN would take the whole process down
        rows = zip(weights, self._generators, strict=True)
        tokens = torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
        return tokens.where(good, NO_TOKEN)


def likeliest(logits: Tensor) -> Tensor:
    """Indices of the largest of the last dimension; of equal ones the first, and NaN is the largest of all.

    logits: [B, V]; returns int64, [B].
    """
    return largest(logits)[1]


def likeliest_or_none(logits: Tensor) -> Tensor:
    """`likeliest`, and `NO_TOKEN` for a row that holds NaN or +inf, or -inf only: the largest number says it."""
    most, tokens = largest(logits)
    return tokens.where(most.abs() < math.inf, NO_TOKEN)


def no_token(whose: str, done: int) -> NumericsError:
    """For `NO_TOKEN` in the place of token `done` of an answer."""
    return NumericsError(
        f"the logits of {whose} are NaN or infinite after {done} tokens; its prompt or the model's weights overflow "
        "(try --dtype float32)"
    )


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of the last dimension and where it is; of equal ones the first. logits: [B, V]; returns [B] each.

    In two stages, as a GPU gives a row of a hundred thousand numbers to one block of threads.
    """
    pieces = _pieces(logits.shape[-1]) if logits.is_cuda else 1
    return largest_of_pieces(logits, pieces)


@functools.cache
def _pieces(vocab: int) -> int:
    """Of equal length, at most 256; 1: there are none."""
    return next((n for n in range(256, 15, -1) if vocab % n == 0), 1)


def largest_of_pieces(logits: Tensor, pieces: int) -> tuple[Tensor, Tensor]:
    """`largest`, by way of the largest of each of so many pieces, equally long ones."""
    if pieces == 1:
        most, at = logits.max(-1)
        return most, at
    best, place = logits.unflatten(-1, (pieces, -1)).max(-1)
    most, piece = best.max(-1, keepdim=True)
    at = place.gather(-1, piece).add(piece, alpha=logits.shape[-1] // pieces)
    return most.squeeze(-1), at.squeeze(-1)


def read_back(tokens: Tensor) -> Callable[[], list[int]]:
    """Begin to copy tokens [B] to the host; the function waits for them, and for nothing launched after this."""
    if not tokens.is_cuda:
        return tokens.tolist
    copy, event = tokens.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()

    def wait() -> list[int]:
        event.synchronize()
        return copy.tolist()

    return wait


class TextStream:
    """Turns tokens into text piece by piece: never half a character, never a piece of a stop string.

    Attributes:
        text: everything given out so far.
        stopped: a stop string has appeared; text ends before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = (), *, strip_start: bool = False):
        self._tokenizer, self._stop, self._strip = tokenizer, stop, strip_start
        self._ids: list[int] = []
        self._decoded = self._read = 0  # ids before `decoded` are done with; text of ids before `read` was given out
        self._held = ""  # could be the beginning of a stop string
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that became certain with this token, perhaps none."""
        self._ids.append(token)
        before = self._decode(self._ids[self._decoded : self._read])
        now = self._decode(self._ids[self._decoded :])
        if now.endswith("�") or len(now) <= len(before):
            return ""  # the bytes of a character are not all here yet, or the token has no text
        self._decoded, self._read = self._read, len(self._ids)
        return self._give(now[len(before) :], final=False)

    def end(self) -> str:
        """What was held back; call once after the last token."""
        before = self._decode(self._ids[self._decoded : self._read])
        rest = self._decode(self._ids[self._decoded :])[len(before) :]
        return self._give(rest, final=True)

    def _give(self, piece: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        if self._strip and not self.text and not self._held:
            piece = piece.lstrip()
        whole = self._held + piece
        found = [at for at in (whole.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            whole = whole[: min(found)]
        else:
            hold = 0 if final else max((_overlap(whole, stop) for stop in self._stop), default=0)
            whole, self._held = whole[: len(whole) - hold], whole[len(whole) - hold :]
        self.text += whole
        return whole

    def _decode(self, ids: list[int]) -> str:
        return cast(str, self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
