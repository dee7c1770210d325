"""Public benchmarks in small files of their real formats: prompts, metrics, gold answers, errors for bad files."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
from conftest import build_byte_tokenizer

from locret.errors import ConfigError, DataError
from locret.tasks.metrics import score
from locret.tasks.public import SETS, export_kvpress, load_public, to_kvpress
from locret.tasks.public.recall import split_ruler
from locret.tasks.suite import TASKS, generate, prompt

try:
    import jieba  # noqa: F401

    HAVE_JIEBA = True
except ImportError:
    HAVE_JIEBA = False

OPTIONS = ["Red", "Green", "Blue", "Gray"]
LONG = "Once upon a time {x} there were {input} braces in a book."


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(list(rows), ensure_ascii=False))
    else:
        path.write_text(text)
    return path


def text_of(record):
    return record.context + record.question + record.answer_prefix


# ---------------------------------------------------------------------- InfiniteBench

INFINITE = {  # task: (row without context, prompt around the context, a right answer)
    "passkey": (
        {"input": "What is the pass key?", "answer": ["12345"], "options": []},
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.\n\n{}\n\nWhat is the pass key?\n\nThe pass key is",
        " 12345.",
    ),
    "number_string": (
        {"input": "What is the sequence of digits?", "answer": "1122334455"},
        "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you about the "
        "important information there.\n\n{}\n\nWhat is the sequence of digits?\n\nThe sequence of digits is",
        "1122334455",
    ),
    "kv_retrieval": (
        {"input": 'Key: "ab"\nThe value associated with the specified key is: ', "answer": ["cd"]},
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{}\n\nKey: "
        '"ab"\nThe value associated with the specified key is: ',
        '"cd"',
    ),
    "longbook_sum_eng": ({"input": "", "answer": ["a b c"]}, "Summarize the book below.\n\n{}\n\nSummary:", "a b c"),
    "longbook_choice_eng": (
        {"input": "Which?", "answer": ["Green"], "options": OPTIONS},
        "Read the book and answer the question.\n\n{}\n\nQuestion: Which?\nA. Red\nB. Green\nC. Blue\nD. Gray\n\n"
        "The letter of the correct answer is",
        " B",
    ),
    "longbook_qa_eng": (
        {"input": "Who {A}?", "answer": ["Tom", "Tommy"]},
        "Read the book and answer the question. Be very concise in your answer.\n\n{}\n\nQuestion: Who {A}?\nAnswer:",
        "tommy",
    ),
    "longbook_qa_chn": (
        {"input": "谁？", "answer": ["汤姆"]}, "阅读以下书籍然后回答问题。\n\n{}\n\n问题：谁？\n答案：",
        "汤姆",
    ),
    "longdialogue_qa_eng": (
        {"input": "Which character?", "answer": ["TOM"]},
        "Below is a dialogue script where one random occurrence of a character name is replaced with "
        '"$$MASK$$", and you should try to guess who that character is.\n\n{}\n\n'
        "The name that has been replaced with $$MASK$$ is likely",
        " Tom.",
    ),
    "math_find": (
        {"input": "You should answer with only one number, no other words. The largest number of the list is: ",
         "answer": [97]},
        "What is the largest number in the following list?\n\n{}\n\nYou should answer with only one number, no other "
        "words. The largest number of the list is: ",
        "97",
    ),
    "math_calc": (
        {"input": "", "answer": [1, 4, 8]},
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: {}\nValues:",
        "[1, 4, 8]",
    ),
    "code_run": (
        {"input": "Please give me the exact number of the return value of func_1(-3). Be concise.", "answer": [-4]},
        "There is a function called func_1 in the following Python code.\n\n{}\n\nPlease compute the exact value of "
        "func_1(-3). The value of func_1(-3) is",
        " -4",
    ),
    "code_debug": (
        {"input": "Which?", "answer": ["Blue"], "options": OPTIONS},
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
        "crash.\n\n{}\n\nOptions:\nA. Red\nB. Green\nC. Blue\nD. Gray\n\nThe correct option is:",
        "C.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", INFINITE)
def test_infinitebench(task, tmp_path):
    row, template, gold = INFINITE[task]
    file = write(tmp_path / f"{task}.jsonl", {"id": 7, "context": LONG, **row})
    record = next(load_public("infinitebench", path=file))
    assert text_of(record) == template.replace("{}", LONG)
    assert LONG in record.context
    assert record.task == f"infinitebench/{task}"
    assert score(record.metric, gold, record.answers) == pytest.approx(100)
    assert score(record.metric, "none 0", record.answers) == 0
    limits = dict(passkey=6, number_string=12, kv_retrieval=50, longbook_sum_eng=1200, math_find=3, math_calc=30000,
                  code_run=5, code_debug=5)  # fmt: skip
    assert record.max_new_tokens == limits.get(task, 40)


def test_generated_and_published_infinitebench_have_the_same_prompt(tmp_path):
    """The generator's official prompt is what the loader makes of the same content in a published row."""
    tokenizer = build_byte_tokenizer(None)
    for task in ("passkey", "number_string"):
        made = next(generate(task, count=1, length=1500, tokenizer=tokenizer, mode="official"))
        head, body = made.context.split("there.\n\n", 1)
        row = {
            "id": 0,
            "context": body.removesuffix("\n\n"),
            "input": INFINITE[task][0]["input"],
            "answer": made.answers,
        }
        read = next(load_public("infinitebench", path=write(tmp_path / f"{task}.jsonl", row)))
        assert prompt(read, tokenizer) == prompt(made, tokenizer)
        assert (read.metric, read.max_new_tokens) == (made.metric, made.max_new_tokens)
        assert head


