"""The real tasks through a run: names, groups, ceilings, public files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import build_byte_tokenizer, build_tiny_model
from eval_samples import grid

from locret.backbone import Backbone
from locret.errors import ConfigError, DataError
from locret.evaluate.run import run
from locret.evaluate.suite import SuiteSource
from locret.evaluate.summary import summarise
from locret.tasks.metrics import corpus_score


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(build_tiny_model("llama", max_position_embeddings=4096), build_byte_tokenizer())


def test_generated_tasks_with_their_ceilings_and_depths(backbone: Backbone, tmp_path: Path) -> None:
    given = grid(tasks=["passkey", "niah_multikey_2", "kv_multi_turn"], lengths=[1600], budgets=["25%"], samples=1)
    found = run(given, backbone, SuiteSource(), tmp_path)
    by_name = {(line["task"], line["method"]): line for line in found.lines.values()}
    assert len(by_name) == 6
    dense = by_name["niah_multikey_2", "recency"]
    assert 15 < dense["ceiling"] < 35, "a quarter of the needles fit, roughly"
    assert "ceiling" not in by_name["niah_multikey_2", "full"]
    assert "ceiling" not in by_name["passkey", "recency"]
    assert 0 <= by_name["passkey", "full"]["depth"] <= 1
    assert len(by_name["kv_multi_turn", "recency"]["turns"]) == 5
    assert all(line["gold"] for line in by_name.values())


def test_groups_of_tasks() -> None:
    given = grid(tasks=["ruler", "passkey"]).expanded(SuiteSource().groups())
    assert len(given.tasks) == 14
    given.check_names(SuiteSource().tasks())


def test_public_files_run_as_they_are(backbone: Backbone, tmp_path: Path) -> None:
    row = {"id": 0, "context": "The pass key is 71432. " * 20, "input": "What is the pass key?", "answer": ["71432"],
           "options": []}  # fmt: skip
    (tmp_path / "passkey.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "id": 1}) + "\n")
    name = "infinitebench/passkey"
    given = grid(tasks=[name], public={name: {"path": str(tmp_path)}})
    found = run(given, backbone, SuiteSource(), tmp_path / "out")
    assert found.missing == 0
    assert {(line["length"], line["index"]) for line in found.lines.values()} == {(0, 0), (0, 1)}
    with pytest.raises(ConfigError, match="did you mean 'infinitebench'"):
        run(grid(tasks=["infinitebnch"], public={"infinitebnch": {"path": "x"}}), backbone, SuiteSource(), tmp_path)
    with (tmp_path / "passkey.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"passkey\.jsonl.*3"):
        run(given, backbone, SuiteSource(), tmp_path / "again")


def test_numbers_of_a_whole_set_stand_beside_the_mean(backbone: Backbone, tmp_path: Path) -> None:
    """L-Eval's ROUGE is made of the set's three means; LongBench also counts by words."""
    rows = [{"input": "Bees live in hives. " * 10, "instructions": ["Summarise."], "outputs": [text], "source": "x",
             "evaluation": "rouge"} for text in ("abc de", "hives and bees")]  # fmt: skip
    (tmp_path / "news_summ.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = [{"input": "Who?", "context": "Ann came. " * 20, "answers": ["Ann"], "length": words, "dataset": "qasper",
             "language": "en", "all_classes": None, "_id": str(words)} for words in (3000, 9000)]  # fmt: skip
    (tmp_path / "qasper.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    given = grid(
        tasks=["leval/news_summ", "longbench/qasper"], methods=["recency"], samples=2, budgets=[200], max_context=400,
        public={"leval/news_summ": {"path": str(tmp_path / "news_summ.jsonl")},
                "longbench/qasper": {"path": str(tmp_path / "qasper.jsonl")}},
    )  # fmt: skip
    source = SuiteSource()
    found = run(given, backbone, source, tmp_path / "out")
    for line in found.ordered():  # the tiny model says nothing that scores
        line["turns"][0]["prediction"] = ["abc xy zz", "bees hives and"][line["index"]]
    leval, longbench = summarise(given, backbone, source, found.ordered())["cells"]
    expected = corpus_score("leval_rouge", ["abc xy zz", "bees hives and"], [["abc de"], ["hives and bees"]])
    assert leval["corpus"] == pytest.approx(expected, abs=1e-3)
    assert leval["corpus"] > 0
    assert "by_words" not in leval
    assert "corpus" not in longbench
    assert set(longbench["by_words"]) == {"0-4k", "8k+"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (None, r"no such file or folder; get .*InfiniteBench"),
        ('{"id": 0, "context": ', r"math_find\.jsonl:1: not JSON"),
        (
            '{"id": 0, "context": "1 2", "input": "The largest number of", "answer": []}',
            r"math_find\.jsonl:1: .*no answer",
        ),
        (
            '{"id": 0, "context": "1 2", "input": "The largest number of", "answer": ["two"]}',
            r"'infinitebench_math_find' compares num",
        ),
        ('{"id": 0, "context": "1 2", "input": "Which?"}', r"math_find\.jsonl:1: a row of infinitebench has a field"),
    ],
    ids=["missing", "broken", "no answer", "another metric's answer", "no field"],
)
def test_bad_public_files_cost_no_time(
    backbone: Backbone, tmp_path: Path, line: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backbone, "run", lambda *args, **kwargs: pytest.fail("computed something"))
    path = tmp_path / "math_find.jsonl"
    if line is not None:
        path.write_text(line + "\n")
    name = "infinitebench/math_find"
    given = grid(tasks=[name, "passkey"], lengths=[1600], public={name: {"path": str(path)}})
    with pytest.raises(DataError, match=message):
        run(given, backbone, SuiteSource(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
