"""Generated evaluation tasks: published templates, exact lengths with any tokenizer, same bytes, gold and wrong."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import build_byte_tokenizer
from transformers import AutoTokenizer

import locret
from locret.errors import ConfigError, DataError
from locret.tasks.filler import ProseFiller
from locret.tasks.gauge import Draft, Plan, fit, gauge_of
from locret.tasks.haystack import Haystack, sentences
from locret.tasks.infinitebench import order_statistic
from locret.tasks.metrics import check, score
from locret.tasks.public import SETS
from locret.tasks.suite import MODES, TASKS, generate, group, options_of, prompt

EMBEDDED = Path(locret.__file__).parent / "models" / "embedded"
LENGTHS = {"embedded": 4096, "bytes": 8192, "plain": 8192}
SLACK = {"embedded": 260, "bytes": 900, "plain": 900}  # most tokens of one unit (a paragraph of qa)


@pytest.fixture(scope="module")
def tokenizers():
    """Digits apart, one token a byte, and one token a byte without a chat template."""
    return {
        "embedded": AutoTokenizer.from_pretrained(EMBEDDED),
        "bytes": build_byte_tokenizer(),
        "plain": build_byte_tokenizer(None),
    }


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["embedded"]


def take(task, tokenizer, mode="hardened", count=1, length=4096, **options):
    return list(generate(task, count=count, length=length, tokenizer=tokenizer, mode=mode, **options))


def questions(record):
    """(question, answers, spans) of all turns."""
    first = (record.question, record.answers, record.spans)
    return [first, *((turn.question, turn.answers, turn.spans) for turn in record.turns)]


# ---------------------------------------------------------------------- lengths, bytes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", LENGTHS)
def test_prompts_fill_the_length_and_never_pass_it(name, task, mode, tokenizers):
    tokenizer, length = tokenizers[name], LENGTHS[name]
    limit = length - TASKS[task].max_new_tokens[mode] * (mode == "official" and TASKS[task].group == "ruler")
    for record in take(task, tokenizer, mode, count=2 if name == "embedded" else 1, length=length):
        tokens = len(tokenizer(prompt(record, tokenizer), add_special_tokens=False).input_ids)
        assert tokens == record.meta["tokens"]
        assert limit - SLACK[name] < tokens <= limit
        assert record.max_new_tokens == TASKS[task].max_new_tokens[mode]
        check(record.metric, record.answers)


def test_a_prompt_is_the_template_around_the_texts(tokenizers):
    record = take("passkey", tokenizers["embedded"], length=600)[0]
    text = f"<|bos|><|user|>{record.context}{record.question}<|end|><|assistant|>{record.answer_prefix}"
    assert prompt(record, tokenizers["embedded"]) == text
    assert prompt(record, tokenizers["plain"]) == f"<bos>{record.context}{record.question}{record.answer_prefix}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", TASKS)
def test_the_same_arguments_give_the_same_bytes(task, mode, tokenizer):
    def bytes_of(**options):
        return [json.dumps(asdict(r)).encode() for r in take(task, tokenizer, mode, length=2500, **options)]

    one = bytes_of(count=2)
    assert one == bytes_of(count=3)[:2]
    assert one[0] != one[1]
    assert one[:1] != bytes_of(count=1, seed=1) or (task, mode) == ("niah", "official")  # nothing is random there


def test_a_sample_does_not_depend_on_what_was_generated_before(tokenizer):
    """Caches of measured units and of haystacks are shared: they must not leak into the text."""
    alone = take("niah_multikey_2", tokenizer, length=3000)[0]
    take("niah_multikey_2", tokenizer, length=8000, count=2)
    assert take("niah_multikey_2", tokenizer, length=3000)[0] == alone


def test_fit_finds_the_most_units(tokenizer):
    """Against trying every number; costs are off by up to a factor of two, and jump."""
    gauge = gauge_of(tokenizer)
    for seed in range(6):
        rng = random.Random(seed)
        words = [rng.choice(("a", "steamship", "12345", "uuid-like", "\n\n", "  x")) for _ in range(400)]
        factor = rng.choice((0.5, 1.0, 2.0))

        def write(num, words=words):
            return Draft(" ".join(words[:num]), "?", ("x",))

        plan = Plan(write, lambda num, factor=factor: int(factor * 3 * num), least=1, most=400)
        limit = rng.randrange(30, 700)
        draft, size = fit(plan, gauge, limit, "test")
        fits = [num for num in range(1, 401) if gauge.count(gauge.prompt(write(num))) <= limit]
        assert size == gauge.count(gauge.prompt(draft)) <= limit
        assert len(draft.context.split(" ")) >= len(write(fits[-1]).context.split(" ")) - 3


def test_too_short_a_length_says_how_much_is_needed(tokenizer):
    with pytest.raises(ConfigError, match=r"'cwe' needs at least \d+ tokens of prompt .* 480 are left"):
        take("cwe", tokenizer, "official", length=600)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(task="nihs", count=1), "did you mean 'niah'"),
        (dict(task="vt", count=1, mode="hard"), "did you mean 'hardened'"),
        (dict(task="vt", count=0), "at least one"),
        (dict(task="vt", count=1, hops=3), "valid: num_hops"),
        (dict(task="niah", count=1, depths=(0.5, 2)), "from 0"),
        (dict(task="kv_multi_turn", count=1, num_questions=0), "at least one question"),
    ],
)
def test_bad_requests_are_said(arguments, message, tokenizer):
    with pytest.raises(ConfigError, match=message):
        list(generate(**{"length": 2000, "tokenizer": tokenizer, **arguments}))


def test_groups_name_their_tasks():
    assert len(group("ruler")) == 13
    assert group("ruler")[0] == "niah_single_1"
    assert group("vt") == ["vt"]
    assert options_of("niah_multikey_1") == {"num_keys": 4, "num_values": 1, "num_queries": 1}
    with pytest.raises(ConfigError, match="did you mean 'ruler'"):
        group("rular")


def test_answer_prefixes_can_be_left_out(tokenizer):
    record = take("needles_scdq", tokenizer, length=1500, answer_prefix=False)[0]
    assert record.answer_prefix == ""
    assert all(turn.answer_prefix == "" for turn in record.turns)
    assert record.meta["tokens"] > 1490
    assert record.max_new_tokens == TASKS["needles_scdq"].max_new_tokens["hardened"] + 32


# ---------------------------------------------------------------------- gold spans, gold scores, wrong scores


# tasks whose answer stands in its gold text word for word
LITERAL = [t for t in TASKS if t not in ("code_run", "math_find", "babi_qa1", "babi_qa2", "babi_qa3")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", LITERAL)
def test_gold_spans_hold_the_answer(task, mode, tokenizer):
    for record in take(task, tokenizer, mode, count=3):
        for _, answers, spans in questions(record):
            gold = "\n".join(record.context[a:b] for a, b in spans)
            if TASKS[task].metric == "string_match_part":
                assert any(answer in gold for answer in answers)
            else:
                assert all(answer in gold for answer in answers)


# short answers and names may stand elsewhere too
SHORT = ("many_shot_icl", "dialogue_mask", "qa_1", "qa_2", "verbatim_copy")


@pytest.mark.parametrize("task", [task for task in LITERAL if task not in SHORT])
def test_nothing_but_the_gold_text_holds_the_answer(task, tokenizer):
    for record in take(task, tokenizer, count=3):
        for _, answers, spans in questions(record):
            rest = list(record.context)
            for a, b in spans:
                rest[a:b] = " " * (b - a)
            outside = "".join(rest)
            example = outside.rfind("Memorize") if task in ("cwe", "vt") else 0  # the solved example comes first
            assert not any(re.search(rf"\b{re.escape(answer)}\b", outside[example:]) for answer in answers)


GOLD = {"babilong": 1, "infinitebench_dialogue": 1}  # answers that are right; the others are what must not be said


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", TASKS)
def test_gold_scores_100_and_another_samples_gold_0(task, mode, tokenizer):
    records = take(task, tokenizer, mode, count=4)
    metric = TASKS[task].metric
    for record, other in zip(records, records[1:] + records[:1], strict=True):
        gold = record.answers[: GOLD.get(metric)]
        end = "" if metric == "word_prefix" else "."
        assert score(metric, " " + ", ".join(gold) + end, record.answers) == 100
        wrong = other.answers[: GOLD.get(metric)]
        if not {*wrong} & {*gold}:
            assert score(metric, ", ".join(wrong), record.answers) <= (20 if task in ("cwe", "niah") else 0)
        assert score(metric, "", record.answers) == 0


# ---------------------------------------------------------------------- RULER, word for word

NOISE = r"The grass is green\. The sky is blue\. The sun is yellow\. Here we go\. There and back again\."
KINDS = {"words": r"[A-Za-z]+-[A-Za-z]+", "numbers": r"[1-9]\d{6}"}
KINDS["uuids"] = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NIAH = {  # task: haystack, type of keys, of values, keys, values, queries
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", NIAH)
def test_niah_follows_the_published_template(task, mode, tokenizer):
    haystack, key, value, num_keys, num_values, num_queries = NIAH[task]
    single = num_values * num_queries == 1
    kind = value[:-1] if single else value
    some, are, are_all = ("A", "is", "is") if single else ("Some", "are", "are all")
    for record in take(task, tokenizer, mode, count=3):
        head = f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
        head += f"I will quiz you about the {kind} afterwards.\n"
        assert record.context.startswith(head)
        assert record.context.endswith("\n")
        body = record.context[len(head) : -1]
        queries = rf"{KINDS[key]}(?:, {KINDS[key]})*(?:, and {KINDS[key]})?"
        asked = re.fullmatch(
            rf"What {are_all} the special magic {kind} for ({queries}) mentioned in the provided text\?",
            record.question,
        )
        assert asked
        assert record.answer_prefix == (
            f" The special magic {kind} for {asked.group(1)} mentioned in the provided text {are}"
        )
        needle = rf"One of the special magic {value} for ({KINDS[key]}) is: ({KINDS[value]})\."
        found = re.findall(needle, body)
        wanted = asked.group(1).replace(", and ", ", ").split(", ")
        assert len(wanted) == num_queries
        facts = Counter(k for k, _ in found)
        assert all(facts[k] == num_values for k in wanted)
        assert {v for k, v in found if k in wanted} == set(record.answers)
        assert len({v for _, v in found}) == len(found)
        if haystack == "needle":
            assert all(re.fullmatch(needle, line) for line in body.split("\n"))
            assert len(found) > 40
            assert len(facts) == len(found)
        else:
            assert len(found) == num_keys * num_values
        if haystack == "noise":
            plain = re.sub(needle, "", body).split("\n")
            assert len({*plain}) == 2  # one line of noise again and again, and what is left of the needle
            if mode == "official":
                assert all(re.fullmatch(NOISE, line) for line in plain if line)


@pytest.mark.parametrize("mode", MODES)
def test_vt_follows_the_published_template(mode, tokenizer):
    for record in take("vt", tokenizer, mode, count=3):
        head = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        question = r"Question: Find all variables that are assigned the value (\d{5}) in the text above."
        prefix = (
            r" Answer: According to the chain\(s\) of variable assignment in the text above, 5 variables are assigned "
            r"the value (\d{5}), they are: "
        )
        _, example, body = record.context.split(head)
        solved = re.fullmatch(rf"(?s)(.*)\n{question}{prefix} ((?:[A-Z]{{3}} ){{4}}[A-Z]{{3}})\n\n", example)
        assert solved
        assert solved.group(2) == solved.group(3)
        assert chain(solved.group(1), solved.group(2)) == solved.group(4).split()
        assert len(tokenizer(head + example).input_ids) < 520
        value = re.fullmatch(question, record.question).group(1)
        assert re.fullmatch(prefix, record.answer_prefix).group(1) == value
        assert chain(body, value) == list(record.answers)
        assert all(re.fullmatch("[A-Z]{5}", name) for name in record.answers)
        if mode == "official":
            lines = body.removesuffix("\n").split("\n")
            assert sum(not re.fullmatch(NOISE, line) for line in lines) == 5


def chain(text, value):
    """Variables with this value, found by reading line by line."""
    held = []
    for name, source in re.findall(r"VAR ([A-Z]+) = (\d+|VAR [A-Z]+)", text):
        if source == value or source.removeprefix("VAR ") in held:
            held.append(name)
    return held


@pytest.mark.parametrize(("length", "often", "seldom"), [(6000, 30, 3), (2500, 6, 1)])
@pytest.mark.parametrize("mode", MODES)
def test_cwe_follows_the_published_template(mode, length, often, seldom, tokenizer):
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    question = "Question: What are the 10 most common words in the above list?"
    prefix = " Answer: The top 10 words that appear most often in the list are:"
    for record in take("cwe", tokenizer, mode, count=2, length=length):
        assert (record.question, record.answer_prefix) == (question, prefix)
        _, example, body = record.context.split(head)
        shown, solved = example.split(f"\n{question}{prefix} ")
        assert Counter(counts_of(shown).values()) == ({10: 10, 3: 30} if often == 30 else {3: 10, 1: 10})
        assert {*re.findall(r"\d+\. (\S+)", solved)} == {
            w for w, n in counts_of(shown).items() if n in (10, often // 2)
        }
        counts = counts_of(body.removesuffix("\n"))
        assert {word for word, count in counts.items() if count == often} == set(record.answers)
        assert {*counts.values()} == {often, seldom}
        assert len(record.answers) == 10


def counts_of(text):
    entries = re.findall(r"(\d+)\. (\S+)", text)
    assert " ".join(f"{i}. {word}" for i, word in entries) == text
    assert [int(i) for i, _ in entries] == list(range(1, len(entries) + 1))
    return Counter(word for _, word in entries)


@pytest.mark.parametrize("mode", MODES)
def test_fwe_follows_the_published_template(mode, tokenizer):
    for record in take("fwe", tokenizer, mode, count=3):
        body = re.fullmatch(
            r"Read the following coded text and track the frequency of each coded word\. Find the three most "
            r"frequently appeared coded words\. (.*)\n",
            record.context,
        ).group(1)
        assert record.question == (
            "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text?"
        )
        assert record.answer_prefix == (
            " Answer: According to the coded text above, the three most frequently appeared words are:"
        )
        ranks = Counter(body.split(" ")).most_common()
        assert ranks[0][0] == "..."
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranks[1:])
        assert [word for word, _ in ranks[1:4]] == list(record.answers)
        assert ranks[3][1] > ranks[4][1]
        assert ranks[1][1] / ranks[0][1] == pytest.approx(1 / 4, rel=0.05)  # zeta law with exponent 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_qa_follows_the_published_template(task, mode, tokenizer):
    order = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    places = []
    for record in take(task, tokenizer, mode, count=6):
        head = f"{order}\n\nThe following are given documents.\n\n"
        assert record.context.startswith(head)
        assert record.context.endswith("\n\n")
        documents = re.split(r"(?:^|\n\n)Document \d+:\n", record.context[len(head) : -2])[1:]
        numbers = re.findall(r"(?:^|\n\n)Document (\d+):\n", record.context[len(head) :])
        assert [int(n) for n in numbers] == list(range(1, len(documents) + 1))
        assert re.fullmatch(re.escape(order) + r"\n\nQuestion: .*\?", record.question)
        assert record.answer_prefix == " Answer:"
        assert len(record.spans) == (1 if task == "qa_1" else 2)
        assert all(record.context[a:b] in documents for a, b in record.spans)
        places.append([documents.index(record.context[a:b]) for a, b in record.spans])
        assert any(answer in record.context for answer in record.answers)
    assert mode == "official" or len({*map(tuple, places)}) > 1


def test_official_layouts_repeat_and_hardened_ones_do_not(tokenizer):
    """The published quirk: needles are shuffled with the same seed in every sample."""
    order = {}
    for mode in MODES:
        layouts = set()
        for record in take("niah_multivalue", tokenizer, mode, count=8, length=1500):
            where = [record.context.index(answer) for answer in record.answers]
            layouts.add(tuple(sorted(range(4), key=where.__getitem__)))
        order[mode] = len(layouts)
    assert order["official"] == 1
    assert order["hardened"] > 2


def test_qa_reads_squad_and_hotpotqa_files(tokenizer, tmp_path):
    def asked(text, answers):
        return {
            "question": text,
            "is_impossible": not answers,
            "answers": [{"text": a, "answer_start": 0} for a in answers],
        }

    def paragraph(name):
        return {
            "context": f"A paragraph says {name}.",
            "qas": [asked(f"Does it say {name}?", [name]), asked("No?", [])],
        }

    squad = {"data": [{"title": t, "paragraphs": [paragraph(f"{t}{i}") for i in range(4)]} for t in "ABC"]}
    hotpot = [
        {
            "question": f"Q{i}?",
            "answer": f"answer{i}",
            "context": [[f"T{i}{j}", ["one. ", f"answer{i}."]] for j in "ab"],
        }
        for i in range(6)
    ]
    for name, data, gold in (("squad.json", squad, 1), ("hotpot.json", hotpot, 2)):
        (tmp_path / name).write_text(json.dumps(data))
        for record in take("qa_1", tokenizer, count=2, pool=str(tmp_path / name), length=3000):
            assert len(record.spans) == gold
            assert record.answers[0] in record.context[slice(*record.spans[0])]
            assert record.context.count("Document ") == 12  # the whole pool fits, once
    with pytest.raises(DataError, match="rajpurkar"):
        take("qa_1", tokenizer, pool=str(tmp_path / "none.json"))
    (tmp_path / "other.json").write_text('{"x": 1}')
    with pytest.raises(DataError, match="neither SQuAD nor HotpotQA"):
        take("qa_1", tokenizer, pool=str(tmp_path / "other.json"))


# ---------------------------------------------------------------------- InfiniteBench, word for word


@pytest.mark.parametrize("task", ["passkey", "number_string"])
def test_passkeys_follow_the_published_template(task, tokenizer):
    what, middle = ("pass key", " and memorize them") if task == "passkey" else ("sequence of digits", "")
    for record in take(task, tokenizer, "official", count=5):
        digits = record.answers[0]
        grammar = (
            rf"There is an important info hidden inside a lot of irrelevant text\. Find it{middle}\. I will quiz you "
            rf"about the important information there\.\n\n(?:{NOISE}\n)*"
            rf"The {what} is {digits}\. Remember it\. {digits} is the {what}\.\n(?:{NOISE}\n)*\n"
        )
        assert re.fullmatch(grammar, record.context)
        assert record.question == f"What is the {what}?\n\n"
        assert record.answer_prefix == f"The {what} is"
        assert len(digits) == (5 if task == "passkey" else 10)
        if task == "number_string":  # five were doubled in place
            assert sum(a == b for a, b in pairwise(digits)) >= 5
    depths = [r.meta["depths"][0] for r in take(task, tokenizer, "official", count=12, length=800)]
    assert min(depths) < 0.1
    assert max(depths) > 0.85


@pytest.mark.parametrize("task", ["kv_retrieval", "kv_multi_turn"])
def test_kv_follows_the_published_template(task, tokenizer):
    for record in take(task, tokenizer, "official", count=3):
        text = re.fullmatch(
            r"Extract the value corresponding to the specified key in the JSON object below\.\n\nJSON data:\n(.*)\n\n",
            record.context,
        ).group(1)
        data = json.loads(text)
        assert all(re.fullmatch(KINDS["uuids"], part) for pair in data.items() for part in pair)
        assert text == json.dumps(data)
        assert len(data) == record.meta["num_units"]
        asked = []
        for question, answers, spans in questions(record):
            key = re.fullmatch(r'Key: "(.*)"\nThe value associated with the specified key is: ', question).group(1)
            assert answers == (data[key],)
            assert [record.context[a:b] for a, b in spans] == [f'"{key}": "{data[key]}"']
            asked.append(key)
        assert len({*asked}) == (5 if task == "kv_multi_turn" else 1)


def test_math_find_follows_the_published_template(tokenizer):
    seen = set()
    for record in take("math_find", tokenizer, "official", count=14, length=1000):
        which, text = re.fullmatch(
            r"What is the ((?:(?:second |third )?(?:largest|smallest))|median) number in the following list\?\n\n"
            r"(\[.*\])\n\n",
            record.context,
        ).groups()
        assert record.question == (
            f"You should answer with only one number, no other words. The {which} number of the list is: "
        )
        numbers = json.loads(text)
        assert all(0 <= n <= 99 for n in numbers)
        place = {"second": 1, "third": 2}.get(which.split()[0], 0)
        if which == "median":
            ordered = sorted(numbers)
            expected = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        else:
            expected = sorted({*numbers}, reverse="largest" in which)[place]
        assert float(record.answers[0]) == expected
        seen.add((which, record.answers[0]))
        if which != "median":
            assert {record.context[a:b] for a, b in record.spans} == {record.answers[0]}
    assert len({which for which, _ in seen}) == 7
    assert len(seen) > 10


def test_second_and_third_count_different_values_and_the_median_may_lie_between():
    numbers = [1, 1, 2, 5, 8, 9]
    found = {
        which: order_statistic(numbers, which) for which in ("largest", "third largest", "second smallest", "median")
    }
    assert found == {"largest": "9", "third largest": "5", "second smallest": "2", "median": "3.5"}
    assert order_statistic([1, 3, 7], "median") == "3"
    assert order_statistic([1, 3, 5, 7], "median") == "4"


@pytest.mark.parametrize("mode", MODES)
def test_code_run_is_python_that_returns_the_answer(mode, tokenizer):
    for i, record in enumerate(take("code_run", tokenizer, mode, count=6)):
        code = record.context.split("Python code.\n\n", 1)[1]
        names: dict = {}
        exec(code, names)
        if mode == "official":
            call = re.fullmatch(r"Please compute the exact value of (func_\d+\(-?\d+\))\. ", record.question).group(1)
            assert record.answer_prefix == f"The value of {call} is"
            assert record.context.startswith(f"There is a function called {call.split('(')[0]} in the following ")
        else:
            call = re.search(r"func_\d+\(-?\d+\)", record.question).group()
        assert eval(call, names) == int(record.answers[0])
        gold = "".join(record.context[a:b] for a, b in record.spans)
        assert len(record.spans) == (2 + 2 * (i % 5) if mode == "official" else 2)
        alone: dict = {}
        exec(gold, alone)
        assert eval(call, alone) == int(record.answers[0])  # the gold functions are enough
        assert re.fullmatch(r"(?:def func_\d+\(x\):\n    return (?:x|func_\d+\(x\)) [+-] \d+\n\n?)+\n*", code)


# ---------------------------------------------------------------------- the others


def test_niah_covers_its_depths(tokenizer):
    records = take("niah", tokenizer, "official", count=11, length=3000)
    for i, record in enumerate(records):
        (a, b), depth = record.spans[0], record.meta["depths"][0]
        assert depth == i / 10
        assert a / (len(record.context) - (b - a)) == pytest.approx(depth, abs=0.03)
        assert record.context[a:b].startswith("The best thing to do in San Francisco is eat a sandwich")
    fixed = take("niah", tokenizer, count=2, length=2000, depths=(0.5,))
    assert {r.meta["depths"][0] for r in fixed} == {0.5}
    assert fixed[0].question != fixed[1].question


def test_multi_turn_asks_different_things_of_one_context(tokenizer):
    for task in ("kv_multi_turn", "needles_scdq"):
        record = take(task, tokenizer, num_questions=7)[0]
        assert len(record.turns) == 6
        assert len({question for question, _, _ in questions(record)}) == 7
        assert len({spans for _, _, spans in questions(record)}) == 7


def test_the_masked_speaker_can_be_told(tokenizer):
    for record in take("dialogue_mask", tokenizer, count=5):
        told, masked = sorted((record.context[a:b] for a, b in record.spans), key=lambda line: line[0] == "$")
        assert masked.startswith("$$MASK$$: ")
        assert record.context.count("$$MASK$$:") == 1
        assert told.startswith(f"{record.answers[0]}: ")
        assert len({*re.findall(r"\w+", told.lower())} & {*re.findall(r"\w+", masked.lower())}) > 1  # "the ferry"


def test_verbatim_quotes_what_occurs_once(tokenizer):
    for record in take("verbatim_copy", tokenizer, count=4):
        quote = re.search('"(.*)"$', record.question).group(1)
        assert len(quote.split()) == 12
        assert record.context.count(quote) == 1
        assert record.context.split(quote)[1].split()[:16] == record.answers[0].split()


def test_icl_labels_are_this_samples_own(tokenizer):
    records = take("many_shot_icl", tokenizer, count=4)
    for record in records:
        pairs = re.findall(r"(.+)\nlabel: (\d+)", record.context)
        assert record.question not in {text for text, _ in pairs}
        assert len({label for _, label in pairs}) == 24
        gold = {label for a, b in record.spans for _, label in re.findall(r"(.+)\nlabel: (\d+)", record.context[a:b])}
        assert gold == {record.answers[0]}
    assert len({record.answers for record in records}) > 1


@pytest.mark.parametrize("level", [1, 2, 3])
def test_babi_answers_follow_from_the_story(level, tokenizer):
    """Read the story again with other code, and again with nothing but the gold lines."""
    for record in take(f"babi_qa{level}", tokenizer, count=12, length=2500):
        assert babi_answer(record.context, record.question) == record.answers[0]
        gold = " ".join(record.context[a:b] for a, b in record.spans)
        assert babi_answer(gold, record.question) == record.answers[0]


def babi_answer(text, question):
    where, carried, history = {}, {}, {}
    people = "Mary|John|Daniel|Sandra"
    for who, verb, what in re.findall(rf"\b({people}) ((?:\w+ )?(?:\w+ )?\w+) the (\w+)\.", text):
        if verb.endswith(" to"):
            where[who] = what
            for thing in carried.get(who, []):
                history[thing] = [p for p in history.get(thing, []) if p != what or history[thing][-1] != what] + [what]
        elif verb in ("picked up", "took", "grabbed", "got"):
            carried.setdefault(who, []).append(what)
            if who in where and history.get(what, [None])[-1] != where[who]:
                history.setdefault(what, []).append(where[who])
        else:
            if what in carried.get(who, []):
                carried[who].remove(what)
    if found := re.fullmatch(rf"Where is ({people})\?", question):
        return where[found.group(1)]
    if found := re.fullmatch(r"Where is the (\w+)\?", question):
        return history[found.group(1)][-1]
    thing, place = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question).groups()
    return history[thing][history[thing].index(place) - 1]


@pytest.mark.parametrize("task", [name for name, info in TASKS.items() if info.dense])
def test_the_ceiling_of_dense_tasks_is_budget_over_units(task, tokenizer):
    record = take(task, tokenizer, length=8192)[0]
    ceiling = TASKS[task].query_agnostic_ceiling
    assert ceiling is not None
    tokens = record.meta["num_units"] * record.meta["unit_tokens"]
    assert 0.9 * 8192 < tokens < 8192
    assert ceiling(record, 2048) == pytest.approx(100 * 2048 / tokens)
    assert ceiling(record, 10**6) == 100
    assert TASKS["niah_single_1"].query_agnostic_ceiling is None


def test_haystacks_come_from_folders_and_wrap_around(tokenizer, tmp_path):
    (tmp_path / "essay.txt").write_text("\n\n".join(f"Sentence number {i} stands here." for i in range(60)))
    records = take("niah_single_2", tokenizer, "official", length=2000, filler=tmp_path)
    assert "Sentence number 0 stands here. " in records[0].context
    assert records[0].context.count("Sentence number 5 stands here.") > 1
    prose = take("niah_single_2", tokenizer, length=2000, filler=ProseFiller.from_seed(1, tokenizer, 400))
    assert prose[0].context != take("niah_single_2", tokenizer, length=2000)[0].context
    haystack = Haystack([f"one two{i}." for i in range(60)])
    assert haystack.sentences(118, 4) == ["one two59.", "one two0."]
    gauge = gauge_of(tokenizer)
    assert haystack.cost(gauge, 118, 4) == haystack.cost(gauge, 118, 2) + haystack.cost(gauge, 0, 2)
    with pytest.raises(DataError, match="give a file or a folder"):
        take("niah_single_2", tokenizer, filler=tmp_path / "none")
    with pytest.raises(DataError, match="at least 100 words"):
        Haystack(["too short."])


def test_sentences_are_split_where_they_end():
    text = 'He came. "Who?" she asked.  It was 3.5 km to St. Ives! Then (so it is said) nothing.'
    assert sentences(text) == [
        "He came.", '"Who?" she asked.', "It was 3.5 km to St.", "Ives!", "Then (so it is said) nothing.",
    ]  # fmt: skip


def test_the_page_lists_every_task_and_set():
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    rows = set(
        re.findall(r"^\| `(\w+)` \| (\w+) \| (.+?) \| `(\w+)` \| (\d+) / (\d+) \| (yes)? ?\|$", page, re.MULTILINE)
    )
    assert rows == {
        (name, info.group, info.summary, info.metric, str(info.max_new_tokens["official"]),
         str(info.max_new_tokens["hardened"]), "yes" if info.dense else "")
        for name, info in TASKS.items()
    }  # fmt: skip
    assert all(f"`{name}`" in page for name in SETS)
