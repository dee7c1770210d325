"""Attention of a chunk over (everything cached before it, all visible) + (itself, causally), without a mask.

The last T of the S keys are the chunk's own, so query t sees keys 0 .. S-T+t ("lower-right" causality).
No [T, S] mask and no score matrix is built:

* CUDA, bf16/fp16: one FlashAttention-2 call; it is lower-right causal, takes fewer KV heads and a window as they are.
  Where `choice` has a faster kernel (long chunks on Hopper: cuDNN): the two calls below, each on that.
* elsewhere: two fused calls, prefix (all visible) and chunk (square causal), merged by their log-sum-exps:
      w = sigmoid(lse_b - lse_a);  out = lerp(out_a, out_b, w)
* softcap, a bias, or a window where no fused kernel takes it: plain matmuls over blocks of query rows, so that the
  largest temporary is [rows, keys visible to those rows].

Shapes: B batch, T chunk, S keys, Hq/Hkv heads, G = Hq // Hkv, D head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from locret.kernels.choice import KERNELS, fused, load, prefill_kernel
from locret.kernels.switch import use_triton

_ROWS = 256  # query rows per block of the blocked path


def prefix_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None, window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of T queries over S keys, the last T of which are the queries' own.

    Args:
        q: rotated queries, [B, Hq, T, D].
        k, v: rotated keys and values, [B, Hkv, S, D], S >= T.
        scale: factor on the logits.
        softcap: logits become softcap * tanh(logits / softcap).
        window: query t sees only its own and the window - 1 keys before it.
        bias: added to the logits of every key, after the softcap, [B, Hkv, S]; -inf hides a key.

    Returns: [B, Hq, T, D] in q's dtype.
    """
    if window is not None and window >= k.shape[2]:
        window = None
    if softcap is not None or bias is not None or (window is not None and not fused(q)):
        return _blocked(q, k, v, scale, softcap, window, bias)
    if fused(q) and (window is not None or prefill_kernel(q, k.shape[2]) == "flash"):
        return _flash(q, k, v, scale, window)
    return _two_parts(q, k, v, scale)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None, window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The meaning, in float64 with a full mask: what every path above must equal."""
    q, k, v = q.double(), k.double(), v.double()
    groups, t, s = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    logits = q @ k.repeat_interleave(groups, 1).mT * scale  # [B, Hq, T, S]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.double().repeat_interleave(groups, 1)[:, :, None]
    distance = torch.arange(s - t, s, device=q.device)[:, None] - torch.arange(s, device=q.device)
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return logits.masked_fill(~seen, float("-inf")).softmax(-1) @ v.repeat_interleave(groups, 1)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, T, H, D]; the kernel reads any strides
    left = -1 if window is None else window - 1
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, q.shape[1] > 1 or window is not None, False,
        scale=scale, window_size_left=left, window_size_right=-1 if window is None else 0,
    )[0]  # fmt: skip
    return out.transpose(1, 2)


def _two_parts(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if q.shape[2] == 1:
        return _part(q, k, v, scale, causal=False).out
    prefix = k.shape[2] - q.shape[2]
    return two_part_attention(
        q, (k[:, :, :prefix], v[:, :, :prefix]), (k[:, :, prefix:], v[:, :, prefix:]), scale=scale
    )


def two_part_attention(
    q: Tensor, prefix: tuple[Tensor, Tensor], chunk: tuple[Tensor, Tensor], *, scale: float
) -> Tensor:
    """`prefix_causal_attention` where what was cached before and the chunk's own units lie in tensors of their own.

    Args:
        q: rotated queries, [B, Hq, T, D].
        prefix: rotated keys and values of the P units before, all visible, [B, Hkv, P, D] each; P may be 0.
        chunk: those of the queries' own tokens, seen causally, [B, Hkv, T, D].

    Each part on the fastest kernel present (`choice`). All but "efficient" take fewer KV heads as they are.
    """
    return add_prefix(chunk_attention(q, *chunk, scale=scale), q, *prefix, scale=scale)


class Part(NamedTuple):
    """Attention over some of the keys."""

    out: Tensor  # [B, Hq, T, D]
    lse: Tensor  # log-sum-exps of its logits, fp32 [B, Hq, T]


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Part:
    """The second part of `two_part_attention`, over the queries' own tokens."""
    return _part(q, k, v, scale, causal=True)


def add_prefix(own: Part, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """The whole of `two_part_attention`, from its second part: so rotated keys of one part at a time are enough."""
    if k.shape[2] == 0:
        return own.out
    old = _part(q, k, v, scale, causal=False)
    if use_triton("merge", old.out):
        from locret.kernels.merge_triton import merge_triton

        return merge_triton(old.out, own.out, old.lse, own.lse)
    return torch.lerp(old.out, own.out, torch.sigmoid(own.lse - old.lse)[..., None].to(q.dtype))


def _part(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> Part:
    """One fused call."""
    return PARTS[prefill_kernel(q, k.shape[2])](q, k, v, scale, causal)


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Part:
    return Part(*torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale))


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Part:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return Part(out, lse.view(*q.shape[:3]))


def _flash2(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Part:
    rows = [x.transpose(1, 2) for x in (q, k, v)]  # [B, T, H, D]; the kernel reads any strides
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *rows, None, None, q.shape[2], k.shape[2], 0.0, causal, False, scale=scale
    )
    return Part(out.transpose(1, 2), lse)


def _flash3(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Part:
    return _of_package("flash3", q, k, v, softmax_scale=scale, causal=causal, return_attn_probs=True)


def _flash4(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Part:
    return _of_package("flash4", q, k, v, softmax_scale=scale, causal=causal, return_lse=True)


def _of_package(name: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Part:
    package: Any = load(KERNELS[name].package or "")
    out, lse, *_ = package.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    return Part(out.transpose(1, 2), lse)


def _efficient(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Part:
    groups = q.shape[1] // k.shape[1]  # fp32 and odd head dims; small cases only, so expanding KV costs little
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return Part(out, lse[..., : q.shape[2]])  # the kernel pads its rows to a multiple of 32


PARTS = {  # what `choice` names, and what runs elsewhere: f(q, k, v, scale, causal)
    "cpu": _on_cpu, "cudnn": _cudnn, "flash": _flash2, "flash3": _flash3, "flash4": _flash4, "efficient": _efficient,
}  # fmt: skip


def _blocked(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None, bias: Tensor | None
) -> Tensor:
    b, hq, t, d = q.shape
    hkv, s = k.shape[1], k.shape[2]
    out = torch.empty_like(q)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32  # logits as the fused kernels have them
    for start in range(0, t, _ROWS):
        stop = min(start + _ROWS, t)
        first = s - t + start  # the key of the block's first query
        low = 0 if window is None else max(0, first - window + 1)
        high = s - t + stop
        rows = q[:, :, start:stop].reshape(b, hkv, hq // hkv, stop - start, d).to(wide)
        logits = (rows @ k[:, :, None, low:high].to(wide).mT).mul_(scale)  # [B, Hkv, G, rows, keys]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias[:, :, None, None, low:high].to(wide)
        distance = torch.arange(first, high, device=q.device)[:, None] - torch.arange(low, high, device=q.device)
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        weights = logits.masked_fill_(hidden, float("-inf")).softmax(-1).to(q.dtype)
        out[:, :, start:stop] = (weights @ v[:, :, None, low:high]).reshape(b, hq, stop - start, d)
    return out
