"""SnapKV (arXiv:2404.14469), the chunk-local variant: the chunk's last queries vote for the units.

The published method runs once, at the end of a prompt that is cached whole, and its window holds the question. Under
chunked prefill no question is known and the whole prompt is never cached, so each chunk's own last queries vote. That
is a variant and behaves like one: it keeps what the text read last attends to.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from locret.methods.base import ChunkView, Method, register


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(Method):
    """Attention of the chunk's last `window` queries: summed over them, mean over the group, max-pooled over units."""

    paper: ClassVar[str] = "arXiv:2404.14469"
    summary: ClassVar[str] = "attention of each chunk's last queries votes (chunk-local variant)"
    rescoring: ClassVar[bool] = True

    window: int = 32
    kernel_size: int = 7

    def score(self, view: ChunkView) -> Tensor:
        assert view.q_rotated is not None
        assert view.keys is not None
        b, hkv, s, d = view.keys.shape
        w = min(self.window, view.q.shape[2])
        q = view.q_rotated[:, :, -w:].reshape(b, hkv, -1, w, d).float()
        logits = q @ view.keys.float()[:, :, None].mT * view.scale  # [B, Hkv, G, w, S]
        later = torch.arange(s, device=q.device) > torch.arange(s - w, s, device=q.device)[:, None]
        votes = logits.masked_fill(later, float("-inf")).softmax(-1).sum(-2).mean(2)  # [B, Hkv, S]
        pooled = functional.max_pool1d(votes, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        pooled[..., -w:] = float(w)  # the window itself stays: no sum of w softmax rows exceeds w
        return pooled
