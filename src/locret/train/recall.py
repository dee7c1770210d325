"""What heads are for, measured: does the model still answer when it has read a prompt through a small cache?

recall    of the tokens of a sample's last answer, the share that the model itself would give, having read the prompt in
          a cache of some budget with these heads, and the answer so far

Overlap and retention need no such reading; this costs one prefill a sample.

Shapes: A answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from locret.backbone import Backbone
from locret.config import LARGEST_CHUNK, CacheConfig
from locret.data import Sample
from locret.errors import ConfigError
from locret.heads import RetainingHeads
from locret.methods.locret import Locret
from locret.prefill import Reader
from locret.train.distributed import Group
from locret.train.evicted import as_budget

MAX_TOKENS = 64  # of an answer: what follows depends on what was said more than on the prompt


def check_recall(samples: Sequence[Sample], budget: float) -> None:
    """Raises: ConfigError: a held-out prompt is so short that a cache of the budget cannot hold what is pinned."""
    if not samples:
        raise ConfigError("recall_budget needs held-out samples; eval_samples is 0, or too little data is left")
    shortest = min(samples, key=lambda sample: len(sample.prompt_ids))
    try:
        CacheConfig(budget=as_budget(budget)).resolve(prompt_len=len(shortest.prompt_ids), unit_bytes=1)
    except ConfigError as error:
        raise ConfigError(
            f"recall_budget {budget:g} is too small for the prompt of {shortest.name}, {len(shortest.prompt_ids)} "
            f"tokens: {error}"
        ) from error


def recall(
    backbone: Backbone, heads: RetainingHeads, samples: Sequence[Sample], budget: float, group: Group | None = None
) -> float:
    """Mean over samples of the definition above; `budget`: units, or a share of the prompt below 1."""
    group = group or Group()
    total = torch.zeros(1)
    for sample in samples[group.reader :: group.readers]:
        total += answered_share(backbone, heads, sample, budget) / group.share
    group.add([total])
    return total.item() / len(samples)


@torch.no_grad()
def answered_share(backbone: Backbone, heads: RetainingHeads, sample: Sample, budget: float) -> float:
    """One sample's recall."""
    ids = torch.tensor([sample.prompt_ids], device=backbone.device)
    answer = torch.tensor([sample.answer_ids[:MAX_TOKENS]], device=backbone.device)
    config = CacheConfig(budget=as_budget(budget))
    reader = Reader.start(
        backbone, Locret(heads), config, batch=1, prompt_len=ids.shape[1], new_tokens=answer.shape[1],
        most_chunk=LARGEST_CHUNK,  # whatever is free: numbers of one run are compared
    )  # fmt: skip
    logits = [reader.read(ids)[:, None]]  # [1, 1, V]
    if answer.shape[1] > 1:
        logits.append(reader.follow(answer[:, :-1]))
    return (torch.cat(logits, 1).argmax(-1) == answer).float().mean().item()
