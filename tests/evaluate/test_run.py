"""Runs: what a line says, the same samples for all, and an interrupted run that ends like an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import build_byte_tokenizer, build_tiny_model
from eval_samples import fake_score, grid, record, source

from locret.backbone import Backbone
from locret.config import CacheConfig
from locret.engine import LLM
from locret.errors import CapacityError, ConfigError, DataError, NumericsError
from locret.evaluate.grid import Grid
from locret.evaluate.run import run
from locret.evaluate.source import ListSource
from locret.evaluate.suite import SuiteSource
from locret.evaluate.summary import finish
from locret.methods import get_method

FINAL = ("samples.jsonl", "results.json")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(build_tiny_model("llama"), build_byte_tokenizer())


def complete(grid: Grid, backbone: Backbone, folder: Path, source: ListSource, **options: Any) -> dict[str, bytes]:
    found = run(grid, backbone, source, folder, **options)
    assert found.missing == 0
    finish(folder, grid, backbone, source, found)
    return {name: (folder / name).read_bytes() for name in FINAL}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_line_says_what_the_public_surface_says(backbone: Backbone, tmp_path: Path) -> None:
    complete(grid(), backbone, tmp_path, source())
    lines = lines_of(tmp_path)
    assert len(lines) == 10
    llm = LLM(backbone, get_method("recency"), CacheConfig(budget=48))
    for line in lines:
        assert "seconds" not in line
        if line["method"] == "full":
            turn = line["turns"][0]
            assert (turn["delta"], turn["kl"], turn["agreement"]) == (0.0, 0.0, 1.0)
            assert line["kept"] == [[line["gold"]] * 2] * 2
            continue
        r = record(line["index"])
        context = llm.compress(r.context)
        answer = context.ask(r.question.strip(), max_new_tokens=4)
        assert line["turns"][0]["prediction"] == answer.text
        assert line["score"] == fake_score("fake", answer.text, r.answers)
        assert (line["units"], line["kv_bytes"]) == (48, context.kv_bytes)
        [(start, stop)] = r.spans
        gold = set(range(start + 2, stop + 2))
        assert line["gold"] == len(gold)
        assert line["kept"] == [[len(gold & set(head.tolist())) for head in layer] for layer in context.kept()]


def test_batches_change_no_answer(backbone: Backbone, tmp_path: Path) -> None:
    complete(grid(samples=5, batch_size=1), backbone, tmp_path / "one", source())
    complete(grid(samples=5, batch_size=4), backbone, tmp_path / "four", source())
    for a, b in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "four"), strict=True):
        assert a["turns"][0]["prediction"] == b["turns"][0]["prediction"]
        assert a["turns"][0]["nll"] == pytest.approx(b["turns"][0]["nll"], abs=1e-4)


@pytest.mark.parametrize("how", ["conversation", "separate", "aware"])
def test_further_turns(backbone: Backbone, tmp_path: Path, how: str) -> None:
    """Query-agnostic: one compressed context for all turns. Query-aware: one compression a question."""
    kind = {"query_aware": True} if how == "aware" else {"turns": how}
    given = grid(tasks=["turns"], methods=["recency"], samples=2, **kind)
    complete(given, backbone, tmp_path, source(turns=2))
    llm = LLM(backbone, get_method("recency"), CacheConfig(budget=48))
    for line in lines_of(tmp_path):
        r = record(line["index"], "turns", 2)
        context = llm.compress(r.context)
        first, *later = [r.question.strip(), *(t.question for t in r.turns)]
        if how == "aware":
            texts = [llm.generate(r.context + q, max_new_tokens=4).text for q in (r.question, *later)]
        elif how == "conversation":
            texts = [context.chat(q, max_new_tokens=4).text for q in (first, *later)]
        else:
            asked = [backbone.tokenizer(q + "<end><|assistant|>").input_ids for q in (r.question, *later)]
            texts = [context.ask(ids, max_new_tokens=4).text for ids in asked]
        assert [turn["prediction"] for turn in line["turns"]] == texts


def test_tails_measure_the_perplexity_of_the_contexts_end(backbone: Backbone, tmp_path: Path) -> None:
    complete(grid(tail_tokens=20), backbone, tmp_path, source())
    by_method = {line["method"]: line["tail"] for line in lines_of(tmp_path)}
    assert (by_method["full"]["delta"], by_method["full"]["kl"]) == (0.0, 0.0)
    assert by_method["recency"]["kl"] > 0
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert cells[0]["tail"]["perplexity"] > 1


def test_an_interrupted_run_ends_like_an_uninterrupted_one(backbone: Backbone, tmp_path: Path) -> None:
    """Stopped at every possible place, the last line torn: the files are equal byte for byte."""
    given = grid(budgets=[48, 56], tasks=["key", "turns"], samples=3)
    expected = complete(given, backbone, tmp_path / "whole", source())
    journal = (tmp_path / "whole/journal/000.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(journal) if byte == ord("\n")]
    for stop in [*ends[::3], ends[4] + 17, ends[-1] - 1]:
        folder = tmp_path / f"cut-{stop}"
        (folder / "journal").mkdir(parents=True)
        (folder / "grid.json").write_bytes((tmp_path / "whole/grid.json").read_bytes())
        (folder / "journal/000.jsonl").write_bytes(journal[:stop])
        assert complete(given, backbone, folder, source()) == expected
        lines = (folder / "journal/000.jsonl").read_text().splitlines()
        assert len(lines) == len(ends), "no sample is lost, none is done twice"


def test_a_folder_is_refused_to_other_weights_of_the_same_name(backbone: Backbone, tmp_path: Path) -> None:
    complete(grid(samples=1), backbone, tmp_path, source())
    weight = next(iter(backbone.model.parameters()))
    weight.data.mul_(2)
    try:
        with pytest.raises(ConfigError, match=r"weights was '[0-9a-f]+', now '[0-9a-f]+'; give another --output"):
            complete(grid(samples=1), backbone, tmp_path, source())
    finally:
        weight.data.div_(2)
    complete(grid(samples=1), backbone, tmp_path, source())


CHILD = """
import sys, pathlib
sys.path.insert(0, {tests!r})
from conftest import build_byte_tokenizer, build_tiny_model
from eval_samples import grid, source
from locret.backbone import Backbone
from locret.evaluate.run import run
run(grid(budgets=[48, 56], samples=5), Backbone(build_tiny_model("llama"), build_byte_tokenizer()), source(),
    pathlib.Path(sys.argv[1]))
