"""Samples: every form gives the ids that the chat template says; broken input is named with file and line."""

from __future__ import annotations

import json

import pytest
from conftest import build_byte_tokenizer

from locret.data import Sample, Samples, parse_record, shuffled, sources
from locret.errors import DataError

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "héllo?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "quite"},
]
ONE_TURN = ("<bos><|user|>what is it?<end><|assistant|>", "a thing<end>")


def texts(sample, tokenizer):
    return tokenizer.decode(sample.prompt_ids), tokenizer.decode(sample.answer_ids)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "what is it?", "answer": "a thing"},
        {"prompt": [{"role": "user", "content": "what is it?"}], "answer": "a thing"},
        {"messages": [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a thing"}]},
        {"id": 7, "conversations": [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a thing"}]},
        {"instruction": "what is it?", "output": "a thing"},
    ],
)
def test_every_form_gives_the_templates_prompt_and_answer(record, tiny_tokenizer):
    assert texts(parse_record(record, tiny_tokenizer), tiny_tokenizer) == ONE_TURN


def test_the_last_of_many_turns_is_the_answer(tiny_tokenizer):
    prompt, answer = texts(parse_record({"messages": MESSAGES}, tiny_tokenizer), tiny_tokenizer)
    assert prompt == (
        "<bos><|system|>be brief<end><|user|>héllo?<end><|assistant|>yes<end><|user|>sure?<end><|assistant|>"
    )
    assert answer == "quite<end>"


def test_prompt_and_answer_are_the_ids_of_the_whole_conversation(tiny_tokenizer):
    """What is trained on is exactly what the template makes of the conversation."""
    sample = parse_record({"messages": MESSAGES}, tiny_tokenizer)
    whole = tiny_tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert sample.prompt_ids + sample.answer_ids == tiny_tokenizer(whole, add_special_tokens=False).input_ids


def test_ids_need_no_tokenizer():
    assert parse_record({"prompt_ids": [5, 6], "answer_ids": [7]}, None) == Sample([5, 6], [7])


def test_prompt_ids_with_a_text_answer(tiny_tokenizer):
    sample = parse_record({"prompt_ids": [5, 6], "answer": "abc"}, tiny_tokenizer)
    assert sample.prompt_ids == [5, 6]
    assert tiny_tokenizer.decode(sample.answer_ids) == "abc"


def test_a_tokenizer_without_a_template_takes_plain_text():
    tokenizer = build_byte_tokenizer(chat_template=None)
    assert texts(parse_record({"prompt": "one ", "answer": "two"}, tokenizer), tokenizer) == ("one ", "two")
    with pytest.raises(DataError, match="no chat template"):
        parse_record({"messages": MESSAGES}, tokenizer)


def test_an_answer_in_another_message_does_not_confuse_the_span(tiny_tokenizer):
    """The released code searched for separators in the text; text that contains them moved the border."""
    trap = "<|assistant|>a thing<end>"
    record = {"prompt": f"repeat: {trap}", "answer": trap}
    prompt, answer = texts(parse_record(record, tiny_tokenizer), tiny_tokenizer)
    assert answer == f"{trap}<end>"
    assert prompt.endswith(f"repeat: {trap}<end><|assistant|>")


def test_a_template_that_rewrites_the_prompt_is_refused():
    template = "{{ messages | length }}: {% for m in messages %}{{ m['content'] }};{% endfor %}"
    with pytest.raises(DataError, match=r"x:3: the chat template rewrites the prompt .* character 0 .*'1: "):
        parse_record({"prompt": "hi", "answer": "ho"}, build_byte_tokenizer(template), "x:3")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "hi", "answer": ""}, "the answer is empty"),
        ({"prompt": "hi", "answer": " \n"}, "the answer is empty"),
        ({"prompt_ids": [1], "answer_ids": []}, "the answer is empty"),
        ({"prompt_ids": [], "answer_ids": [1]}, "the prompt is empty"),
        ({"messages": MESSAGES[:-1]}, "must end with the assistant's answer"),
        ({"messages": MESSAGES[2:3]}, "must end with the assistant's answer to something"),
        ({"messages": [{"role": "user"}]}, r"message 1: expected .*'role'"),
        ({"messages": "hi"}, "messages must be a list, found str"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "unknown speaker 'martian'"),
        ({"prompt": "hi", "answer": 5}, "answer must be text, found int"),
        ({"prompt_ids": [1, -2], "answer_ids": [1]}, "prompt_ids must be a list of token ids"),
        ({"promt": "hi", "answer": "ho"}, r"keys \['answer', 'promt'\] are no known form"),
        ([1], "expected a JSON object, found list"),
    ],
)
def test_a_bad_record_says_what_was_seen(record, message, tiny_tokenizer):
    with pytest.raises(DataError, match=message) as error:
        parse_record(record, tiny_tokenizer, "f.jsonl:9")
    assert str(error.value).startswith("f.jsonl:9")


