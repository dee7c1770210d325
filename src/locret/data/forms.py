"""One record of training data -> the prompt's and the answers' token ids.

A record is a JSON object (or a data set's row) in any of these forms:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}       ShareGPT, LongAlpaca
    {"instruction": "...", "input": "...", "output": "..."}                                       Alpaca; input optional
    {"prompt": "..." or [messages], "answer": "..."}
    {"document": "...", "question": "...", "answer": "..."}                                       the question last
    {"prompt_ids": [1, 2, 3], "answer_ids": [4, 5]}    or    {"prompt_ids": [1, 2, 3], "answer": "..."}

Of a conversation the last turn, which must be the assistant's, is the answer and everything before it the prompt; the
assistant's earlier turns are answers too (`Sample.turns`). Where an answer starts is not guessed (the released code
searched for separators): the tokenizer's chat template is rendered without the turn and with it, and the first text
must be the beginning of the second. Ids may come with "gold": [[start, stop], ...], spans of the prompt's tokens that
hold what the answer needs; validation then says how much of them is retained.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from locret.data.sample import RecordError, Sample, Span

FORMS = (
    '{"messages": [...]}, {"conversations": [...]}, {"instruction", "output"}, {"prompt", "answer"}, '
    '{"document", "question", "answer"}, '
    '{"prompt_ids", "answer_ids"} or {"prompt_ids", "answer"}'
)
_SPLIT = {"document", "question", "answer"}
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip


def parse_record(
    record: object, tokenizer: PreTrainedTokenizerBase | None, name: str = "sample", *, question_first: bool = False
) -> Sample:
    """One JSON object -> token ids. `name` starts every error message.

    question_first: the prompt is question, document, question (Locret-Q: heads score what they read knowing what will
    be asked); the record must give them apart.

    Raises: RecordError: an unknown form, an empty prompt or answer, a chat template that cannot tell them apart.
    """
    if not isinstance(record, Mapping):
        raise RecordError(
            "not an object", f"{name}: expected a JSON object, found {type(record).__name__}; valid: {FORMS}"
        )
    record = {key: value for key, value in record.items() if value is not None}  # a table's empty cell is no value
    if set(record) >= _SPLIT:
        record = {"prompt": _joined(record, name, question_first), "answer": record["answer"]}
    elif question_first:
        raise RecordError(
            "question not apart",
            f"{name}: query-aware heads are trained with the question first; give {', '.join(sorted(_SPLIT))}",
        )
    for keys, parse in _PARSERS.items():
        if all(key in record for key in keys):
            return parse(record, tokenizer, name)
    raise RecordError("unknown form", f"{name}: keys {sorted(map(str, record))} are no known form; valid: {FORMS}")


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
        raise RecordError(
            "chat template rewrites the prompt",
            f"{name}: the chat template rewrites the prompt once an answer follows, so the answer's place is unknown: "
            f"at character {at} the prompt has {prompt[at : at + 40]!r}, the conversation {full[at : at + 40]!r}. "
            'Give {"prompt_ids", "answer_ids"}, or a chat template that only appends',
        )
    prompt_ids = _encode(prompt, tokenizer)
    full_ids = _encode(full, tokenizer)
    if full_ids[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, full_ids[len(prompt_ids) :]
    return prompt_ids, _encode(full[len(prompt) :], tokenizer)


def earlier_turns(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[tuple[Span, ...], int]:
    """Spans of the assistant's turns before the last, in the prompt's tokens, and how many of them could not be placed.

    A turn's place is known if rendering only what is before it, and only up to it, gives beginnings of the prompt. Some
    templates rewrite earlier turns (they drop the thinking, say); nothing is learned from those.
    """
    turns = [i for i, message in enumerate(messages[:-1]) if message["role"] == "assistant" and i > 0]
    if not turns:
        return (), 0
    prompt = _apply(messages[:-1], tokenizer, name, True)
    starts = _token_starts(prompt, tokenizer)
    spans = [_place(messages, turn, prompt, starts, tokenizer, name) for turn in turns]
    found = tuple(span for span in spans if span is not None)
    return found, len(spans) - len(found)


def _place(
    messages: list[dict[str, str]], turn: int, prompt: str, starts: list[int], tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> Span | None:  # fmt: skip
    before = _apply(messages[:turn], tokenizer, name, True)
    through = _apply(messages[: turn + 1], tokenizer, name, False)
    if not (prompt.startswith(before) and prompt.startswith(through) and len(before) < len(through)):
        return None
    span = bisect_left(starts, len(before)), bisect_left(starts, len(through))
    return span if 0 < span[0] < span[1] else None


def _token_starts(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The character that each token of `text` starts at; none where the tokenizer cannot say."""
    if not tokenizer.is_fast:
        return []
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [start for start, _ in offsets]