# ---------------------------------------------------------------------- LongBench

LONGBENCH_GOLD = {
    "trec": "Number", "lsht": "Number", "passage_count": "7", "passage_retrieval_en": "Paragraph 7",
    "passage_retrieval_zh": "段落7",
}  # fmt: skip


@pytest.mark.parametrize("task", SETS["longbench"].tasks)
def test_longbench(task, tmp_path):
    gold = LONGBENCH_GOLD.get(task, "the old mill by the river")
    row = {"input": "What {now}?", "context": LONG, "answers": [gold], "length": 4321, "dataset": task,
           "language": "en", "all_classes": ["Number", "Place"], "_id": "x"}  # fmt: skip
    file = write(tmp_path / f"{task}.jsonl", row, row)
    if task in ("multifieldqa_zh", "dureader", "vcsum") and not HAVE_JIEBA:
        with pytest.raises(ConfigError, match="jieba"):
            next(load_public("longbench", path=file))
        return
    one, two = load_public("longbench", path=file)
    assert (one.index, two.index) == (0, 1)
    assert LONG in one.context
    assert ("What {now}?" in one.question) == (
        task not in ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")
    )
    assert one.meta["words"] == 4321
    assert one.meta["chat"] == (task not in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))
    assert score(one.metric, gold, one.answers) == pytest.approx(100, abs=1e-5)
    assert score(one.metric, "qq", one.answers) <= 15


def test_longbench_prompt_is_the_published_one(tmp_path):
    row = {"input": "Who?", "context": "Text.", "answers": ["x"], "length": 9, "all_classes": None, "_id": "x"}
    record = next(load_public("longbench", path=write(tmp_path / "multifieldqa_en.jsonl.gz", row)))
    assert text_of(record) == (
        "Read the following text and answer briefly.\n\nText.\n\nNow, answer the following question based on the above "
        "text, only give me the answer and do not output any other words.\n\nQuestion: Who?\nAnswer:"
    )
    assert record.context.endswith("Text.\n\n")


