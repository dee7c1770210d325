"""Where a conversation's pieces go in a model's chat template.

The template itself is asked: it is rendered once with marks in the place of the texts, and cut at the marks. So a
document can be read before the question is known, and the two together give the very text that the template gives.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jinja2
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from locret.errors import ConfigError

JOIN = "\n\n"  # between a document and a question in the same user turn
_MARKS = ("\u241eA\u241e", "\u241eB\u241e", "\u241eC\u241e")


@dataclass(frozen=True)
class Turns:
    """The texts between the texts.

    Attributes:
        begin: before the first user text.
        end: after a user text, up to where the model writes.
        again: after the model's text, up to the next user text.
        templated: False for a tokenizer without a chat template; then texts follow each other.
    """

    begin: str
    end: str
    again: str
    templated: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Turns:
        if not tokenizer.chat_template:
            return cls(str(tokenizer.bos_token or ""), "", "\n", templated=False)
        first, answer, second = _MARKS
        text = render(tokenizer, [
            {"role": "user", "content": first}, {"role": "assistant", "content": answer},
            {"role": "user", "content": second},
        ])  # fmt: skip
        begin, rest = _cut(text, first)
        _, rest = _cut(rest, answer)
        again, end = _cut(rest, second)
        return cls(begin, end, again, templated=True)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    """The template's text for these messages, up to where the model writes."""
    if not tokenizer.chat_template:
        raise ConfigError("this model's tokenizer has no chat template; give a plain text prompt instead of messages")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ConfigError(f"a message is {{'role': ..., 'content': ...}}, not {message!r}")
    try:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (jinja2.TemplateError, TypeError) as error:
        raise ConfigError(
            f"this model's chat template does not take these messages: {error}; roles are mostly user, assistant and "
            "system, contents text"
        ) from error


def before_next_user_turn(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    """The template's text for these messages and the opening of one more user turn."""
    return _cut(render(tokenizer, [*messages, {"role": "user", "content": _MARKS[2]}]), _MARKS[2])[0]


def protected_mask(tokenizer: PreTrainedTokenizerBase, text: str, pieces: str | Sequence[str]) -> Tensor | None:
    """Which of the text's tokens lie in one of `pieces`, wherever it occurs: bool [T], or None for no pieces.

    Raises: ConfigError: a piece that does not occur, or a tokenizer that cannot say where its tokens lie.
    """
    pieces = (pieces,) if isinstance(pieces, str) else pieces
    if not pieces:
        return None
    if not tokenizer.is_fast:
        raise ConfigError("protect needs a fast tokenizer: this one cannot say where its tokens lie in the text")
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    mask = torch.zeros(len(offsets), dtype=torch.bool)
    for piece in pieces:
        spans = [match.span() for match in re.finditer(re.escape(piece), text)] if piece else []
        if not spans:
            raise ConfigError(f"protect: {piece!r} does not occur in the text")
        for i, (start, stop) in enumerate(offsets):
            if any(start < high and stop > low for low, high in spans):
                mask[i] = True
    return mask


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of template text: special tokens stand in it already, none are added.

    Raises: ConfigError: text that no encoding has, such as half of a pair of surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"character {error.start + 1} of the text, {text[error.start]!r}, is half of one: were these bytes that "
            "are not UTF-8? Decode them before"
        ) from error
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def token_ids(ids: Iterable[Any], vocabulary: int) -> list[int]:
    """The ids as plain numbers. Raises: ConfigError: what is no token id of a model with that vocabulary."""
    found = list(ids)
    for x in found:
        if not isinstance(x, numbers.Integral) or isinstance(x, bool) or not 0 <= int(x) < vocabulary:
            raise ConfigError(f"{x!r} is no token id of this model; they are whole numbers from 0 to {vocabulary - 1}")
    return [int(x) for x in found]


def _cut(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise ConfigError("this model's chat template changes or drops a message's text, so a document cannot be read "
                          "before its question; use generate() with messages")  # fmt: skip
    return before, after