"""


def test_kill_9(backbone: Backbone, tmp_path: Path) -> None:
    given = grid(budgets=[48, 56], samples=5)
    expected = complete(given, backbone, tmp_path / "whole", source())
    script = CHILD.format(tests=str(Path(__file__).parent.parent))
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "killed")], env=os.environ)
    journal = tmp_path / "killed/journal/000.jsonl"
    deadline = time.monotonic() + 60
    while child.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert complete(given, backbone, tmp_path / "killed", source()) == expected


def test_a_run_that_is_stopped_has_done_the_first_parts_and_goes_on(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look at the clock is a second: a stop at any of them loses nothing, and parts are done in their order."""
    given = grid(
        tasks=["key", "turns"], samples=3, part=[{"methods": ["full"]}, {"tasks": ["key"]}, {"tasks": ["turns"]}]
    )
    expected = complete(given, backbone, tmp_path / "whole", source())
    clock = iter(range(10**6))
    monkeypatch.setattr("locret.evaluate.run._past", lambda deadline: deadline is not None and next(clock) >= deadline)
    missing = []
    for _ in range(30):
        clock = iter(range(10**6))
        missing.append(run(given, backbone, source(), tmp_path / "cut", deadline=3).missing)
        lines = (tmp_path / "cut/journal/000.jsonl").read_text().splitlines()
        done = [(line["method"], line["task"]) for line in map(json.loads, lines)]
        order = list(dict.fromkeys(done))
        parts = [("full", "key"), ("full", "turns"), ("recency", "key"), ("recency", "turns")]
        assert order == parts[: len(order)]
        if not missing[-1]:
            break
    assert missing == sorted(missing, reverse=True)
    assert len(missing) > 3
    monkeypatch.undo()
    assert complete(given, backbone, tmp_path / "cut", source()) == expected