def test_longbench_and_its_part_e_take_their_own_files(tmp_path):
    row = {"input": "Who?", "context": "Text.", "answers": ["x"], "length": 9, "all_classes": None, "_id": "x"}
    write(tmp_path / "data" / "qasper.jsonl", row)
    write(tmp_path / "data" / "qasper_e.jsonl", {**row, "answers": ["e"]})
    write(tmp_path / "data" / "notes.json", {"a": 1})
    assert [(r.task, r.answers) for r in load_public("longbench", path=tmp_path)] == [("longbench/qasper", ("x",))]
    assert [(r.task, r.answers) for r in load_public("longbench-e", path=tmp_path)] == [("longbench-e/qasper", ("e",))]
    named = write(tmp_path / "mine.jsonl", row)
    assert next(load_public("longbench/qasper", path=named)).task == "longbench/qasper"
    with pytest.raises(DataError, match="no file is named after trec"):
        load_public("longbench/trec", path=tmp_path)


def test_longbench_v2(tmp_path):
    row = {"_id": "1", "domain": "law", "difficulty": "easy", "length": "short", "question": "Which? ",
           "context": " T. ", "answer": "C",
           **{f"choice_{letter}": text for letter, text in zip("ABCD", OPTIONS)}}  # fmt: skip
    record = next(load_public("longbench-v2", path=write(tmp_path / "data.json", row)))
    assert text_of(record) == (
        "Please read the following text and answer the question below.\n\n<text>\nT.\n</text>\n\nWhat is the correct "
        "answer to this question: Which?\nChoices:\n(A) Red\n(B) Green\n(C) Blue\n(D) Gray\n\nFormat your response as "
        'follows: "The correct answer is (insert answer here)".'
    )
    assert score(record.metric, "The correct answer is (C).", record.answers) == 100
    assert record.meta["difficulty"] == "easy"


# ---------------------------------------------------------------------- L-Eval, SCBench, HELMET, BABILong, LongAlpaca


@pytest.mark.parametrize(
    ("task", "evaluation", "answer", "said"),
    [
        ("coursera", "exam", "AC", "AC"),
        ("quality", "exam", "(B) Green", "B"),
        ("gsm100", "exam", "So 3 + 4 = 7. The answer is 7", "The answer is 7."),
        ("topic_retrieval_longchat", "exam", "The role of sport", "the role of sport."),
        ("sci_fi", "exam", "True [fact: False]", "True"),
        ("codeU", "exam", "[1, 2]", "[1, 2]"),
        ("natural_question", "f1", "the old mill", "old mill"),
        ("gov_report_summ", "rouge", "one two three four", "one two three four"),
    ],
)
def test_leval(task, evaluation, answer, said, tmp_path):
    row = {"input": LONG, "instructions": ["Q1?", "Q2?"], "outputs": [answer, answer], "source": "s",
           "evaluation": evaluation}  # fmt: skip
    judged = {**row, "evaluation": "human"}
    records = list(load_public("leval", path=write(tmp_path / f"{task}.jsonl", row, judged)))
    assert [record.index for record in records] == [0, 1]  # what people must judge is left out
    assert records[0].context == records[1].context
    assert "Q2?" in records[1].question
    assert LONG in records[0].context
    assert score(records[0].metric, said, records[0].answers) == pytest.approx(100)


def test_leval_rows_must_have_as_many_answers_as_questions(tmp_path):
    row = {"input": "T", "instructions": ["a", "b"], "outputs": ["x"], "evaluation": "f1"}
    with pytest.raises(DataError, match=r"tpo\.jsonl:1: 2 instructions but 1 outputs"):
        list(load_public("leval", path=write(tmp_path / "tpo.jsonl", row)))


