"""`locret eval` from the command line, on a tiny model and records of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eval_samples import source

from locret.cli import evaluate, main
from locret.evaluate import run as running
from locret.evaluate.summary import load_results


@pytest.fixture(autouse=True)
def suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "suite_source", lambda: source(4))


@pytest.fixture
def flags(tiny_folder: Callable[..., Path]) -> list[str]:
    line = (
        "--tasks key,turns --methods full,recency,snapkv:window=8 --budgets 48 --lengths 256 --samples 3 --device cpu"
    )
    return ["eval", "--model", str(tiny_folder("llama")), *line.split()]


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_run_prints_a_table_and_writes_a_report(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, *flags, "--output", tmp_path)
    assert code == 0
    assert "recency" in out
    assert f"report: {tmp_path}/report.html" in out.replace("\n", "")
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {
        "grid.json",
        "journal",
        "machines",
        "samples.jsonl",
        "results.json",
        "run.json",
        "report.html",
        "report.md",
    }
    facts = json.loads((tmp_path / "run.json").read_text())["provenance"]
    assert facts["command"].startswith("locret ")
    assert facts["machine"]


def test_json_is_one_value_and_the_same_twice(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, *flags, "--output", tmp_path / "a", "--json")
    assert code == 0
    cells = json.loads(out)["cells"]
    assert {(c["task"], c["method"]) for c in cells} >= {("key", "full"), ("turns", "snapkv:window=8")}
    assert "scores" not in cells[0]
    call(capsys, *flags, "--output", tmp_path / "b", "--json")
    assert (tmp_path / "a/results.json").read_bytes() == (tmp_path / "b/results.json").read_bytes()


def test_ctrl_c_keeps_what_is_done(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = running.Journal.write
    calls = []

    def interrupted(self: Any, lines: Any) -> None:
        calls.append(1)
        write(self, lines)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(running.Journal, "write", interrupted)
    code, _, err = call(capsys, *flags, "--output", tmp_path / "a")
    assert code == 130
    assert "the same command goes on" in err
    assert not (tmp_path / "a/results.json").exists()
    monkeypatch.setattr(running.Journal, "write", write)
    assert call(capsys, *flags, "--output", tmp_path / "a")[0] == 0
    assert call(capsys, *flags, "--output", tmp_path / "b")[0] == 0
    for name in ("samples.jsonl", "results.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_processes_of_torchrun_share_a_run(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, _, err = call(capsys, *flags, "--output", tmp_path)
    assert code == 0
    assert "process 1 of 2 is done" in err
    monkeypatch.setenv("RANK", "0")
    assert call(capsys, *flags, "--output", tmp_path)[0] == 0
    assert sorted(path.name for path in (tmp_path / "journal").iterdir()) == ["000.jsonl", "001.jsonl"]
    assert all(cell["n"] == 3 for cell in load_results(tmp_path)["cells"])


def test_a_stopped_run_sums_up_what_is_there(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = call(capsys, *flags, "--output", tmp_path, "--stop-after", 0)
    assert (code, out) == (0, "")
    assert "stopped by --stop-after; 18 of 18 answers are missing: the same command goes on" in err
    looks = iter([False] * 5)
    with monkeypatch.context() as patch:
        patch.setattr(running, "_past", lambda deadline: next(looks, True))
        code, out, err = call(capsys, *flags, "--output", tmp_path, "--stop-after", 0, "--json")
    assert code == 0
    cells = json.loads(out)["cells"]
    assert 0 < len(cells) < 6
    assert (tmp_path / "report.html").exists()
    assert call(capsys, *flags, "--output", tmp_path)[0] == 0
    assert len(load_results(tmp_path)["cells"]) == 6
    assert "CPU" in json.loads((tmp_path / "run.json").read_text())["provenance"]["machine"]


def test_samples_are_prepared_by_processes(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", flags[flags.index("--model") + 1]]
    line = ["eval", "--tasks", "key,turns", "--methods", "recency", "--lengths", 256, "--samples", 2]
    files = ["--sample-files", tmp_path / "s"]
    code, out, _ = call(capsys, *line, *model, "--prepare", 2, *files)
    assert code == 0
    assert "samples:" in out
    assert len(list((tmp_path / "s").iterdir())) == 2
    code, _, err = call(capsys, *line, *model, "--prepare", 2)
    assert code == 2
    assert "--sample-files DIR" in err


def test_samples_are_exported_for_kvpress(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The texts of the run, a row a question, named as in our results."""
    assert call(capsys, *flags, "--output", tmp_path / "a")[0] == 0
    code, out, _ = call(capsys, *flags, "--export-kvpress", tmp_path / "rows.jsonl")
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert f"{len(rows)} rows" in out
    names = {f"{row['seed']}/{row['index']}/{row['sample']}" for row in rows}
    assert names == {name for cell in load_results(tmp_path / "a")["cells"] for name in cell["samples"]}
    assert len(rows) == 3 + 3 * 3, "further turns are rows of the same context"
    assert {"context", "question", "answer_prefix", "answers", "max_new_tokens", "task"} < rows[0].keys()
    (tmp_path / "cut.toml").write_text('tasks = ["key"]\nmax_context = 100\n')
    model = ["--model", flags[flags.index("--model") + 1]]
    code, _, err = call(capsys, "eval", tmp_path / "cut.toml", *model, "--export-kvpress", tmp_path / "cut.jsonl")
    assert code == 2
    assert "max_context cuts contexts by tokens" in err


