"""A model named `locret` for EleutherAI's lm-evaluation-harness: whole prompts, read within the budget.

    python -m locret.evaluate.lm_harness run --model locret --model_args budget=5% --tasks TASK --apply_chat_template

The harness gives a prompt in one piece, so everything here is query-aware; `locret eval` also measures the other way.
Needs the extra `locret[harness]`; importing this file registers the model. Tested with lm-eval 0.4.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from locret import chat
from locret.config import Sampling
from locret.engine import LLM, load
from locret.errors import ConfigError
from locret.evaluate.session import Session
from locret.prefill import Reader

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_ROLL = 1024  # tokens whose logits are held at once


@register_model("locret")
class LocretLM(TemplateLM):
    """The harness's three requests on an `LLM`.

    Args:
        pretrained: folder or hub id, or an `LLM` that is there already; none: the embedded model.
        batch_size: prompts of equal length that are read together.
        **options: of `locret.load`: heads, method, budget, chunk_size, positions, dtype ...
    """

    def __init__(
        self, pretrained: str | LLM | None = None, *, batch_size: int | str = 1, device: str | None = None,
        max_gen_toks: int = 256, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        options.pop("max_batch_size", None)  # the harness always gives it
        self.llm = pretrained if isinstance(pretrained, LLM) else load(pretrained, device=device or "auto", **options)
        self.tokenizer = self.llm.backbone.need_tokenizer()
        self._batch_size = 1 if batch_size == "auto" else int(batch_size)
        self._max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """A text that begins with the template's first token has its special tokens already."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens).input_ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Up to where the model writes; without, up to where the last message can go on."""
        if add_generation_prompt:
            return chat.render(self.tokenizer, chat_history)
        text = self.tokenizer.apply_chat_template(chat_history, tokenize=False, continue_final_message=True)
        return str(text)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Args of a request: (prompt, {until, max_gen_toks, temperature, ...}). Prompts are grouped by options."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for rows in groups.values():
            sampling = self._sampling(requests[rows[0]].args[1])
            rows.sort(key=lambda i: len(requests[i].args[0]))
            for start in range(0, len(rows), self._batch_size):
                part = rows[start : start + self._batch_size]
                prompts = [self.tok_encode(requests[i].args[0]) for i in part]
                outputs = self.llm.generate(prompts, sampling=sampling)
                assert isinstance(outputs, list)
                for i, output in zip(part, outputs, strict=True):
                    answers[i] = output.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The context is read within the budget; the continuation is scored against what was kept."""
        found = []
        for pair, context, continuation in requests:
            sampling = Sampling(max_new_tokens=max(1, len(continuation)))
            session = Session.read(self.llm, [np.array(context, dtype=np.int32)], sampling)
            score = _score(session.follow([[]], [continuation])[0], continuation)
            self.cache_hook.add_partial("loglikelihood", pair, score)
            found.append(score)
        return found

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, read once through the budgeted cache from an empty one."""
        found = []
        for request in requests:
            [text] = request.args
            ids = [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
            llm = self.llm
            reader = Reader.start(llm.backbone, llm.method, llm.config, batch=1, prompt_len=len(ids))
            total = 0.0
            for start in range(0, len(ids) - 1, _ROLL):
                piece = torch.tensor([ids[start : start + _ROLL]], device=llm.backbone.device)
                targets = ids[start + 1 : start + _ROLL + 1]
                total += _score(reader.follow(piece)[0, : len(targets)], targets)[0]
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            found.append(total)
        return found

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        options = dict(given)
        stop = options.pop("until", None) or []
        greedy = not options.pop("do_sample", options.get("temperature", 0) > 0)
        length = next((options.pop(name) for name in ("max_gen_toks", "max_new_tokens") if name in options), None)
        for name in options:
            if name not in _SAMPLING:
                raise ConfigError(
                    f"generation option {name!r} is not one that locret carries out; it knows until, max_gen_toks, "
                    f"do_sample, {', '.join(_SAMPLING)}"
                )
        if greedy:
            options = {name: value for name, value in options.items() if name == "repetition_penalty"}
        stops = [stop] if isinstance(stop, str) else list(stop)
        return Sampling(
            max_new_tokens=int(length or self._max_gen_toks), stop=tuple(filter(None, stops)),
            **{"temperature": 0.0 if greedy else 1.0, **options},
        )  # fmt: skip


def _score(logits: torch.Tensor, targets: Sequence[int]) -> tuple[float, bool]:
    """(log-likelihood, whether every token is the likeliest one). logits [T, V]."""
    log_probs = logits.float().log_softmax(-1)
    wanted = torch.tensor(targets, device=logits.device)
    total = log_probs.gather(-1, wanted[:, None]).sum().item()
    return total, bool((log_probs.argmax(-1) == wanted).all())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
