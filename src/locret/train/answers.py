"""Answers by the backbone itself: what *it* looks at when it answers, instead of what another text looks at."""

from __future__ import annotations

import dataclasses

import torch

from locret.backbone import Backbone
from locret.config import CacheConfig
from locret.data import Sample
from locret.errors import NumericsError
from locret.methods import get_method
from locret.prefill import Reader


@torch.no_grad()
def answered_by(backbone: Backbone, sample: Sample, max_tokens: int) -> Sample:
    """The sample with its last answer replaced by the backbone's greedy one, read with the full cache.

    The answer includes the end-of-turn token, if one came within `max_tokens`.
    """
    ids = torch.tensor([sample.prompt_ids], device=backbone.device)
    method = get_method("full")
    reader = Reader.start(backbone, method, CacheConfig(), batch=1, prompt_len=ids.shape[1], new_tokens=max_tokens)
    logits, stop, answer = reader.read(ids), _end_tokens(backbone), []
    for _ in range(max_tokens):
        if not torch.isfinite(logits).all():
            raise NumericsError(f"{sample.name}: the backbone's logits are not finite; try --dtype float32")
        answer.append(int(logits[0].argmax()))
        if answer[-1] in stop:
            break
        logits = reader.step(torch.tensor(answer[-1:], device=backbone.device))
    return dataclasses.replace(sample, answer_ids=answer)


def _end_tokens(backbone: Backbone) -> set[int]:
    eos = getattr(backbone.model.generation_config, "eos_token_id", None)
    eos = backbone.model.config.eos_token_id if eos is None else eos
    return set(eos) if isinstance(eos, list | tuple) else {eos}
