"""SCBench's repoqa: its rows in small files of the real format, its similarity, and the functions found in answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from locret.errors import ConfigError, DataError
from locret.tasks import repoqa
from locret.tasks.metrics import score
from locret.tasks.public import load_public

try:
    import tree_sitter  # noqa: F401

    HAVE_TREE_SITTER = True
except ImportError:
    HAVE_TREE_SITTER = False
needs_grammars = pytest.mark.skipif(not HAVE_TREE_SITTER, reason="pip install 'locret[code]'")

ADD = "def add(a, b):\n    # sums\n    return a + b"
MUL = "def mul(a, b):\n    # products\n    return a * b"
SUB = "def sub(a, b):\n    # differences\n    return a - b"
HEAD = (
    "Based on the function description and code context, please retrieve and repeat the exact described function from "
    "the code context in a code block wrapped by ```:\n\n"
)


@pytest.fixture
def no_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers without fenced blocks need no parser, so these tests run where none is installed."""
    monkeypatch.setattr(repoqa, "parser_of", lambda language: None)


def asked(name: str, text: str, **more: Any) -> dict[str, Any]:
    return {"input": f"Which function is {name}?", "answer": text, "name": name, **more}


def row(*turns: dict[str, Any], repo: str = "a/b", lang: str = "python", **more: Any) -> dict[str, Any]:
    return {"id": 0, "context": f"{ADD}\n{MUL}\n{SUB}", "repo": repo, "lang": lang, "multi_turns": [*turns], **more}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


# what nltk 3.10.4 says: sentence_bleu([wanted], found, smoothing_function=SmoothingFunction().method4)
@pytest.mark.parametrize(
    ("found", "wanted", "similarity"),
    [
        ("def f(x): return x + 1", "def f(x): return x + 1", 1.0),
        ("def f(x): return x + 2", "def f(x): return x + 1", 0.7598356856515925),
        ("a b c", "a b d e", 0.15174681566793558),
        ("a", "a b", 0.36787944117144233),
        ("one two three four five six", "six five four three two one", 0.05883685791697665),
        ("a b", "c d", 0.0),
    ],
)
def test_bleu_is_nltks(found: str, wanted: str, similarity: float) -> None:
    assert repoqa.bleu(found.split(), wanted.split()) == pytest.approx(similarity, abs=1e-12)


@pytest.mark.usefixtures("no_grammars")
def test_rows_are_scored_against_all_functions_asked_of_their_repository(tmp_path: Path) -> None:
    """Also those of other rows, as published: half of a repository's functions are in another row of the file."""
    other = row(asked("far", ADD), repo="c/d")
    path = write(tmp_path / "scbench_repoqa.jsonl", row(asked("add", ADD), asked("mul", MUL)), other,
                 row(asked("sub", SUB)))  # fmt: skip
    first, far, last = load_public("scbench", path=path)
    assert first.context == f"{HEAD}{ADD}\n{MUL}\n{SUB}\n\n"
    assert first.question == "Which function is add?"
    assert (first.metric, first.max_new_tokens, first.turns[0].question) == (
        "scbench_repoqa", 1024, "Which function is mul?")  # fmt: skip
    assert first.answers == (ADD, "add", "python", "add", ADD, "mul", MUL, "sub", SUB)
    assert far.answers[3:] == ("far", ADD)
    assert first.meta["repo"] == "a/b"
    assert [score(first.metric, said, first.answers) for said in (ADD, f"\n{ADD} ", MUL, "")] == [100, 100, 0, 0]
    assert score(first.metric, MUL, first.turns[0].answers) == 100
    assert score(last.metric, SUB, last.answers) == 100
    [only] = load_public("scbench/scbench_repoqa", path=path, limit=1)
    assert only == first


@pytest.mark.usefixtures("no_grammars")
def test_the_most_alike_function_must_be_alike_enough() -> None:
    answers = (ADD, "add", "python", "add", ADD, "mul", MUL)
    near, half = ADD.replace("sums", "sums both of them"), "def add(a, b):\n    return b"
    assert 0.5 < repoqa.closest(near, "python", [("add", ADD)])[1] < 0.8
    assert [score("scbench_repoqa", said, answers) for said in (near, half)] == [0, 0]
    twice = (*answers[:3], "same", ADD, "add", ADD)  # two names of one text: the first counts, as published
    assert score("scbench_repoqa", ADD, twice) == 0


