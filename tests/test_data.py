"""Samples: every form gives the ids that the chat template says; broken input is named with file and line."""

from __future__ import annotations

import itertools
import json
import random
import sys
import tracemalloc

import pytest
from conftest import build_byte_tokenizer

from locret.data import Order, Sample, Samples, check_samples, parse_record, shuffled, sources
from locret.errors import ConfigError, DataError

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


# ---------------------------------------------------------------------- several answers, questions, gold spans


def span_texts(sample, tokenizer):
    return [tokenizer.decode((sample.prompt_ids + sample.answer_ids)[a:b]) for a, b in sample.answers]


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_every_turn_of_the_assistant_is_an_answer(form, tiny_tokenizer):
    roles = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": roles[m["role"]], "value": m["content"]} for m in MESSAGES]
    record = {"messages": MESSAGES} if form == "messages" else {"conversations": turns}
    sample = parse_record(record, tiny_tokenizer)
    assert span_texts(sample, tiny_tokenizer) == ["yes<end>", "quite<end>"]
    assert sample.lost_turns == 0


def test_a_conversation_that_the_assistant_opens_has_no_answer_there(tiny_tokenizer):
    """Nothing precedes it, so it looks back at nothing."""
    messages = [{"role": "assistant", "content": "hello"}, *MESSAGES[1:]]
    assert span_texts(parse_record({"messages": messages}, tiny_tokenizer), tiny_tokenizer) == [
        "yes<end>",
        "quite<end>",
    ]


def test_turns_that_the_template_rewrites_later_are_counted_not_guessed():
    """Templates of thinking models drop the thoughts of earlier turns: where such a turn was is unknown."""
    template = (
        "{% for m in messages %}[{{ m['role'][0] }}]{% if m['role'] == 'assistant' and not loop.last "
        "%}{{ m['content'][:2] }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}"
    )
    tokenizer = build_byte_tokenizer(template)
    sample = parse_record({"messages": MESSAGES[1:]}, tokenizer)
    assert span_texts(sample, tokenizer) == ["quite"]
    assert sample.lost_turns == 1


def test_a_question_may_stand_apart_and_come_first(tiny_tokenizer):
    record = {"document": "long text", "question": "what?", "answer": "this"}
    last, first = (parse_record(record, tiny_tokenizer, question_first=flag) for flag in (False, True))
    assert tiny_tokenizer.decode(last.prompt_ids) == "<bos><|user|>long text\n\nwhat?<end><|assistant|>"
    assert tiny_tokenizer.decode(first.prompt_ids) == "<bos><|user|>what?\n\nlong text\n\nwhat?<end><|assistant|>"
    with pytest.raises(DataError, match="give answer, document, question"):
        parse_record({"prompt": "a", "answer": "b"}, tiny_tokenizer, question_first=True)


def test_gold_spans_are_read_and_checked():
    record = {"prompt_ids": [1, 2, 3, 4], "answer_ids": [5], "gold": [[0, 1], [2, 4]]}
    assert parse_record(record, None).gold == ((0, 1), (2, 4))
    for bad in ([[0, 5]], [[2, 1]], [[1]], "x", [[0, "1"]]):
        with pytest.raises(DataError, match="gold must be ascending pairs"):
            parse_record({**record, "gold": bad}, None)


def test_empty_cells_of_a_table_are_no_values(tiny_tokenizer):
    """A data set of mixed forms has every column in every row."""
    row = {"messages": None, "prompt": "what is it?", "answer": "a thing", "input": None}
    assert texts(parse_record(row, tiny_tokenizer), tiny_tokenizer) == ONE_TURN


# ---------------------------------------------------------------------- the check before the first step


def test_the_check_counts_and_names_what_it_drops(tmp_path, tiny_tokenizer):
    good = {"prompt_ids": [9, 9], "answer_ids": [9]}
    path = write(
        tmp_path / "x.jsonl", good, b"{broken\n", {"prompt": "a", "answer": " "}, good, b'{"prompt": "\xe9"}\n',
        {"prompt_ids": [9] * 30, "answer_ids": [9]}, {"prompt_ids": [9], "answer_ids": [700]},
        {"prompt_ids": [9], "answer_ids": [9] * 50}, b"{also broken\n",
    )  # fmt: skip
    samples = Samples(path, tiny_tokenizer)
    report = check_samples(samples, max_length=20, vocab_size=264, window=40)
    assert [i for i in range(9) if report.kept(i)] == [0, 3]
    assert report.lengths.tolist() == [3, 0, 0, 3, 0, 0, 0, 0, 0]
    assert {reason: (d.count, d.places) for reason, d in report.dropped.items()} == {
        "not JSON": (2, [f"{path}:2", f"{path}:9"]),
        "empty answer": (1, [f"{path}:3"]),
        "not UTF-8": (1, [f"{path}:5"]),
        "over max_length": (1, [f"{path}:6"]),
        "token id outside the vocabulary": (1, [f"{path}:7"]),
        "answer longer than the model's window": (1, [f"{path}:8"]),
    }
    assert report.summary().startswith("7 of 9 samples dropped (2 not JSON, 1 empty answer, ")
    with pytest.raises(DataError, match=r"6 of 9 samples cannot be used, more than max_dropped 50%: 2 not JSON, first"):
        check_samples(samples, max_length=20, vocab_size=264, window=40, max_dropped=0.5)
    check_samples(samples, max_length=20, vocab_size=264, window=40, max_dropped=0.7)  # the long one does not count