def test_scbench(tmp_path):
    asked = [{"input": f'Key: "k{i}"', "answer": f"v{i}"} for i in range(5)]
    write(tmp_path / "scbench_kv.jsonl", {"id": 3, "context": "JSON data:\n{}", "multi_turns": asked})
    choices = [
        {"input": "Which?", "options": OPTIONS, "answer": "Blue"},
        {"input": "And?", "options": OPTIONS, "answer": "A"},
    ]
    write(tmp_path / "scbench_choice_eng.jsonl", {"id": 0, "context": "Book", "multi_turns": choices})
    numbers = [{"input": f"The {w} number is: ", "answer": n} for w, n in (("largest", 9), ("smallest", 1))]
    write(tmp_path / "scbench_mf.jsonl", {"id": 0, "context": "[1, 9]", "multi_turns": numbers})
    mixed = [{"task": "scbench_summary", "input": "Sum up.", "answer": "a b"},
             {"task": "scbench_passkey", "input": "Key?", "answer": "12345"}]  # fmt: skip
    write(tmp_path / "scbench_summary_with_needles.jsonl", {"id": 0, "context": "T", "multi_turns": mixed})
    found = {}
    for record in load_public("scbench", path=tmp_path):
        found.setdefault(record.task, []).append(record)
    [kv] = found["scbench/scbench_kv"]
    assert text_of(kv) == (
        'Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{}\n\nKey: "k0"'
    )
    assert [turn.answers for turn in kv.turns] == [("v1",), ("v2",), ("v3",), ("v4",)]
    assert (kv.max_new_tokens, score(kv.metric, '"v0"', kv.answers)) == (150, 100)
    [choice] = found["scbench/scbench_choice_eng"]
    assert choice.question.endswith("D. Gray\n\nThe the correct answer is")
    assert choice.answers == ("Blue", "C")
    assert choice.turns[0].answers == ("Red", "A")
    [mf] = found["scbench/scbench_mf"]
    assert text_of(mf) == "What is the largest number?\n\n[1, 9]\n\nThe largest number is: "
    assert mf.turns[0].question == "What is the smallest number?\n\nThe smallest number is: "
    parts = found["scbench/scbench_summary_with_needles"]
    assert [text_of(part) for part in parts] == ["T\n\nSum up.", "T\n\nKey?"]
    assert [(r.metric, r.max_new_tokens) for r in parts] == [("rouge_lsum", 800), ("infinitebench_first_number", 15)]


def test_helmet_recall(tmp_path):
    demos = [["d1", "e1"], ["d2", "e2"], ["d3", "e3"]]
    row = {"context": '{"a": "b"}', "question": "a", "answer": "b", "demos": demos, "num_kvs": 1}
    write(tmp_path / "json_kv" / "test_k105_dep6.jsonl", row)
    niah = {"index": 0, "context": "hay", "query": "x-y", "type_needle_v": "numbers", "answer": ["1234567", "7654321"]}
    write(tmp_path / "ruler" / "niah_multivalue" / "validation_8192.jsonl", niah)
    kv, mv = load_public("helmet", path=tmp_path)
    assert text_of(kv) == (
        '{"a": "b"}\n\nExtract the value corresponding to the specified key in the JSON object below.\n\nKey: d1\n'
        "Corresponding value: e1\n\nKey: d2\nCorresponding value: e2\n\nKey: a\nCorresponding value:"
    )
    assert score(kv.metric, "B", kv.answers) == 100
    assert mv.question == "What are all the special magic numbers for x-y mentioned in the provided text?\n"
    assert mv.answer_prefix == "The special magic numbers for x-y mentioned in the provided text are"
    assert score(mv.metric, "1234567", mv.answers) == 50


def test_babilong(tmp_path):
    row = {"input": "Mary went to the kitchen.", "question": "Where is Mary? ", "target": "kitchen"}
    write(tmp_path / "data" / "qa1" / "1k.json", row)
    write(tmp_path / "data" / "qa1" / "2k.json", row, row)
    records = list(load_public("babilong", path=tmp_path, limit=1))
    assert [(r.task, r.index) for r in records] == [("babilong/qa1", 0), ("babilong/qa1", 1)]
    assert score(records[0].metric, "Mary is in the kitchen.", records[0].answers) == 100
    assert score(records[0].metric, "kitchen or office", records[0].answers) == 0
    assert len(records[0].answers) == 6


def test_longalpaca_is_a_prompt_and_its_answer(tmp_path):
    rows = [{"instruction": "Long text. Now sum up.", "input": "", "output": "Sum.", "file": "x"},
            {"instruction": "Add.", "input": "1 2", "output": "3", "file": "y"}]  # fmt: skip
    one, two = load_public("longalpaca", path=write(tmp_path / "LongAlpaca-12k.json", *rows))
    assert (one.context, one.question, one.answers) == ("Long text. Now sum up.", "", ("Sum.",))
    assert two.context == "Add.\n1 2"


