"""Learning with eviction on: heads see the hidden states that inference gives them.

The paper reads training prompts whole, so heads never see hidden states that were computed over an evicted cache; the
2,500 stabilizers are there to patch that (arXiv:2410.01805, section 4.2). Here a sample takes two passes: labels from
full attention first (the truth about what the answer needs), then the prompt chunk by chunk through the budgeted cache,
each layer learning from its chunk at the moment inference would score it. The heads that are being trained decide what
is evicted.

Shapes: B batch (1), C chunk, P prompt tokens, Hkv KV heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from locret.backbone import Backbone
from locret.config import LARGEST_CHUNK, CacheConfig
from locret.data import Sample
from locret.heads import HeadInput
from locret.methods.base import ChunkView
from locret.methods.locret import Locret
from locret.prefill import Reader
from locret.train.options import TrainConfig

Learn = Callable[[int, HeadInput, int], Tensor]


@dataclass(frozen=True)
class Learner(Locret):
    """The method "locret", learning from what it is shown: not registered, only training uses it.

    learn: learn(layer, inputs of a chunk, position of its first token) -> scores [1, Hkv, C].
    """

    name: ClassVar[str] = "locret"
    learn: Learn

    def score(self, view: ChunkView) -> Tensor:
        return self.learn(view.layer, HeadInput(view.q, view.k, view.v, view.hidden), view.start).detach()


def as_budget(value: float) -> str | int:
    """Units, or a share of the prompt below 1, as `CacheConfig` has them."""
    return f"{100 * value:g}%" if value < 1 else int(value)


def cache_config(config: TrainConfig) -> CacheConfig:
    """Inference's options for the run's `evict_*` options."""
    assert config.evict_budget is not None
    return CacheConfig(
        budget=as_budget(config.evict_budget),
        chunk_size=config.evict_chunk,
        num_stabilizers=config.evict_stabilizers,
    )


@torch.no_grad()
def read_evicting(backbone: Backbone, learner: Learner, config: CacheConfig, sample: Sample) -> None:
    """Prefill the sample's prompt as inference would."""
    ids = torch.tensor([sample.prompt_ids], device=backbone.device)
    Reader.start(
        backbone, learner, config, batch=1, prompt_len=ids.shape[1], new_tokens=0,
        most_chunk=LARGEST_CHUNK,  # whatever is free: a run that goes on after a kill gives the same heads
    ).read(ids)  # fmt: skip