# ---------------------------------------------------------------------- the forms


def _joined(record: Mapping[str, Any], name: str, question_first: bool) -> str:
    document, question = (_filled(_text(record[key], key, name), key, name) for key in ("document", "question"))
    parts = [question, document, question] if question_first else [document, question]
    return "\n\n".join(parts)


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
    gold, turns = (_spans(record.get(key, ()), key, len(prompt), name) for key in ("gold", "turns"))
    if "answer_ids" in record:
        return Sample(prompt, _ids(record["answer_ids"], "answer_ids", name), name, turns, gold)
    answer = _filled(_text(record["answer"], "answer", name), "answer", name)
    return Sample(prompt, _encode(answer, _need(tokenizer, name)), name, turns, gold)


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
        raise RecordError(
            "no answer at the end",
            f"{name}: a conversation must end with the assistant's answer to something; its roles are {roles}",
        )
    _filled(messages[-1]["content"], "answer", name)
    turns, lost = earlier_turns(messages, tokenizer, name)
    return Sample(*render(messages, tokenizer, name), name, turns, lost_turns=lost)


def _messages(value: object, role_key: str, text_key: str, name: str) -> list[dict[str, str]]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RecordError("not a conversation", f"{name}: messages must be a list, found {type(value).__name__}")
    return [_message(item, role_key, text_key, f"{name}: message {number}") for number, item in enumerate(value, 1)]


def _message(item: object, role_key: str, text_key: str, name: str) -> dict[str, str]:
    if not isinstance(item, Mapping) or role_key not in item or text_key not in item:
        seen = sorted(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
        raise RecordError(
            "not a conversation", f'{name}: expected {{"{role_key}": ..., "{text_key}": ...}}, found {seen}'
        )
    role = item[role_key]
    if role_key == "from":
        if role not in _ROLES:
            raise RecordError("unknown speaker", f"{name}: unknown speaker {role!r}; valid: {', '.join(_ROLES)}")
        role = _ROLES[role]
    return {"role": _text(role, role_key, name), "content": _text(item[text_key], text_key, name)}


def _text(value: object, what: str, name: str) -> str:
    if not isinstance(value, str):
        raise RecordError("not text", f"{name}: {what} must be text, found {type(value).__name__}")
    return value


def _filled(text: str, what: str, name: str) -> str:
    if not text.strip():
        raise RecordError(f"empty {what}", f"{name}: the {what} is empty; remove the line, or give it a {what}")
    return text


def _ids(value: object, what: str, name: str) -> list[int]:
    if not isinstance(value, list) or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in value):
        raise RecordError("not token ids", f"{name}: {what} must be a list of token ids (whole numbers of at least 0)")
    return value


def _spans(value: object, what: str, length: int, name: str) -> tuple[Span, ...]:
    spans = tuple(tuple(span) for span in value) if isinstance(value, list | tuple) else ((),)
    flat = [edge for span in spans for edge in span]
    ordered = all(isinstance(edge, int) for edge in flat) and flat == sorted(flat)
    if any(len(span) != 2 for span in spans) or not ordered or any(not 0 <= edge <= length for edge in flat):
        raise RecordError(
            "bad spans", f"{name}: {what} must be ascending pairs [start, stop] within the prompt's {length} tokens"
        )
    return spans


def _need(tokenizer: PreTrainedTokenizerBase | None, name: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise RecordError(
            "no tokenizer", f'{name}: the backbone has no tokenizer, so samples must be {{"prompt_ids", "answer_ids"}}'
        )
    return tokenizer


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _apply(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, name: str, generation: bool) -> str:
    if tokenizer.chat_template is None:
        raise RecordError(
            "no chat template",
            f"{name}: the tokenizer has no chat template to render a conversation with; use a chat model, or give "
            '{"prompt": text, "answer": text} or {"prompt_ids", "answer_ids"}',
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # jinja raises its own errors, and templates raise whatever they like
        raise RecordError(
            "chat template refuses", f"{name}: the chat template does not accept this conversation: {error}"
        ) from error
    return str(text)
