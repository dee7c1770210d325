"""The command line: what each verb prints, where it prints it, and with which code it exits."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import locret
from locret.cli import main
from locret.cli.inspect import remaining, token_texts
from locret.errors import ConfigError, DataError

VERBS = ["demo", "generate", "chat", "compress", "ask", "train", "inspect", "methods", "doctor"]
STATS = {
    "prompt_tokens", "new_tokens", "method", "budget", "kv_bytes", "peak_kv_bytes", "kv_bytes_full", "prefill_seconds",
    "decode_seconds",
}  # fmt: skip


@dataclasses.dataclass
class FakeStats:
    prompt_tokens: int = 9
    new_tokens: int = 2
    method: str = "locret"
    budget: int = 8
    kv_bytes: int = 1024
    peak_kv_bytes: int = 2048
    kv_bytes_full: int = 4096
    prefill_seconds: float = 0.5
    decode_seconds: float = 0.25


class FakeStream:
    def __init__(self, text: str) -> None:
        self.output = SimpleNamespace(text=text, tokens=[1, 2], finish_reason="stop", stats=FakeStats())

    def __iter__(self) -> Iterator[str]:
        self.pieces = iter(self.output.text.partition(" "))
        return self.pieces

    def __next__(self) -> str:
        return next(self.pieces)


class FakeContext:
    tokens = [10, 11, 12]  # noqa: RUF012
    stats = FakeStats()

    def __init__(self, said: list[str] | None = None) -> None:
        self.said = said or []

    def ask(self, question: str, **sampling: Any) -> Any:
        return FakeStream(f"answer to {question} {sampling or ''}".strip()).output

    def stream(self, question: str, **sampling: Any) -> FakeStream:
        return FakeStream(f"answer to {question}")

    def chat(self, message: str, **sampling: Any) -> Any:
        self.said.append(message)
        return FakeStream(f"turn {len(self.said)}: {message}").output

    def chat_stream(self, message: str, **sampling: Any) -> FakeStream:
        self.said.append(message)
        return FakeStream(f"turn {len(self.said)}: {message}")

    def fork(self) -> FakeContext:
        return FakeContext(list(self.said))

    def save(self, path: Path) -> None:
        Path(path).write_text("context")

    def kept(self) -> list[list[list[int]]]:
        return [[[0, 2], [0]], [[0, 2], [0]]]


class FakeLLM:
    """Answers by repeating what it was asked; remembers how it was loaded and called."""

    def __init__(self, model: str | None, options: dict[str, Any]) -> None:
        self.model, self.options, self.prompts, self.sampling = model, options, [], {}
        self.backbone = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: "".join(f"<{i}>" for i in ids)))

    def generate(self, prompt: str, on_progress: Any = None, **sampling: Any) -> Any:
        self.prompts.append(prompt)
        self.sampling = sampling
        print("a stray print of a library")
        on_progress(1, 1)
        if prompt == "interrupt":
            raise KeyboardInterrupt
        if prompt == "bad":
            raise ConfigError("budget 1 cannot hold its pinned units")
        return FakeStream(f"echo {prompt[:20]}").output

    def stream(self, prompt: str, on_progress: Any = None, **sampling: Any) -> FakeStream:
        return FakeStream(self.generate(prompt, on_progress, **sampling).text)

    def compress(self, document: str, on_progress: Any = None) -> FakeContext:
        self.prompts.append(document)
        return FakeContext()

    def open(self) -> FakeContext:
        return FakeContext()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[FakeLLM]:
    loaded: list[FakeLLM] = []

    def load(model: str | None = None, **options: Any) -> FakeLLM:
        loaded.append(FakeLLM(model, options))
        return loaded[-1]

    monkeypatch.setitem(locret.__dict__, "load", load)
    return loaded


@pytest.fixture
def report(tmp_path: Path) -> str:
    path = tmp_path / "report.txt"
    path.write_text("The code is 4711.\n")
    return str(path)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The parsed stdout: with --json there must be exactly one value on it."""
    code = main([*arguments, "--json"])
    out = capsys.readouterr().out
    value = json.loads(out)
    assert code == 0, value
    return value