def test_a_broken_line_in_a_large_file_is_found_in_constant_memory(tmp_path):
    """40 MB, one bad line in the middle: the check holds one line and a few bytes a line."""
    line = json.dumps({"prompt_ids": [1], "answer_ids": [2], "note": "x" * 10_000}).encode() + b"\n"
    path = tmp_path / "large.jsonl"
    with open(path, "wb") as file:
        for number in range(4000):
            file.write(b'{"prompt_ids": [1], "answer_ids": [\n' if number == 2345 else line)
    assert path.stat().st_size > 39e6
    tracemalloc.start()
    report = check_samples(Samples(path, None), max_length=None, vocab_size=264, window=99)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.dropped["not JSON"].places == [f"{path}:2346"]
    assert peak < 2e6


# ---------------------------------------------------------------------- order


def old_stream(count, dropped, seed, held, number):
    """The order before there was a check: shuffle everything, step over what does not fit."""
    order = shuffled(count, seed, -1)
    pool, taken, epoch = order[held:], [], 0
    while len(taken) < number:
        taken += [pool[i] for i in shuffled(len(pool), seed, epoch) if pool[i] not in dropped]
        epoch += 1
    return taken[:number]


def test_the_order_is_the_one_from_before_there_was_a_check():
    lengths = [0 if i in (3, 7, 8) else 10 for i in range(20)]
    order = Order(lengths, 5, 4, bucketing=False)
    assert [order[n] for n in range(40)] == old_stream(20, {3, 7, 8}, 5, 4, 40)
    assert order.held_out == [i for i in shuffled(20, 5, -1)[:4] if lengths[i]]


def test_bucketed_steps_hold_samples_of_similar_length():
    rng = random.Random(0)
    lengths = [rng.randrange(1, 1000) for _ in range(402)]
    plain, bucketed = (Order(lengths, 0, 2, group=4, bucketing=flag) for flag in (False, True))
    for epoch in range(2):
        places = range(400 * epoch, 400 * (epoch + 1))
        assert sorted(bucketed[n] for n in places) == sorted(plain[n] for n in places)

    def spread(order):
        steps = [[lengths[order[4 * s + i]] for i in range(4)] for s in range(100)]
        return sum(max(step) - min(step) for step in steps) / 100

    assert spread(bucketed) < 20 < spread(plain)
    steps = [lengths[bucketed[4 * s]] for s in range(100)]
    assert sum(a > b for a, b in itertools.pairwise(steps)) > 30  # short and long steps are mixed
    assert [bucketed[n] for n in range(400)] != [bucketed[n] for n in range(400, 800)]


# ---------------------------------------------------------------------- Hugging Face data sets


class FakeDatasets:
    """Stands in for the package: what we call of it."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def load_dataset(self, path, split):
        self.asked.append((path, split))
        if split == "nope":
            raise ValueError("Unknown split 'nope'.\nMore text")
        return self.rows

    def load_from_disk(self, path):
        self.asked.append(("disk", path))
        return self.rows


def test_data_sets_come_by_id_split_or_folder(tmp_path, monkeypatch, tiny_tokenizer):
    rows = [{"messages": MESSAGES[:3], "length": 9}, {"messages": MESSAGES, "length": 12}]
    fake = FakeDatasets(rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    (tmp_path / "state.json").write_text("{}")
    for source in ("hf:THUDM/LongAlign-10k", "hf:a/b:test", tmp_path):
        samples = Samples(source, tiny_tokenizer)
        assert len(samples) == 2
        assert span_texts(samples[1], tiny_tokenizer) == ["yes<end>", "quite<end>"]
    assert samples[0].name == f"{tmp_path}[0]"
    assert fake.asked == [("THUDM/LongAlign-10k", "train"), ("a/b", "test"), ("disk", str(tmp_path))]
    with pytest.raises(DataError, match=r"'a/b', split 'nope', cannot be loaded: ValueError: Unknown split 'nope'\. "):
        Samples("hf:a/b:nope", tiny_tokenizer)


def test_without_the_package_a_data_set_is_a_clear_error(monkeypatch, tiny_tokenizer, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        Samples("hf:a/b", tiny_tokenizer)
    with pytest.raises(ConfigError, match=r"is a folder; give a file of JSON lines .*pip install datasets"):
        Samples(tmp_path, tiny_tokenizer)
