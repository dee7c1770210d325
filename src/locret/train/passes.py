"""One pass over prompt and answer: full attention, and in each layer the labels, handed on with what its head reads.

    q, k, v before RoPE  ->  full causal attention (what the backbone needs to go on)
                         ->  labels (labels.py), from rotated q and k; no attention matrix
                         ->  visit(layer, inputs of its head, labels); then all is freed

Long inputs: what works on tokens one by one (MLPs, norms, RoPE, heads) takes `token_chunk` of them at a time, so that
the widest thing alive is one layer's q, k, v and hidden states.

Shapes: B batch (1), T tokens, P prompt tokens, Hq / Hkv query / KV heads, D head dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from locret.backbone import AttentionCall, Backbone, LayerContext, Rope
from locret.data import Sample
from locret.errors import DataError
from locret.heads import HeadInput, RetainingHeads
from locret.kernels.attention import prefix_causal_attention
from locret.labels import Span, attention_labels
from locret.parallel import gathers_weights

TOKEN_CHUNK = 16_384
ROUND = 256  # on CUDA long inputs are made up to multiples of it: cuDNN makes a plan for every length it meets ...
_LONG = 4  # ... from 4 x 256 tokens on; shorter ones go to FlashAttention, which makes none
Visit = Callable[[int, HeadInput, Tensor], None]


class Done(Exception):
    """Ends a forward pass early; the seam restores the model as after any exception."""


class LabelContext:
    """A `LayerContext`: full causal attention, and in each learned layer the labels, handed to `visit`.

    Args:
        layers: those learned.
        answers: spans of the answers' tokens; the last one's start is the length of the prompt.
        learned_len: how many prompt tokens are learned from, the first ones.
        visit: called as visit(layer, inputs, labels): inputs of P = learned_len tokens, labels fp32 [1, Hkv, P].
        label: a name of labels.LABELS.
        wants_hidden: inputs have hidden states.
        stop: raise `Done` once the last of `layers` was visited: nobody reads what would follow.
    """

    def __init__(
        self, rope: Rope, layers: Iterable[int], answers: Sequence[Span], learned_len: int, visit: Visit, *,
        label: str = "max-logit", wants_hidden: bool = False, token_chunk: int = TOKEN_CHUNK, stop: bool = False,
    ) -> None:  # fmt: skip
        self.rope, self.layers, self.visit = rope, frozenset(layers), visit
        self.last = max(self.layers) if stop else None
        self.answers, self.learned_len, self.label = answers, learned_len, label
        self.wants_hidden, self.token_chunk = wants_hidden, token_chunk

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """q [1, Hq, T, D], k, v [1, Hkv, T, D] before RoPE -> [1, Hq, T, D]."""
        q_rotated, k_rotated = self._rotate(layer, q), self._rotate(layer, k)
        if layer in self.layers:
            labels = attention_labels(
                self.label, q_rotated, k_rotated, v, self.answers, call.scale, softcap=call.softcap
            )
            inputs = HeadInput(q, k, v, call.hidden).tokens(0, self.learned_len)
            self.visit(layer, inputs, labels[:, :, : self.learned_len])
            if layer == self.last:
                raise Done
        return prefix_causal_attention(
            q_rotated, k_rotated, v, scale=call.scale, softcap=call.softcap, window=call.window
        )

    def _rotate(self, layer: int, x: Tensor) -> Tensor:
        if x.shape[2] <= self.token_chunk:
            return self.rope.run(layer, x, 0)
        out = torch.empty_like(x)
        for number, (part, rows) in enumerate(zip(*(y.split(self.token_chunk, 2) for y in (out, x)), strict=True)):
            self.rope.run(layer, rows, number * self.token_chunk, part)
        return out


class LabelPass:
    """Runs samples through a backbone with a `LabelContext`.

    Args:
        layers: those learned.
        label, wants_hidden, token_chunk: of the context.
        max_length: prompt tokens learned from.

    Attributes:
        round_to: inputs of at least 4 times that are made as long as the next multiple of it.
        together: every process must run as many passes as the others: each holds a share of the weights.
    """

    def __init__(
        self, backbone: Backbone, layers: Sequence[int], *, label: str, wants_hidden: bool, max_length: int,
        token_chunk: int = TOKEN_CHUNK,
    ) -> None:  # fmt: skip
        self.backbone, self.layers, self.label, self.wants_hidden = backbone, layers, label, wants_hidden
        self.max_length, self.token_chunk = max_length, token_chunk
        self.together = gathers_weights(backbone.model)
        self.round_to = ROUND if backbone.device.type == "cuda" else 1
        self._rope: tuple[tuple[int, int], Rope] | None = None

    @torch.no_grad()
    def __call__(self, sample: Sample, visit: Visit) -> None:
        """One forward pass. Raises: DataError: the sample does not fit in the device's memory."""
        ids = self.ids(sample)
        self.run(ids, self.context(sample, len(ids), visit, stop=self.stops), sample.name)

    @property
    def stops(self) -> bool:
        """Whether a pass may end early: weights that are gathered must be given back at the end of a whole one."""
        return not self.together

    def context(self, sample: Sample, length: int, visit: Visit, *, stop: bool) -> LabelContext:
        """For a row that begins with the sample's tokens and has `length` of them."""
        prompt_len = len(sample.prompt_ids)
        return LabelContext(
            self._rope_for(length, prompt_len), self.layers, sample.answers, min(prompt_len, self.max_length), visit,
            label=self.label, wants_hidden=self.wants_hidden, token_chunk=self.token_chunk, stop=stop,
        )  # fmt: skip

    def ids(self, sample: Sample) -> list[int]:
        """The sample's tokens, a long one's made up to a round length: nothing before them sees what is appended."""
        ids = [*sample.prompt_ids, *sample.answer_ids]
        return ids if len(ids) < _LONG * self.round_to else ids + [0] * (-len(ids) % self.round_to)

    @torch.no_grad()
    def run(self, tokens: list[int], context: LayerContext, name: str) -> None:
        """One forward pass of a row of tokens. Raises: DataError: it does not fit in the device's memory."""
        ids = torch.tensor([tokens])
        if self.backbone.device.type == "cuda":
            ids = ids.pin_memory()  # a copy from pageable memory would wait for the device
        whole = self.backbone.run if ids.shape[1] <= self.token_chunk and not self.together else self._run_modules
        try:
            with contextlib.suppress(Done):
                whole(ids.to(self.backbone.device, non_blocking=True), context, logits=0)
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"{name}: {ids.shape[1]} tokens do not fit in the device's memory; lower max_length"
            ) from error

    def _run_modules(self, ids: Tensor, context: LayerContext, *, logits: int) -> None:
        """Through transformers' modules, which can be given some of the tokens at a time."""
        with tokens_in_pieces(self.backbone, self.token_chunk, ids.shape[1]):
            self.backbone.run_modules(ids, context, logits=logits)

    def _rope_for(self, length: int, prompt_len: int) -> Rope:
        if self._rope is None or self._rope[0] != (length, prompt_len):
            self._rope = (length, prompt_len), self.backbone.rope(length, prompt_len)
        return self._rope[1]