def test_generate_json_is_one_flat_object(fake: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, "generate", "--prompt", "hello", "--max-new-tokens", "5")
    assert {"text", "finish_reason"} | STATS <= set(result)
    assert result["text"] == "echo hello"
    assert fake[0].sampling == {"max_new_tokens": 5}


def test_flags_that_are_not_given_are_left_to_load(fake: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    run_json(capsys, "generate", "--prompt", "x")
    assert (fake[0].model, fake[0].options) == (None, {"device": "auto", "dtype": "auto"})


def test_flags_reach_load_under_its_own_names(fake: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--model M --heads H --method knorm --budget 5% --chunk-size 7 --stabilizers 3 --local-window 2 --sinks 1"
    run_json(
        capsys,
        "generate",
        "--prompt",
        "x",
        *flags.split(),
        *"--positions original --device cpu --dtype float32".split(),
    )
    assert fake[0].model == "M"
    assert fake[0].options == {
        "heads": "H", "method": "knorm", "budget": "5%", "chunk_size": 7, "num_stabilizers": 3, "local_window": 2,
        "num_sinks": 1, "positions": "original", "device": "cpu", "dtype": "float32",
    }  # fmt: skip


def test_sampling_flags_reach_generate(fake: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--temperature 0.7 --top-k 5 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --seed 3 --stop END --stop ."
    run_json(capsys, "generate", "--prompt", "x", *flags.split())
    assert fake[0].sampling == {
        "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 3,
        "stop": ["END", "."],
    }  # fmt: skip


def test_one_question_is_read_together_with_the_file(
    fake: list[FakeLLM], capsys: pytest.CaptureFixture[str], report: str
) -> None:
    run_json(capsys, "generate", "--file", report, "--question", "Which code?")
    assert fake[0].prompts == ["The code is 4711.\n\nWhich code?"]


def test_several_questions_share_one_compression(
    fake: list[FakeLLM], capsys: pytest.CaptureFixture[str], report: str
) -> None:
    result = run_json(capsys, "generate", "--file", report, "--question", "A?", "--question", "B?")
    assert fake[0].prompts == ["The code is 4711.\n"]
    assert [answer["question"] for answer in result["answers"]] == ["A?", "B?"]
    assert result["text"] == result["answers"][0]["text"] == "answer to A?"
    assert STATS <= set(result)


def test_ask_a_saved_context_or_a_file_but_not_both(
    fake: list[FakeLLM], capsys: pytest.CaptureFixture[str], report: str
) -> None:
    assert run_json(capsys, "ask", "--file", report, "--question", "A?")["text"] == "answer to A?"
    assert main(["ask", "--question", "A?"]) == 2
    assert main(["ask", "--question", "A?", "--file", report, "--context", report]) == 2
    assert main(["ask", "--file", report]) == 2


def test_compress_saves_and_says_what_it_took(
    fake: list[FakeLLM], capsys: pytest.CaptureFixture[str], report: str, tmp_path: Path
) -> None:
    result = run_json(capsys, "compress", "--file", report, "--output", str(tmp_path / "a.ctx"))
    assert (tmp_path / "a.ctx").exists()
    assert result["file_bytes"] == 7
    assert result["kv_bytes"] == 1024


def test_piped_text_is_the_prompt(
    fake: list[FakeLLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    assert run_json(capsys, "generate")["text"] == "echo from a pipe"


def test_text_goes_to_stdout_and_notes_to_stderr(
    fake: list[FakeLLM], capsys: pytest.CaptureFixture[str], report: str
) -> None:
    assert main(["ask", "--file", report, "--question", "A?"]) == 0
    out, err = capsys.readouterr()
    assert out == "answer to A?\n"
    assert "KV cache 1.0 KiB (peak 2.0 KiB, full 4.0 KiB)" in err


def test_stray_prints_of_libraries_do_not_reach_json(fake: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "x", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "stray" not in out
    assert "stray" in err


def test_chat_turns_reset_save_and_exit(
    fake: list[FakeLLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.ctx"
    lines = f"hi\nagain\n/stats\n/save {saved}\n/reset\nnew\n/what\n/exit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert main(["chat"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["turn 1: hi", "turn 2: again", "turn 1: new"]
    assert saved.exists()
    assert "unknown command '/what'" in err


def test_chat_json_is_one_object_per_line(
    fake: list[FakeLLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\nagain\n")))
    assert main(["chat", "--json"]) == 0
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert texts == ["turn 1: hi", "turn 2: again"]


def test_inspect_counts_the_pairs_that_keep_a_token(
    fake: list[FakeLLM], capsys: pytest.CaptureFixture[str], report: str
) -> None:
    result = run_json(capsys, "inspect", "--file", report)
    assert result["pairs"] == 4
    assert [token["kept"] for token in result["tokens"]] == [4, 0, 2]
    assert main(["inspect", "--file", report, "--min-share", "0.5"]) == 0
    assert capsys.readouterr().out == "<10> … <12>\n"


def test_remaining_text_has_one_ellipsis_per_gap() -> None:
    assert remaining(["a", "b", "c", "d", "e"], [4, 0, 1, 4, 0], 4, 0.5) == "a … d … "


def test_characters_that_span_tokens_are_shown_whole() -> None:
    tokenizer = SimpleNamespace(decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    llm: Any = SimpleNamespace(backbone=SimpleNamespace(tokenizer=tokenizer))
    assert token_texts(llm, list("aé✓".encode())) == ["a", "", "é", "", "", "✓"]


def test_methods_json_lists_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    infos = run_json(capsys, "methods")
    assert {"locret", "knorm", "full"} <= {info["name"] for info in infos}
    for info in infos:
        assert set(info) == {"name", "paper", "summary", "query_aware", "bounded_prefill", "trained"}
    assert main(["methods"]) == 0
    assert "knorm" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "bad"], "cannot hold its pinned units"),
        (["generate", "--file", "/nowhere/a.txt"], "no such file"),
        (["generate", "--question", "A?", "--question", "B?"], "no document"),
        (["generate", "--prompt", "A", "--question", "B?"], "--prompt and --question"),
        (["compress", "--file", "x.txt"], "--output"),
        (["train", "--output", "x"], "--data"),
        (["train", "--data", "x"], "--output"),
    ],
)
def test_a_users_error_is_one_sentence_and_exit_code_2(
    fake: list[FakeLLM], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert main([*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    assert message in json.loads(out)["error"]["message"]
    assert json.loads(out)["error"]["type"] in ("ConfigError", "DataError")


def test_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--bugdet", "9"]) == 2
    assert "--budget" in capsys.readouterr().err
    assert main(["generate", "--bugdet", "9", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "UsageError"
    assert "--budget" in error["message"]


def test_unknown_verb_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["genrate"]) == 2
    assert "genrate" in capsys.readouterr().err


def test_debug_shows_the_traceback(fake: list[FakeLLM]) -> None:
    with pytest.raises(DataError):
        main(["generate", "--file", "/nowhere/a.txt", "--debug"])


def test_ctrl_c_is_130_without_a_traceback(fake: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "interrupt", "--json"]) == 130
    out, err = capsys.readouterr()
    assert "interrupted" in err
    assert json.loads(out)["error"]["type"] == "KeyboardInterrupt"


def test_a_bug_keeps_its_traceback(fake: list[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(FakeLLM, "generate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["generate", "--prompt", "x"])


# ---------------------------------------------------------------------------------------------------------- surface


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"locret {locret.__version__}"


def test_output_survives_a_terminal_without_unicode() -> None:
    script = "from locret.cli.output import say; from locret.cli import main; main(['--version']); say('✓ done')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=environment, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr.decode()
    assert b"? done" in result.stdout