def test_flags_go_over_a_file(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "g.toml").write_text('tasks = ["turns"]\nmethods = ["recency"]\nbudgets = [48]\nsamples = 9\n')
    model = flags[flags.index("--model") + 1]
    line = ["--model", model, "--samples", 1, "--lengths", 64, "--device", "cpu", "--output", tmp_path / "o", "--json"]
    code, out, _ = call(capsys, "eval", tmp_path / "g.toml", *line)
    assert code == 0
    assert [(c["task"], c["n"]) for c in json.loads(out)["cells"]] == [("turns", 1)]


def test_compare_and_report(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, *flags, "--output", tmp_path / "a")
    other = load_results(tmp_path / "a")
    other["cells"][1]["scores"] = [score + 5 for score in other["cells"][1]["scores"]]
    (tmp_path / "b.json").write_text(json.dumps(other))
    code, out, _ = call(capsys, "eval", "--compare", tmp_path / "a", tmp_path / "b.json")
    assert code == 0
    assert "6 cells compared: 0 significantly better, 0 significantly worse in B" in out
    code, out, _ = call(capsys, "eval", "--compare", tmp_path / "a", tmp_path / "b.json", "--json")
    assert [change["difference"] for change in json.loads(out)["changes"]][:3] == pytest.approx([0, 5, 0])
    code, out, _ = call(capsys, "eval", "--report", tmp_path / "a", "--output", tmp_path / "page", "--json")
    assert code == 0
    assert json.loads(out) == {"report": str(tmp_path / "page/report.html")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval"], "no grid; give a TOML file"),
        (["eval", "--output", "X"], "no grid; give a TOML file"),
        (["eval", "--report", "a"], "add --output DIR"),
        (["eval", "--tasks", "key"], "add --output DIR"),
        (["eval", "--tasks", "keey", "--output", "X"], "did you mean 'key'"),
        (["eval", "--tasks", "key", "--methods", "fulll", "--output", "X"], "did you mean 'full'"),
        (["eval", "--tasks", "key", "--budgets", "5x", "--output", "X"], "budget '5x'"),
        (["eval", "--tasks", "key", "--lengths", "long", "--output", "X"], "no number of tokens"),
        (["eval", "missing.toml", "--output", "X"], "cannot read the grid"),
        (["eval", "--compare", "a.json", "b.json"], "cannot read results"),
    ],
)
def test_wrong_commands_cost_no_time(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert message in err