@pytest.mark.parametrize(("error", "message"), [
    (NumericsError("NaN"), "left out knorm 48 on key at 256: NaN"),
    (CapacityError("2 units x 3 B"), r"left out knorm 48 on key at 256: no memory for the batch \(2 units x 3 B\)"),
])  # fmt: skip
def test_a_method_that_fails_leaves_the_others_alone(
    error: Exception, message: str, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, view: Any) -> Any:
        raise error

    given = grid(methods=["full", "knorm", "recency"], samples=2)
    with monkeypatch.context() as patch:
        patch.setattr(type(get_method("knorm")), "score", broken)
        with pytest.warns(UserWarning, match=message):
            found = run(given, backbone, source(), tmp_path)
    assert found.missing == 2
    assert {line["method"] for line in found.ordered()} == {"full", "recency"}
    assert run(given, backbone, source(), tmp_path).missing == 0, "what failed is tried again"


def test_processes_share_the_samples(backbone: Backbone, tmp_path: Path) -> None:
    given = grid(samples=5, batch_size=1)
    expected = complete(given, backbone, tmp_path / "one", source())
    assert run(given, backbone, source(), tmp_path / "two", rank=1, world=2).missing == 6
    found = run(given, backbone, source(), tmp_path / "two", rank=0, world=2)
    assert found.missing == 0
    assert (tmp_path / "two/journal/001.jsonl").read_bytes().count(b"\n") == 4
    finish(tmp_path / "two", given, backbone, source(), found)
    assert {name: (tmp_path / "two" / name).read_bytes() for name in FINAL} == expected


def test_a_larger_grid_keeps_what_is_there(backbone: Backbone, tmp_path: Path) -> None:
    complete(grid(samples=2, methods=["recency"], batch_size=1), backbone, tmp_path / "a", source())
    complete(grid(samples=4, batch_size=1), backbone, tmp_path / "a", source())
    complete(grid(samples=4, batch_size=1), backbone, tmp_path / "b", source())
    assert [line["turns"][0]["prediction"] for line in lines_of(tmp_path / "a")] == [
        line["turns"][0]["prediction"] for line in lines_of(tmp_path / "b")
    ]
    with pytest.raises(ConfigError, match="query_aware was False, now True"):
        run(grid(query_aware=True), backbone, source(), tmp_path / "a")


def test_other_samples_under_the_same_name_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    run(grid(samples=3), backbone, source(), tmp_path)
    changed = source()
    changed.by_task["key"][1] = record(1, question="Which key?")
    with pytest.raises(ConfigError, match="sample 1 of task 'key' is another text"):
        run(grid(samples=4), backbone, changed, tmp_path)


def test_a_broken_journal_line_is_named(backbone: Backbone, tmp_path: Path) -> None:
    run(grid(samples=2), backbone, source(), tmp_path)
    journal = tmp_path / "journal/000.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([lines[0], lines[1][:40] + "\n", *lines[2:]]))
    with pytest.raises(DataError, match=r"000\.jsonl, line 2 is broken"):
        run(grid(samples=2), backbone, source(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tasks=["keey"]), "did you mean 'key'"),
        (dict(lengths=[1024]), "keeps everything, and length 1024 is more than the 512"),
        (dict(budgets=["1%"]), "cannot hold its pinned units"),
        (dict(methods=["locret"]), "needs heads trained"),
        (dict(methods=["lagkv:lag=128"], budgets=["25%"]), "lag 128 keeps up to 256 units"),
        (dict(methods=["snapkv:windoww=3"]), "did you mean 'window'"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_computed(
    backbone: Backbone, tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backbone, "run", lambda *args, **kwargs: pytest.fail("computed something"))
    with pytest.raises(ConfigError, match=message):
        run(grid(**changes), backbone, source(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_records_that_cannot_be_scored_or_asked_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    inside = ListSource({"key": [record(0, question="")]}, fake_score)
    with pytest.raises(ConfigError, match="set query_aware = true"):
        run(grid(), backbone, inside, tmp_path)
    real = ListSource({"key": [record(0, metric="infinitebench_dialog")]}, fake_score)
    real.check = SuiteSource().check  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="did you mean 'infinitebench_dialogue'"):
        run(grid(), backbone, real, tmp_path)
    long = ListSource({"key": [record(0, context="x " * 300)]}, fake_score)
    with pytest.raises(ConfigError, match=r"this model reads 512\. Set max_context"):
        run(grid(), backbone, long, tmp_path)
    run(grid(max_context=400), backbone, long, tmp_path / "cut")
    with pytest.raises(DataError, match="no samples"):
        run(grid(), backbone, ListSource({"key": []}, fake_score), tmp_path)