# ---------------------------------------------------------------------- RULER's files


@pytest.mark.parametrize("task", [name for name, info in TASKS.items() if info.group == "ruler"])
def test_ruler_files_are_cut_where_the_question_begins(task, tmp_path):
    """A generated sample, written as RULER's scripts write it, is read back as it was; also in the older format."""
    tokenizer = build_byte_tokenizer(None)
    made = next(generate(task, count=1, length=8000, tokenizer=tokenizer, mode="official"))
    row = {"index": 0, "input": made.context + made.question, "outputs": list(made.answers), "length": 8000,
           "answer_prefix": made.answer_prefix}  # fmt: skip
    old = {k: v for k, v in row.items() if k != "answer_prefix"} | {"input": row["input"] + made.answer_prefix}
    write(tmp_path / task / "validation.jsonl", row, old)
    for read in load_public("ruler", path=tmp_path):
        assert (read.context, read.question, read.answer_prefix) == (made.context, made.question, made.answer_prefix)
        assert (read.answers, read.metric, read.max_new_tokens) == (made.answers, made.metric, made.max_new_tokens)
        if task.startswith("niah"):
            assert read.spans == made.spans


def test_a_file_without_rulers_question_is_said(tmp_path):
    with pytest.raises(DataError, match="is this a RULER file"):
        split_ruler("Some text. And then?")


# ---------------------------------------------------------------------- kvpress


def test_kvpress_and_back(tmp_path):
    tokenizer = build_byte_tokenizer()
    options = dict(length=3000, tokenizer=tokenizer)
    records = [*generate("vt", count=2, **options), *generate("kv_multi_turn", count=1, **options)]
    file = tmp_path / "out.jsonl"
    assert export_kvpress(records, file) == 2 + 5
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert set(rows[0]) == {"context", "question", "answer_prefix", "answers", "max_new_tokens", "task", "metric"}
    back = list(load_public("kvpress", path=file))
    first = records[0]
    assert replace(back[0], spans=first.spans) == first
    assert [r.question for r in back[2:]] == [records[2].question, *(turn.question for turn in records[2].turns)]
    assert {r.context for r in back[2:]} == {records[2].context}


def test_kvpress_rows_of_others_are_scored_by_task(tmp_path):
    row = {
        "context": "c",
        "question": "q",
        "answer_prefix": "Answer:",
        "answer": ["x"],
        "task": "vt",
        "max_new_tokens": 30,
    }
    [record] = load_public("kvpress", path=write(tmp_path / "a.jsonl", row))
    assert (record.metric, record.answers, record.max_new_tokens) == ("string_match_all", ("x",), 30)
    long = {**row, "answers": ["x"], "task": "qasper"}
    [record] = load_public("longbench", path=write(tmp_path / "qasper" / "test-00000-of-00001.jsonl", long))
    assert record.metric == "token_f1"
    with pytest.raises(DataError, match='add a column "metric"'):
        list(load_public("kvpress", path=write(tmp_path / "b.jsonl", {**row, "task": "other"})))
    del row["question"]
    with pytest.raises(DataError, match=r"c\.jsonl:1: a row of kvpress has a field 'question'; this one has answer"):
        list(load_public("kvpress", path=write(tmp_path / "c.jsonl", row)))


def test_kvpress_cannot_have_two_prefixes_for_one_context():
    records = generate("needles_scdq", count=1, length=2000, tokenizer=build_byte_tokenizer())
    with pytest.raises(DataError, match="answer_prefix=False"):
        list(to_kvpress(records))


# ---------------------------------------------------------------------- bad files


@pytest.mark.parametrize("name", SETS)
def test_a_missing_file_says_where_to_get_it(name, tmp_path):
    with pytest.raises(DataError, match=r"no such file or folder; (get|make|write)"):
        load_public(name, path=tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"give path= .* or hub_id="):
        load_public(name)