def score_in_pieces(heads: RetainingHeads, layer: int, inputs: HeadInput, size: int = TOKEN_CHUNK) -> Tensor:
    """`heads.score` with the activations of `size` tokens at most: more are recomputed in the backward pass."""
    length = inputs.q.shape[2]
    if length <= size:
        return heads.score(layer, *inputs)
    pieces = [
        checkpoint(
            heads.score, layer, *inputs.tokens(start, start + size), use_reentrant=False, preserve_rng_state=False
        )
        for start in range(0, length, size)
    ]
    return torch.cat(pieces, dim=2)


@contextlib.contextmanager
def tokens_in_pieces(backbone: Backbone, size: int, length: int) -> Iterator[None]:
    """While open, the decoder layers' MLPs and norms take `size` tokens at a time; nothing changes for shorter inputs.

    They work on tokens one by one, so the result is the same; modules that return more than a tensor are left alone.
    """
    modules = _tokenwise_modules(backbone) if length > size else []
    before = [module.__dict__.get("forward") for module in modules]  # accelerate puts one there too
    for module in modules:
        module.forward = _in_pieces(module.forward, size)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _in_pieces(forward: Callable[..., Any], size: int) -> Callable[..., Any]:
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.dim() != 3 or x.shape[1] <= size or args or kwargs:
            return forward(x, *args, **kwargs)
        pieces = x.split(size, dim=1)
        first = forward(pieces[0])
        if not isinstance(first, Tensor):
            return forward(x)
        out = x.new_empty(*x.shape[:2], first.shape[2], dtype=first.dtype)
        out[:, :size] = first
        for number, piece in enumerate(pieces[1:], 1):
            out[:, number * size : number * size + piece.shape[1]] = forward(piece)
        return out

    return run


def _tokenwise_modules(backbone: Backbone) -> list[nn.Module]:
    """Children of the decoder layers, beside attention, that transformers calls with hidden states alone."""
    return [
        child
        for parent in backbone.decoder_layers
        for name, child in parent.named_children()
        if name in ("mlp", "feed_forward") or "norm" in name
    ]
