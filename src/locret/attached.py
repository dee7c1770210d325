"""Plain transformers code with our cache: `with locret.attach(model, ...)`, `model.generate()` runs in the budget.

transformers still prepares logits processors, stopping criteria and the streamer and hands them to our loop
(`generate(custom_generate=...)`). On leaving, the model is what it was.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from locret.backbone import Backbone
from locret.config import CacheConfig
from locret.engine import LLM
from locret.errors import ConfigError
from locret.heads import RetainingHeads
from locret.prefill import Reader

_NOT_FILLED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@contextlib.contextmanager
def attach(
    model: PreTrainedModel, *, heads: str | Path | RetainingHeads | None = None, method: str = "locret",
    method_options: dict[str, Any] | None = None, **cache_options: Any,
) -> Iterator[PreTrainedModel]:  # fmt: skip
    """Make `model.generate()` keep its KV cache in a budget.

    Args: as for `locret.load`; the model is one that transformers has loaded.
    Raises: ConfigError on entering for bad options; in `generate` for beam search, assisted decoding, and
            scores, logits, attentions or hidden states in the result.
    """
    config = CacheConfig.from_dict(cache_options)
    llm = LLM.build(Backbone(model), heads=heads, method=method, method_options=method_options, config=config)
    before = model.__dict__.get("generate")
    model.__dict__["generate"] = functools.partial(_generate, llm, model)  # past nn.Module's __setattr__
    try:
        yield model
    finally:
        del model.__dict__["generate"]  # the class's own method shows again, or an outer attach
        if before is not None:
            model.__dict__["generate"] = before


def _generate(llm: LLM, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`model.generate` with our loop. transformers drops the streamer and the assistant for a loop of one's own."""
    plain = types.MethodType(cast(Any, type(model)).generate, model)
    options = dict(inspect.signature(plain).bind(*args, **kwargs).arguments)  # by name, however they were passed
    options |= options.pop("kwargs", {})
    if options.get("assistant_model") is not None or options.get("prompt_lookup_num_tokens"):
        raise ConfigError("assisted decoding needs a cache that can be rolled back; locret decodes token by token")
    loop = functools.partial(_loop, llm=llm, streamer=options.pop("streamer", None))
    _take_stop_strings(model, options)
    return plain(custom_generate=loop, **options)


def _take_stop_strings(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Put them into the stopping criteria: transformers would, but drops the tokenizer for a loop of one's own."""
    tokenizer = options.pop("tokenizer", None)
    configs = (options.get("generation_config"), model.generation_config)
    found = [config.stop_strings for config in configs if config is not None and config.stop_strings is not None]
    texts = options["stop_strings"] if "stop_strings" in options else next(iter(found), None)
    if texts is None:
        return
    if tokenizer is None:
        raise ConfigError(f"stop_strings {texts!r} need the model's tokenizer; add tokenizer=tokenizer to generate()")
    given = options.get("stopping_criteria") or []
    options["stopping_criteria"] = StoppingCriteriaList([*given, StopStringCriteria(tokenizer, texts)])
    options["stop_strings"] = None  # a keyword wins over the configurations


@torch.inference_mode()
def _loop(
    model: PreTrainedModel, input_ids: Tensor, logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig, *, llm: LLM, streamer: Any,
    **model_inputs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:  # fmt: skip
    """One call of `generate`. input_ids [B, T], left-padded where attention_mask [B, T] is 0.

    transformers passes whatever this signature names twice, so the mask is taken from the rest.
    """
    if (generation_config.num_beams or 1) > 1:
        raise ConfigError(
            f"num_beams is {generation_config.num_beams}; locret decodes greedily or by sampling (1 beam)"
        )
    asked = [name for name in _NOT_FILLED if getattr(generation_config, name, None)]
    if generation_config.return_dict_in_generate and asked:
        raise ConfigError(f"{', '.join(asked)} with return_dict_in_generate; locret returns sequences only: leave "
                          "that out, or generate outside of attach")  # fmt: skip
    if streamer is not None:
        streamer.put(input_ids.cpu())
    groups = _groups(input_ids, model_inputs.get("attention_mask"), llm, generation_config)
    ids = input_ids
    pad = _pad_id(generation_config)
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    with llm.backbone.seam():
        logits = _scatter([(rows, reader.read(part)) for rows, reader, part in groups], len(ids))
        while True:
            scores = logits_processor(
                cast(torch.LongTensor, ids), cast(torch.FloatTensor, logits.to(torch.float32, copy=True))
            )
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
            else:
                tokens = scores.argmax(-1)
            tokens = torch.where(running, tokens, pad)
            ids = torch.cat((ids, tokens[:, None]), 1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            running &= ~stopping_criteria(cast(torch.LongTensor, ids), cast(torch.FloatTensor, None))
            if not running.any():
                break
            logits = _scatter([(rows, reader.step(tokens[rows])) for rows, reader, _ in groups], len(ids))
    if streamer is not None:
        streamer.end()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, ids))
    return ids


def _groups(
    input_ids: Tensor, attention_mask: Tensor | None, llm: LLM, generation_config: GenerationConfig
) -> list[tuple[Tensor, Reader, Tensor]]:
    """Rows of the same length share a reader: (row numbers, reader, their unpadded ids)."""
    total = input_ids.shape[1]
    lengths = torch.full((len(input_ids),), total) if attention_mask is None else attention_mask.sum(-1).cpu()
    new_tokens = max(1, generation_config.max_length - total)
    groups = []
    for length in sorted(set(lengths.tolist())):
        rows = (lengths == length).nonzero()[:, 0].to(input_ids.device)
        part = input_ids[rows, total - length :]
        if attention_mask is not None and not bool(attention_mask[rows, total - length :].all()):
            raise ConfigError("attention_mask has zeros after the first one; locret takes left-padded prompts only")
        reader = Reader.start(llm.backbone, llm.method, llm.config, batch=len(rows), prompt_len=length,
                              new_tokens=new_tokens)  # fmt: skip
        groups.append((rows, reader, part))
    if llm.config.chunk_size is None:
        for _, reader, _ in groups:  # again, beside the caches of all of them
            reader.shorten_chunks()
    return groups


def _scatter(parts: list[tuple[Tensor, Tensor]], rows: int) -> Tensor:
    """[rows of a group, V] pieces -> [B, V]."""
    out = parts[0][1].new_empty(rows, parts[0][1].shape[-1])
    for indices, piece in parts:
        out[indices] = piece
    return out


def _pad_id(generation_config: GenerationConfig) -> int:
    pad = generation_config.pad_token_id
    if pad is not None:
        return int(pad)
    eos = generation_config.eos_token_id
    return int(eos[0] if isinstance(eos, list) else eos or 0)