def test_a_broken_line_is_named(tmp_path):
    good = json.dumps({"context": "c", "input": "q", "answer": "12345"})
    file = tmp_path / "passkey.jsonl"
    file.write_text(f"{good}\n\n{good[:-5]}\n")
    records = load_public("infinitebench", path=file)
    assert next(records).answers == ("12345",)
    with pytest.raises(DataError, match=r"passkey\.jsonl:3: not JSON"):
        next(records)
    file.write_text("[1]\n")
    with pytest.raises(DataError, match=r"passkey\.jsonl:1: expected a JSON object, found list"):
        list(load_public("infinitebench", path=file))
    packed = tmp_path / "kv_retrieval.jsonl.gz"
    packed.write_bytes(gzip.compress((good + "\n").encode() * 50)[:-20])
    with pytest.raises(DataError, match=r"kv_retrieval\.jsonl\.gz:\d+: broken file"):
        list(load_public("infinitebench", path=packed))
    (tmp_path / "math_find.json").write_text('[{"a": 1},\n {"b"]')
    with pytest.raises(DataError, match=r"math_find\.json:2: not JSON"):
        list(load_public("infinitebench", path=tmp_path / "math_find.json"))


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "passkey",
            {"input": "q", "answer": "1"},
            r"a row of infinitebench has a field 'context'; this one has answer, input",
        ),
        ("passkey", {"context": "c", "input": "q", "answer": []}, "no answer"),
        ("math_find", {"context": "c", "input": "The largest number of it", "answer": "many"}, "compares numbers"),
        ("math_find", {"context": "c", "input": "Which?", "answer": 3}, "names no number"),
        ("code_run", {"context": "c", "input": "Which?", "answer": 3}, "names no call"),
        (
            "code_debug",
            {"context": "c", "input": "?", "answer": "Pink", "options": OPTIONS},
            "neither one of the options",
        ),
    ],
)
def test_rows_that_do_not_fit_are_said_before_anything_runs(task, row, message, tmp_path):
    with pytest.raises(DataError, match=rf"{task}\.jsonl:1: .*{message}"):
        list(load_public("infinitebench", path=write(tmp_path / f"{task}.jsonl", row)))


def test_names_and_limits_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'longbench'"):
        load_public("longbanch", path=tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'qasper'"):
        load_public("longbench/qaspar", path=tmp_path)
    with pytest.raises(ConfigError, match="limit is 0"):
        load_public("longbench", path=tmp_path, limit=0)
    with pytest.raises(DataError, match="holds no data file"):
        load_public("longbench", path=tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="cannot read this kind"):
        load_public("longbench/qasper", path=tmp_path / "a.txt")


def test_parquet_is_read_or_its_reader_named(tmp_path):
    file = tmp_path / "qasper.parquet"
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        file.write_bytes(b"PAR1")
        with pytest.raises(DataError, match="pip install pyarrow"):
            list(load_public("longbench", path=file))
        return
    row = {"input": "Who?", "context": "T", "answers": ["x"], "length": 9, "all_classes": [], "_id": "x"}
    parquet.write_table(pyarrow.Table.from_pylist([row, row]), file)
    assert len(list(load_public("longbench", path=file))) == 2


def test_a_hub_dataset_is_downloaded_as_files(tmp_path, monkeypatch):
    """Only data files are asked for, at the revision named; a hub that cannot be reached says where else to get it."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    row = {"context": "c", "input": "q", "answer": "12345"}
    write(tmp_path / "passkey.jsonl", row)
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    [record] = load_public("infinitebench/passkey", hub_id="a/b", revision="main")
    assert record.answers == ("12345",)
    assert (asked["repo_id"], asked["revision"], asked["repo_type"]) == ("a/b", "main", "dataset")
    wanted = filter_repo_objects(
        ["passkey.jsonl", "passkey/test-0.parquet", "kv.jsonl", "passkey.py", "README.md"],
        allow_patterns=asked["allow_patterns"],
    )
    assert list(wanted) == ["passkey.jsonl", "passkey/test-0.parquet"]

    def offline(repo_id, **options):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DataError, match=r"cannot be had from the hub \(no network\).* give path="):
        load_public("infinitebench", hub_id="a/b")