def write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def test_files_are_indexed_by_line_and_read_on_demand(tmp_path, tiny_tokenizer):
    a = write(
        tmp_path / "a.jsonl", {"prompt_ids": [1], "answer_ids": [2]}, b"\n", {"prompt_ids": [3], "answer_ids": [4]}
    )
    b = write(
        tmp_path / "b.jsonl", b'\xef\xbb\xbf{"prompt_ids": [5], "answer_ids": [6]}'
    )  # a BOM, no newline at the end
    samples = Samples([a, b], tiny_tokenizer)
    assert len(samples) == 3
    assert [samples[i].prompt_ids for i in range(3)] == [[1], [3], [5]]
    assert [samples[i].name for i in range(3)] == [f"{a}:1", f"{a}:3", f"{b}:1"]


def test_a_broken_line_is_named_when_it_is_read(tmp_path, tiny_tokenizer):
    good = {"prompt": "a", "answer": "b"}
    path = write(tmp_path / "x.jsonl", good, b'{"prompt": "a"\n', b"\n", b'{"prompt": "\xe9", "answer": "b"}\n', good)
    samples = Samples(path, tiny_tokenizer)
    assert samples[0] == Sample(samples[3].prompt_ids, samples[3].answer_ids, f"{path}:1")
    with pytest.raises(DataError, match=r"x\.jsonl:2: not a JSON object on one line"):
        samples[1]
    with pytest.raises(DataError, match=r"x\.jsonl:4: byte 0xe9 at column 13 is not UTF-8"):
        samples[2]


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 22])
def test_the_items_of_a_json_array_are_found_without_reading_it_whole(tmp_path, monkeypatch, block):
    """LongAlpaca is one array of 500 MB. Brackets, quotes and backslashes in texts; blocks that cut anywhere."""
    monkeypatch.setattr(sources, "_BLOCK", block)
    records = [
        {"prompt_ids": [1], "answer_ids": [2], "note": '"]}[{\\'},
        {"note": ['\\"', {"deep": ["[", "\u00e9]"]}], "prompt_ids": [3], "answer_ids": [4]},
        {"prompt_ids": [5], "answer_ids": [6], "note": ""},
    ]
    path = tmp_path / "x.json"
    path.write_text(f"\ufeff \n{json.dumps(records, indent=1, ensure_ascii=False)}\n", encoding="utf-8")
    samples = Samples(path, None)
    assert [samples[i].prompt_ids for i in range(len(samples))] == [[1], [3], [5]]
    assert samples[1].name == f"{path}[1]"


def test_a_json_array_cut_short_is_an_error(tmp_path):
    path = write(tmp_path / "x.json", b'[{"prompt_ids": [1], "answer_ids": [2]}, {"prompt_ids": [1], "answ')
    with pytest.raises(DataError, match=r"x\.json: the JSON array does not end \(1 whole items\)"):
        Samples(path, None)


def test_missing_and_empty_files_are_errors(tmp_path, tiny_tokenizer):
    with pytest.raises(DataError, match=r"no\.jsonl cannot be read: No such file"):
        Samples(tmp_path / "no.jsonl", tiny_tokenizer)
    with pytest.raises(DataError, match=r"no samples in .*empty\.jsonl"):
        Samples(write(tmp_path / "empty.jsonl", b"\n \n"), tiny_tokenizer)


def test_the_digest_changes_with_the_data(tmp_path, tiny_tokenizer):
    one, two = {"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "c"}
    digests = {
        Samples(write(tmp_path / "x.jsonl", *lines), tiny_tokenizer).digest for lines in ([one], [two], [one, two])
    }
    assert len(digests) == 3
    assert Samples([one], None).digest == Samples([dict(one)], None).digest != Samples([two], None).digest


def test_the_order_is_a_function_of_seed_and_epoch():
    assert sorted(shuffled(50, 3, 0)) == list(range(50))
    assert shuffled(50, 3, 0) == shuffled(50, 3, 0)
    assert len({tuple(shuffled(50, seed, epoch)) for seed in (3, 4) for epoch in (0, 1)}) == 4
    assert shuffled(6, 0, 0) == [2, 3, 1, 0, 5, 4]  # the same on every machine and Python
