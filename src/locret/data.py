"""Training samples: JSON lines -> the prompt's and the answer's token ids.

One JSON object a line, in any of these forms:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}       ShareGPT, LongAlpaca
    {"instruction": "...", "input": "...", "output": "..."}                                       Alpaca; input optional
    {"prompt": "..." or [messages], "answer": "..."}
    {"prompt_ids": [1, 2, 3], "answer_ids": [4, 5]}    or    {"prompt_ids": [1, 2, 3], "answer": "..."}

Of a conversation the last turn, which must be the assistant's, is the answer and everything before it the prompt. Where
the answer starts is not guessed (the released code searched for separators): the tokenizer's chat template is rendered
without the last turn and with it, and the first text must be the beginning of the second.

Files are never held in memory: `Samples` keeps one byte offset a line and reads a line when it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from locret.errors import DataError

FORMS = (
    '{"messages": [...]}, {"conversations": [...]}, {"instruction", "output"}, {"prompt", "answer"}, '
    '{"prompt_ids", "answer_ids"} or {"prompt_ids", "answer"}'
)
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """Token ids of one prompt and its answer; `name` is where they come from ("train.jsonl:17")."""

    prompt_ids: list[int]
    answer_ids: list[int]
    name: str = "sample"

    def __post_init__(self) -> None:
        for what, ids in (("prompt", self.prompt_ids), ("answer", self.answer_ids)):
            if not ids:
                raise DataError(f"{self.name}: the {what} is empty; a sample needs at least one token of each")


class Samples:
    """Samples of one or more sources, by index.

    Args:
        sources: a path or paths of .jsonl files, or samples in memory: `Sample`s and dictionaries in the forms above.
        tokenizer: may be None where every sample is given as ids.
    Raises: DataError: naming the file; line errors come when the line is read, as "file:line: ...".
    """

    def __init__(
        self,
        sources: str | Path | Iterable[str | Path | Sample | Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.tokenizer = tokenizer
        self._files: list[_Lines] = []
        self._memory: list[Sample | Mapping[str, Any]] = []
        digest = hashlib.sha256()
        for source in [sources] if isinstance(sources, str | Path) else sources:
            if isinstance(source, str | Path):
                self._files.append(_Lines(Path(source)))
                digest.update(self._files[-1].digest)
            else:
                self._memory.append(source)
                digest.update(repr(source).encode())
        self.names = [str(lines.path) for lines in self._files] + (["memory"] if self._memory else [])
        self.digest = digest.hexdigest()  # a resumed run must see the same data
        if not len(self):
            raise DataError(
                f"no samples in {', '.join(self.names) or 'an empty list'}; give one JSON object a line: {FORMS}"
            )

    def __len__(self) -> int:
        return sum(len(lines) for lines in self._files) + len(self._memory)

    def __getitem__(self, index: int) -> Sample:
        """Read and tokenize one sample. Raises: DataError naming the file and the line."""
        for lines in self._files:
            if index < len(lines):
                text, name = lines.read(index)
                return parse_record(_json(text, name), self.tokenizer, name)
            index -= len(lines)
        item = self._memory[index]
        return item if isinstance(item, Sample) else parse_record(item, self.tokenizer, f"sample {index}")


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: 0..count-1, a function of its arguments alone, so a resumed run needs no stored state."""
    order = list(range(count))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def parse_record(record: object, tokenizer: PreTrainedTokenizerBase | None, name: str = "sample") -> Sample:
    """One JSON object -> token ids. `name` starts every error message.

    Raises: DataError: an unknown form, an empty prompt or answer, a chat template that cannot tell them apart.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{name}: expected a JSON object, found {type(record).__name__}; valid: {FORMS}")
    for keys, parse in _PARSERS.items():
        if all(key in record for key in keys):
            return parse(record, tokenizer, name)
    raise DataError(f"{name}: keys {sorted(map(str, record))} are no known form; valid: {FORMS}")


def render(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[list[int], list[int]]:
    """Messages that end with the assistant's -> ids of the prompt (generation prompt included) and of the answer.

    The answer includes what the template puts after it (end-of-turn token). As at inference, the prompt is tokenized by
    itself; the answer's ids are the rest of the whole text's ids where those start with the prompt's, and otherwise (a
    merge across the border) the ids of the rest of the text.
    """
    prompt, full = _apply(messages[:-1], tokenizer, name, True), _apply(messages, tokenizer, name, False)
    if not full.startswith(prompt):
        at = next((i for i, (a, b) in enumerate(zip(prompt, full)) if a != b), min(len(prompt), len(full)))
        raise DataError(
            f"{name}: the chat template rewrites the prompt once an answer follows, so the answer's place is unknown: "
            f"at character {at} the prompt has {prompt[at : at + 40]!r}, the conversation {full[at : at + 40]!r}. "
            'Give {"prompt_ids", "answer_ids"}, or a chat template that only appends'
        )
    prompt_ids = _encode(prompt, tokenizer)
    full_ids = _encode(full, tokenizer)
    if full_ids[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, full_ids[len(prompt_ids) :]
    return prompt_ids, _encode(full[len(prompt) :], tokenizer)


# ---------------------------------------------------------------------- the forms


def _from_messages(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, name: str) -> Sample:
    messages = _messages(record["messages"], "role", "content", name)
    return _conversation(messages, _need(tokenizer, name), name)


def _from_sharegpt(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, name: str) -> Sample:
    messages = _messages(record["conversations"], "from", "value", name)
    return _conversation(messages, _need(tokenizer, name), name)


def _from_alpaca(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, name: str) -> Sample:
    parts = [_text(record.get(key, ""), key, name) for key in ("instruction", "input")]
    prompt = "\n\n".join(part for part in parts if part)
    return _from_prompt({"prompt": prompt, "answer": record["output"]}, tokenizer, name)


def _from_prompt(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, name: str) -> Sample:
    tokenizer, prompt = _need(tokenizer, name), record["prompt"]
    answer = _text(record["answer"], "answer", name)
    if not isinstance(prompt, str):
        messages = _messages(prompt, "role", "content", name)
    elif tokenizer.chat_template is None:  # a base model: plain text, as the engine reads it
        ids = tokenizer(_filled(prompt, "prompt", name)).input_ids, _encode(_filled(answer, "answer", name), tokenizer)
        return Sample(*ids, name)
    else:
        messages = [{"role": "user", "content": prompt}]
    return _conversation([*messages, {"role": "assistant", "content": answer}], tokenizer, name)


def _from_ids(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, name: str) -> Sample:
    prompt = _ids(record["prompt_ids"], "prompt_ids", name)
    if "answer_ids" in record:
        return Sample(prompt, _ids(record["answer_ids"], "answer_ids", name), name)
    answer = _filled(_text(record["answer"], "answer", name), "answer", name)
    return Sample(prompt, _encode(answer, _need(tokenizer, name)), name)


_PARSERS: dict[tuple[str, ...], Callable[[Mapping[str, Any], PreTrainedTokenizerBase | None, str], Sample]] = {
    ("messages",): _from_messages,
    ("conversations",): _from_sharegpt,
    ("prompt_ids", "answer_ids"): _from_ids,
    ("prompt_ids", "answer"): _from_ids,
    ("prompt", "answer"): _from_prompt,
    ("instruction", "output"): _from_alpaca,
}


def _conversation(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, name: str) -> Sample:
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise DataError(
            f"{name}: a conversation must end with the assistant's answer to something; its roles are {roles}"
        )
    _filled(messages[-1]["content"], "answer", name)
    return Sample(*render(messages, tokenizer, name), name)


def _messages(value: object, role_key: str, text_key: str, name: str) -> list[dict[str, str]]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{name}: messages must be a list, found {type(value).__name__}")
    return [_message(item, role_key, text_key, f"{name}: message {number}") for number, item in enumerate(value, 1)]


def _message(item: object, role_key: str, text_key: str, name: str) -> dict[str, str]:
    if not isinstance(item, Mapping) or role_key not in item or text_key not in item:
        seen = sorted(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
        raise DataError(f'{name}: expected {{"{role_key}": ..., "{text_key}": ...}}, found {seen}')
    role = item[role_key]
    if role_key == "from":
        if role not in _ROLES:
            raise DataError(f"{name}: unknown speaker {role!r}; valid: {', '.join(_ROLES)}")
        role = _ROLES[role]
    return {"role": _text(role, role_key, name), "content": _text(item[text_key], text_key, name)}


def _text(value: object, what: str, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name}: {what} must be text, found {type(value).__name__}")
    return value


def _filled(text: str, what: str, name: str) -> str:
    if not text.strip():
        raise DataError(f"{name}: the {what} is empty; remove the line, or give it a {what}")
    return text


def _ids(value: object, what: str, name: str) -> list[int]:
    if not isinstance(value, list) or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in value):
        raise DataError(f"{name}: {what} must be a list of token ids (whole numbers of at least 0)")
    return value


def _need(tokenizer: PreTrainedTokenizerBase | None, name: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise DataError(f'{name}: the backbone has no tokenizer, so samples must be {{"prompt_ids", "answer_ids"}}')
    return tokenizer


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _apply(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, name: str, generation: bool) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{name}: the tokenizer has no chat template to render a conversation with; use a chat model, or give "
            '{"prompt": text, "answer": text} or {"prompt_ids", "answer_ids"}'
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # jinja raises its own errors, and templates raise whatever they like
        raise DataError(f"{name}: the chat template does not accept this conversation: {error}") from error
    return str(text)


# ---------------------------------------------------------------------- files


class _Lines:
    """The lines of a file that are not blank: a byte offset and a line number each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets, self._numbers = array("q"), array("q")
        digest, offset = hashlib.sha256(), 0
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._offsets.append(offset)
                        self._numbers.append(number)
                    offset += len(line)
                    digest.update(line)
                self.digest = digest.digest()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}; give files of JSON lines") from error

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> tuple[str, str]:
        """The line's text and its name, "file:line"."""
        name = f"{self.path}:{self._numbers[index]}"
        with open(self.path, "rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            return line.decode("utf-8-sig" if self._numbers[index] == 1 else "utf-8"), name
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}: byte {error.object[error.start]:#04x} at column {error.start + 1} is not UTF-8; "
                "convert the file, for example: iconv -f latin1 -t utf-8"
            ) from error


def _json(text: str, name: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        hint = ""
        if name.endswith(":1") and text.lstrip().startswith("["):
            hint = "; the file seems to be one JSON array: jq -c '.[]' FILE > FILE.jsonl makes it JSON lines"
        raise DataError(f"{name}: not a JSON object on one line: {error}{hint}") from error