@pytest.mark.usefixtures("no_grammars")
def test_the_mixed_set_keeps_its_parts_apart(tmp_path: Path) -> None:
    turns = [asked("add", ADD, task="scbench_repoqa"), {"task": "scbench_kv", "input": "Key?", "answer": "v-1"},
             asked("mul", MUL, task="scbench_repoqa")]  # fmt: skip
    path = write(tmp_path / "scbench_repoqa_and_kv.jsonl", row(*turns))
    code, kv = load_public("scbench", path=path)
    assert (code.metric, code.max_new_tokens, kv.metric, kv.max_new_tokens) == (
        "scbench_repoqa", 1024, "scbench_kv", 80)  # fmt: skip
    assert code.context.startswith(ADD), "mixed contexts bring their own head"
    assert code.answers[3:] == ("add", ADD, "mul", MUL)
    assert [turn.answers[1] for turn in code.turns] == ["mul"]


@pytest.mark.usefixtures("no_grammars")
@pytest.mark.parametrize(
    ("broken", "match"),
    [
        (row(asked("add", ADD), lang="cobol"), r"repoqa\.jsonl:1: lang is 'cobol'; repoqa has python, java, "),
        ({k: v for k, v in row(asked("add", ADD)).items() if k != "repo"}, "has a field 'repo'"),
        (row({"input": "Which?", "answer": ADD}), "has a field 'name'"),
        ({"id": 0, "repo": "a/b", "lang": "go", "context": "x"}, "has a field 'multi_turns'"),
        (row(repo="a/b", multi_turns=7), r"repoqa\.jsonl:1: "),
    ],
)
def test_broken_rows_are_named(broken: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match):
        list(load_public("scbench", path=write(tmp_path / "scbench_repoqa.jsonl", broken)))


@pytest.mark.usefixtures("no_grammars")
@pytest.mark.parametrize("answers", [[ADD], [ADD, "add", "python"], [ADD, "add", "cobol", "add", ADD],
                                     [ADD, "add", "python", "mul", MUL], [ADD, "add", "python", "add"]])  # fmt: skip
def test_answers_of_another_form_are_an_error(answers: list[str]) -> None:
    with pytest.raises(DataError, match="wants a function, its name, its language"):
        score("scbench_repoqa", "", answers)


@pytest.mark.skipif(HAVE_TREE_SITTER, reason="tree-sitter is installed")
def test_what_is_missing_is_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tree_sitter is not installed; pip install 'locret\[code\]'"):
        list(load_public("scbench", path=write(tmp_path / "scbench_repoqa.jsonl", row(asked("add", ADD)))))


FUNCTIONS = {  # a block, and what the published query captures first in it
    "python": ("@cached\ndef f(x):\n  def g(): pass\n  return x\n", "def f(x):\n  def g(): pass\n  return x"),
    "java": ("class A {\n  A() {}\n  int f(int x) { return x; }\n}\n", "int f(int x) { return x; }"),
    "typescript": ("const g = () => 1;\nexport function f(x: any) { return x; }\n", "function f(x: any) { return x; }"),
    "rust": ("struct S;\nimpl S {\n  fn f(&self) -> u8 { 1 }\n}\n", "fn f(&self) -> u8 { 1 }"),
    "cpp": ("void A::m() {}\nint *p() { return 0; }\nint f(int x) { return x; }\n", "int f(int x) { return x; }"),
    "go": ("package p\nfunc (a A) m() {}\nfunc f(x int) int { return x }\n", "func f(x int) int { return x }"),
}  # fmt: skip


@needs_grammars
@pytest.mark.parametrize("language", repoqa.LANGUAGES)
def test_the_first_function_of_a_fenced_block_is_taken(language: str) -> None:
    block, function = FUNCTIONS[language]
    assert repoqa.code(f"Here it is:\n```{language}\n{block}```\nAs asked.", language) == function
    prose = f"```\nÄ no code\n```\n```\n{block}```"
    assert repoqa.code(prose, language) == function, "blocks without a function are passed over"


@needs_grammars
def test_without_a_function_the_first_block_and_without_a_block_the_answer() -> None:
    assert repoqa.code("```\nx = 1\n```\n```\ny = 2\n```", "python") == "x = 1\n"
    assert repoqa.code(" def f(): pass ", "python") == "def f(): pass"
    assert repoqa.code("```python\ndef f(): pass", "python") == "```python\ndef f(): pass", "a block that does not end"
    answers = (ADD, "add", "python", "add", ADD, "mul", MUL)
    assert score("scbench_repoqa", f"```python\n{ADD}\n\nprint(add(1, 2))\n```", answers) == 100
