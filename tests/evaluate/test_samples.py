"""Samples kept in files: the same as made anew, made again when anything that they depend on has changed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import build_byte_tokenizer

import locret.tasks
from locret.evaluate import samples as module
from locret.evaluate.grid import Grid
from locret.evaluate.prompts import Prompt
from locret.evaluate.samples import NOT_EVALUATED, Samples, prepare
from locret.evaluate.suite import SuiteSource


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_byte_tokenizer()


def grid(**changes: Any) -> Grid:
    options: dict[str, Any] = dict(
        tasks=["passkey", "kv_multi_turn"], methods=["recency"], budgets=[64], lengths=[1500], samples=3
    )
    return Grid.from_dict({**options, **changes})


def same(a: Prompt, b: Prompt) -> None:
    """Everything but the texts that only the encoder reads."""
    np.testing.assert_array_equal(a.context, b.context)
    assert (a.asks, a.gold, a.digest) == (b.asks, b.gold, b.digest)
    for name in ("task", "index", "question", "answers", "metric", "max_new_tokens", "answer_prefix"):
        assert getattr(a.record, name) == getattr(b.record, name)
    assert a.record.meta == b.record.meta
    assert [(t.question, t.answers) for t in a.record.turns] == [(t.question, t.answers) for t in b.record.turns]


def test_kept_samples_are_those_made_anew(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in grid().blocks():
        fresh = Samples(grid(), SuiteSource(), tokenizer).prompts(block)
        Samples(grid(), SuiteSource(), tokenizer, tmp_path).prompts(block)
        kept = Samples(grid(), SuiteSource(), tokenizer, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(kept, "records", lambda *_: pytest.fail("made again"))
            for a, b in zip(fresh, kept.prompts(block), strict=True):
                same(a, b)
            assert kept.first(block).question == fresh[0].record.question
    [first, *_] = grid(samples=2).blocks()
    assert len(Samples(grid(samples=2), SuiteSource(), tokenizer, tmp_path).prompts(first)) == 2, "the first ones"
    [more, *_] = grid(samples=4).blocks()
    assert len(Samples(grid(samples=4), SuiteSource(), tokenizer, tmp_path).prompts(more)) == 4, "made again: too few"


def test_other_settings_and_another_program_make_other_files(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(**changes: Any) -> int:
        given = grid(tasks=["passkey"], samples=1, **changes)
        samples = Samples(given, SuiteSource(), tokenizer, tmp_path)
        for block in given.blocks():
            samples.prompts(block)
        return len(list(tmp_path.iterdir()))

    assert [files(), files(), files(mode="official"), files(even_lengths=True), files(seeds=[1])] == [1, 1, 2, 3, 4]
    monkeypatch.setattr(module, "_program", lambda: "changed")
    assert files() == 5


def test_processes_prepare_all_blocks(tokenizer: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    samples = Samples(grid(), SuiteSource(), tokenizer, tmp_path)
    prepare(samples, 2, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert all(samples.kept(block) is not None for block in grid().blocks())


def test_what_is_not_in_the_digest_writes_no_samples() -> None:
    """The modules that write evaluation samples, found by their imports, against the list of those that do not."""
    folder = Path(locret.tasks.__file__).parent

    def imports(name: str) -> Iterator[str]:
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "locret.tasks":
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("locret.tasks."):
                yield str(node.module).split(".")[2]

    reached, left = set[str](), ["suite"]
    while left:
        name = left.pop()
        if name not in reached and (folder / f"{name}.py").exists():
            reached.add(name)
            left += [other for other in imports(name) if other != "public"]
    assert {"ruler", "prose", "paragraphs", "even"} <= reached
    assert not reached & NOT_EVALUATED
