"""SirLLM (arXiv:2405.12528): keep the tokens that surprised the model."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from locret.methods.base import Method, register, within


@register("sirllm")
@dataclass(frozen=True)
class SirLLM(Method):
    """A token's score is -log p(token | before it) in nats, the same in all layers and heads; `decay` shrinks the
    scores of what is cached at every eviction.

    Logits exist after the forward pass, so every layer holds budget + chunk units for a moment, where other methods
    let one at a time: the slabs are that much larger. The published code cannot score the first token of a chunk and
    gives it the chunk's largest score; here the logits of the token before are kept.
    """

    paper: ClassVar[str] = "arXiv:2405.12528"
    summary: ClassVar[str] = "tokens of high surprisal stay; needs the logits of every token"
    variant: ClassVar[str] = "evicts after a chunk, published: before it; chunk-first tokens are scored too"
    wants_surprisal: ClassVar[bool] = True

    decay: float = 1.0

    def __post_init__(self) -> None:
        within("sirllm", 0.0, 1.0, decay=self.decay)

    def score_tokens(self, old: Tensor, surprisal: Tensor, *, evicting: bool) -> Tensor:
        if evicting:
            old = old * self.decay
        return torch.cat((old, surprisal[:, None].expand(-1, old.shape[1], -1)), -1)
