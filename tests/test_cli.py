"""The command line: what each verb prints, where it prints it, and with which code it exits."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import pipe

import locret
from locret.cli import main, output
from locret.cli.inspect import remaining, token_texts
from locret.decode import Output, Stats
from locret.errors import ConfigError, DataError

VERBS = [
    "demo", "generate", "chat", "compress", "contexts", "ask", "train", "eval", "inspect", "methods", "plan", "bench",
    "doctor",
]  # fmt: skip
STATS = {
    "prompt_tokens", "new_tokens", "method", "budget", "chunk_size", "kv_bytes", "peak_kv_bytes", "kv_bytes_full",
    "prefill_seconds", "decode_seconds",
}  # fmt: skip


STATS_VALUES = Stats(9, 2, "locret", 8, 256, 1024, 2048, 4096, 0.5, 0.25)


class FakeStream:
    def __init__(self, text: str) -> None:
        self.output = Output(text, [1, 2], "stop", STATS_VALUES)
        self.pieces = iter(text.partition(" "))

    def __iter__(self) -> Iterator[str]:
        return self.pieces

    def __next__(self) -> str:
        return next(self.pieces)


class FakeLLM:
    """Answers by repeating what it was asked; remembers how it was loaded and called."""

    def __init__(self, model: str | None, options: dict[str, Any]) -> None:
        self.model, self.options, self.prompts, self.sampling = model, options, [], {}

    def stream(self, prompt: str, on_progress: Any = None, **sampling: Any) -> FakeStream:
        self.prompts.append(prompt)
        self.sampling = sampling
        print("a stray print of a library")
        on_progress(1, 1)
        if prompt == "interrupt":
            raise KeyboardInterrupt
        if prompt == "bad":
            raise ConfigError("budget 1 cannot hold its pinned units")
        return FakeStream(f"echo {prompt[:20]}")


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
    flags = "--model M --heads H --method knorm --budget 5% --chunk-size 7 --stabilizers 3 --local-window 2 --sinks 1 "
    flags += "--positions original --device cpu --dtype float32"
    run_json(
        capsys,
        "generate",
        "--prompt",
        "x",
        *flags.split(),
    )
    assert fake[0].model == "M"
    assert fake[0].options == {
        "heads": "H", "method": "knorm", "budget": "5%", "chunk_size": 7, "num_stabilizers": 3, "local_window": 2,
        "num_sinks": 1, "positions": "original", "device": "cpu", "dtype": "float32",
    }  # fmt: skip


def test_method_options_reach_load_with_their_types(fake: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--method adakv --method-option base=locret --method-option floor=0.5"
    run_json(capsys, "generate", "--prompt", "x", *flags.split())
    assert fake[0].options["method_options"] == {"base": "locret", "floor": 0.5}
    assert main(["generate", "--prompt", "x", "--method", "adakv", "--method-option", "flor=0.5"]) == 2
    assert "did you mean 'floor'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--prompt", "--question", "--stop"])
def test_bytes_that_the_locale_does_not_know_are_utf8_or_refused(
    fake: list[FakeLLM], capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    arguments = ["generate", "--prompt", "x", flag] if flag == "--stop" else ["generate", flag]
    run_json(capsys, *arguments, "grüß".encode().decode("ascii", "surrogateescape"))  # argv in the locale C
    assert "grüß" in (fake[0].prompts if flag != "--stop" else fake[0].sampling["stop"])
    for bad in ("\udcff hi", "\ud800 hi"):
        assert main([*arguments, bad]) == 2
        assert f"{flag} is {bad!a}, which is not UTF-8" in capsys.readouterr().err


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


def test_piped_text_is_the_prompt(
    fake: list[FakeLLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, b"from a pipe")
    assert run_json(capsys, "generate")["text"] == "echo from a pipe"


def test_a_piped_prompt_says_what_to_do_with_the_file(
    fake: list[FakeLLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, report: str
) -> None:
    pipe(monkeypatch, b"Which code?\n")
    run_json(capsys, "generate", "--file", report, "--prompt", "-")
    assert fake[0].prompts == ["The code is 4711.\n\nWhich code?"]


def test_blank_text_is_refused_before_a_model_is_loaded(fake: list[FakeLLM], report: str) -> None:
    assert main(["generate", "--file", report, "--question", ""]) == 2
    assert main(["ask", "--file", report, "--question", "A?", "--question", ""]) == 2
    assert main(["generate", "--prompt", ""]) == 2
    assert fake == []


def test_stray_prints_of_libraries_do_not_reach_json(fake: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "x", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "stray" not in out
    assert "stray" in err


def test_text_goes_to_stdout_and_notes_to_stderr(
    monkeypatch: pytest.MonkeyPatch, fake: list[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.print", lambda *a, **k: sys.stderr.write(" ".join(map(str, a)) + "\n"))
    assert main(["generate", "--prompt", "A?"]) == 0
    out, err = capsys.readouterr()
    assert out == "echo A?\n"
    assert "KV cache 1.0 KiB (peak 2.0 KiB, full 4.0 KiB)" in err


# ------------------------------------------------------------------------------- with a real engine, on a tiny model


@pytest.fixture
def tiny(tiny_folder: Callable[..., Path]) -> list[str]:
    """Flags for a tiny random model and a small budget."""
    flags = (
        "--method knorm --budget 48 --chunk-size 16 --stabilizers 8 --local-window 8 --max-new-tokens 6 --device cpu"
    )
    return ["--model", str(tiny_folder("llama")), *flags.split()]


@pytest.fixture
def tiny_cache(tiny: list[str]) -> list[str]:
    """The same without sampling flags."""
    at = tiny.index("--max-new-tokens")
    return tiny[:at] + tiny[at + 2 :]


@pytest.fixture
def long_report(tmp_path: Path) -> str:
    path = tmp_path / "long.txt"
    path.write_text("The harbour is quiet and the code is 4711. " * 6)
    return str(path)


@pytest.fixture
def saved_context(tiny_cache: list[str], long_report: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """`long_report`, compressed with the flags of `tiny`."""
    path = str(tmp_path / "report.ctx")
    run_json(capsys, "compress", *tiny_cache, "--file", long_report, "--output", path)
    return path


def test_several_questions_share_one_compression(
    tiny: list[str], capsys: pytest.CaptureFixture[str], long_report: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from locret.engine import LLM

    calls, compress = [], LLM.compress
    monkeypatch.setattr(LLM, "compress", lambda self, text, **o: calls.append(text) or compress(self, text, **o))
    result = run_json(capsys, "generate", *tiny, "--file", long_report, "--question", "A?", "--question", "B?")
    assert len(calls) == 1
    assert [answer["question"] for answer in result["answers"]] == ["A?", "B?"]
    assert result["text"] == result["answers"][0]["text"]
    assert set(result) >= STATS
    assert result["budget"] == 48
    assert result["kv_bytes"] < result["kv_bytes_full"]


def test_the_peak_counts_the_context_and_the_copy_that_answers(
    tiny: list[str], tiny_cache: list[str], saved_context: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from locret import Context

    peaks, chat = [], Context.chat

    def spy(self: Context, *given: Any, **options: Any) -> Output:
        answer = chat(self, *given, **options)
        peaks.append(answer.stats.peak_kv_bytes)
        return answer

    monkeypatch.setattr(Context, "chat", spy)
    held = run_json(capsys, "inspect", *tiny_cache, "--context", saved_context)["kv_bytes"]
    result = run_json(capsys, "ask", *tiny, "--context", saved_context, "--question", "A?", "--question", "B?")
    assert [answer["peak_kv_bytes"] for answer in result["answers"]] == [held + peak for peak in peaks]
    assert result["peak_kv_bytes"] == held + max(peaks)
    pipe(monkeypatch, b"A?")
    assert run_json(capsys, "chat", *tiny, "--context", saved_context)["peak_kv_bytes"] == held + peaks[-1]
    result = run_json(capsys, "demo", *tiny_cache, "--tokens", "1000")
    assert result["peak_kv_bytes"] == result["kv_bytes"] + max(peaks[3:])


def test_a_saved_context_answers_as_a_fresh_one(
    tiny: list[str], tiny_cache: list[str], capsys: pytest.CaptureFixture[str], long_report: str, tmp_path: Path
) -> None:
    saved = tmp_path / "report.ctx"
    made = run_json(capsys, "compress", *tiny_cache, "--file", long_report, "--output", str(saved))
    assert made["file_bytes"] == saved.stat().st_size
    assert made["held"] <= 48 < made["prompt_tokens"]
    fresh = run_json(capsys, "ask", *tiny, "--file", long_report, "--question", "A?")
    loaded = run_json(capsys, "ask", *tiny, "--context", str(saved), "--question", "A?")
    assert loaded["text"] == fresh["text"]


@pytest.mark.parametrize(
    ("flag", "saved"),
    [
        ("--budget 64", "48"), ("--budget 99%", "48"), ("--budget 1MiB", "48"), ("--chunk-size 13", "16"),
        ("--stabilizers 7", "8"), ("--local-window 9", "8"), ("--sinks 0", "4"), ("--positions original", "compact"),
        ("--storage int8", "dense"),
    ],
)  # fmt: skip
def test_a_flag_that_a_saved_context_does_not_follow_is_named(
    saved_context: str, tiny_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str], flag: str, saved: str
) -> None:
    model = f"--model {tiny_folder('llama')} --method knorm --device cpu"
    for verb in ("ask --question A?", "inspect", "chat"):
        assert main([*f"{verb} {model} {flag}".split(), "--context", saved_context]) == 2
        err = capsys.readouterr().err
        assert f"saved with {flag.split()[0]} {saved}, and {flag} is asked for; leave the flag out" in err


def test_flags_that_are_not_given_or_equal_go_with_a_saved_context(
    saved_context: str, tiny: list[str], tiny_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bare = f"--model {tiny_folder('llama')} --method knorm --device cpu --max-new-tokens 6".split()
    same = [*tiny, "--sinks", "4", "--positions", "compact", "--storage", "dense"]
    answers = [run_json(capsys, "ask", "--question", "A?", "--context", saved_context, *f) for f in (bare, same)]
    assert answers[0]["text"] == answers[1]["text"]


def test_a_share_is_compared_by_the_units_it_gives(
    tiny_cache: list[str], capsys: pytest.CaptureFixture[str], long_report: str, tmp_path: Path
) -> None:
    saved, at = str(tmp_path / "share.ctx"), tiny_cache.index("48")
    shared = [*tiny_cache[:at], "40%", *tiny_cache[at + 1 :]]
    run_json(capsys, "compress", *shared, "--file", long_report, "--output", saved)
    run_json(capsys, "ask", *shared, "--context", saved, "--question", "A?", "--max-new-tokens", "2")


@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign"])
def test_a_broken_context_is_a_users_error(
    tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, damage: str
) -> None:
    saved = tmp_path / "report.ctx"
    if damage != "missing":
        saved.write_bytes(b"\x10" if damage == "truncated" else b"not a context, " * 99)
    assert main(["ask", *tiny, "--context", str(saved), "--question", "A?", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "ContextError"
    assert "report.ctx" in error["message"]


def test_a_folder_in_place_of_a_saved_context_is_named_as_one(
    fake: list[FakeLLM], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["ask", "--context", str(tmp_path), "--question", "A?"]) == 2
    assert f"{tmp_path} is a folder; --context wants one saved context" in capsys.readouterr().err


def test_ask_a_saved_context_or_a_file_but_not_both(fake: list[FakeLLM], report: str) -> None:
    assert main(["ask", "--question", "A?"]) == 2
    assert main(["ask", "--question", "A?", "--file", report, "--context", report]) == 2
    assert main(["ask", "--file", report]) == 2


def test_streamed_text_is_the_text_of_json(
    tiny: list[str], capsys: pytest.CaptureFixture[str], long_report: str
) -> None:
    for verb in ("generate", "ask"):
        arguments = [verb, *tiny, "--file", long_report, "--question", "A?"]
        expected = run_json(capsys, *arguments)["text"]
        assert main(arguments) == 0
        assert capsys.readouterr().out == expected + "\n"


def test_a_trained_method_without_heads_says_what_to_do(
    tiny_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", str(tiny_folder("llama")), "--prompt", "x"]) == 2
    assert "locret train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method snapvk", "did you mean 'snapkv'"),
        ("--budget 12", "budget 12 cannot hold its pinned units"),
        ("--budget lots", "not understood"),
        ("--positions compcat", "did you mean 'compact'"),
        ("--chunk-size 0", "chunk_size is 0"),
        ("--top-p 2", "top_p is 2"),
        ("--dtype float23", "did you mean 'float32'"),
        ("--stop ''", "empty stop string"),
    ],
)
def test_bad_values_are_named(tiny: list[str], capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    assert main(["generate", "--prompt", "x" * 60, *tiny, *shlex.split(flags)]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there_is_a_users_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["generate", "--prompt", "x", "--model", str(tmp_path / "none"), "--json"]) == 2
    assert "none" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_chat_turns_reset_save_and_exit(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.ctx"
    lines = f"hi there\nagain\n/stats\n/save {saved}\n/save\n/reset\nhi there\n/what\n/exit\nnever\n"
    pipe(monkeypatch, lines.encode())
    assert main(["chat", *tiny]) == 0
    err = capsys.readouterr().err
    assert saved.exists()
    assert "unknown command '/what'" in err
    assert "say where" in err
    assert "the conversation is forgotten" in err


def chat_json(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lines: bytes
) -> tuple[list[Any], str]:
    """What a conversation of these lines prints: an object a line, and stderr."""
    pipe(monkeypatch, lines)
    assert main(["chat", *tiny, "--json"]) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def test_chat_json_is_one_object_per_line_and_reset_forgets(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, _ = chat_json(tiny, capsys, monkeypatch, b"hi there\nagain and again\n/reset\nhi there\n")
    assert len(turns) == 3
    assert turns[0]["text"] == turns[2]["text"]
    assert turns[1]["prompt_tokens"] > turns[0]["prompt_tokens"]


@pytest.mark.parametrize("name", ["", "file.txt/talk.ctx", "talk\0.ctx", "a" * 300])
def test_a_conversation_goes_on_after_it_could_not_be_saved(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file.txt").write_text("x")
    found, err = chat_json(tiny, capsys, monkeypatch, f"hi there\n/save {tmp_path}/{name}\nagain\n".encode())
    assert [next(iter(one)) for one in found] == ["text", "error", "text"]
    assert ("is a folder" if not name else "cannot be written") in err


def test_a_message_that_is_not_utf8_does_not_cost_the_others(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, bad, last), _ = chat_json(tiny, capsys, monkeypatch, b"hi there\n\xff bad\nagain\n")
    assert bad["error"]["type"] == "DataError"
    assert "byte 0xff at offset 0" in bad["error"]["message"]
    assert last["prompt_tokens"] > first["prompt_tokens"]


def test_compress_to_a_folder_is_refused_before_anything_is_read(
    fake: list[FakeLLM], capsys: pytest.CaptureFixture[str], report: str, tmp_path: Path
) -> None:
    assert main(["compress", "--file", report, "--output", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert fake == []


def test_inspect_counts_the_pairs_that_keep_a_token(
    tiny_cache: list[str], capsys: pytest.CaptureFixture[str], long_report: str
) -> None:
    result = run_json(capsys, "inspect", *tiny_cache, "--file", long_report)
    assert result["pairs"] == 4  # 2 layers of 2 KV heads
    kept = [token["kept"] for token in result["tokens"]]
    assert sum(kept) == result["held"] * result["pairs"]
    assert kept[:4] == [4, 4, 4, 4]  # sinks
    assert "".join(token["text"] for token in result["tokens"]).count("harbour") == 6
    assert main(["inspect", *tiny_cache, "--file", long_report, "--min-share", "0"]) == 0
    assert "harbour is quiet and the code is 4711." in capsys.readouterr().out


def test_demo_json_has_questions_answers_and_the_truth(
    tiny_cache: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [flag if flag != "48" else "120" for flag in tiny_cache]
    result = run_json(capsys, "demo", *flags, "--tokens", "4000")
    assert set(result) >= STATS | {"text", "finish_reason", "document_tokens", "seconds"}
    assert len(result["questions"]) >= 5
    assert result["document_tokens"] <= 4000
    for question in result["questions"]:
        assert set(question) == {"question", "answer", "expected", "correct"}
        assert question["correct"] == (question["answer"].strip().rstrip(".") == question["expected"])
    assert result["correct"] == sum(question["correct"] for question in result["questions"])
    assert main(["demo", *flags, "--tokens", "4000"]) == 0
    assert "times as much" in capsys.readouterr().out


def test_train_writes_heads_that_generate_takes(
    tiny_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, data, heads = str(tiny_folder("llama")), tmp_path / "samples.jsonl", tmp_path / "heads"
    sample = {
        "messages": [{"role": "user", "content": "The code is 4711. Code?"}, {"role": "assistant", "content": "4711"}]
    }
    data.write_text("".join(json.dumps(sample) + "\n" for _ in range(4)))
    flags = f"--model {model} --data {data} --output {heads} --steps 2 --d-r 8 --device cpu"
    result = run_json(capsys, "train", *flags.split())
    assert (result["finished"], result["step"]) == (True, 2)
    used = f"--model {model} --heads {heads} --budget 48 --max-new-tokens 4 --device cpu"
    assert run_json(capsys, "generate", "--prompt", "hello " * 20, *used.split())["method"] == "locret"
    (tmp_path / "recipe.toml").write_text("stepz = 3\n")
    assert main(["train", *flags.split(), "--recipe", str(tmp_path / "recipe.toml")]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err


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
        assert set(info) == {"name", "paper", "summary", "query_aware", "bounded_prefill", "trained", "variant"}
    assert main(["methods"]) == 0
    assert "knorm" in capsys.readouterr().out


def test_methods_show_prints_slots_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, "methods", "show", "pyramidkv")
    assert shown["options"] == {"base": "snapkv", "beta": 20}
    assert shown["slots"]["budget"] == "per layer, same total"
    assert shown["query_aware"] is True
    assert main(["methods", "show", "snapkv"]) == 0
    out = capsys.readouterr().out
    assert "kernel_size" in out
    assert "published: once" in out
    for info in run_json(capsys, "methods"):
        assert run_json(capsys, "methods", "show", info["name"])["name"] == info["name"]


def test_methods_names_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "show", "snapvk"]) == 2
    assert "did you mean 'snapkv'" in capsys.readouterr().err
    assert main(["methods", "list", "all"]) == 2
    assert "locret methods show NAME" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "bad"], "cannot hold its pinned units"),
        (["generate", "--file", "/nowhere/a.txt"], "no such file"),
        (["generate", "--question", "A?", "--question", "B?"], "no document"),
        (["generate", "--prompt", "A", "--question", "B?"], "--prompt and --question"),
        (["generate", "--prompt", " "], "--prompt is blank"),
        (["generate", "--file", "-", "--prompt", "-"], "stdin cannot be both --file and --prompt"),
        (["generate", "--file", __file__, "--question", ""], "--question is blank"),
        (["ask", "--file", __file__, "--question", "A?", "--question", " \n"], "--question is blank"),
        (["compress", "--file", "x.txt"], "--output"),
        (["chat", "--file", "-"], "stdin cannot be both the document and the turns"),
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

    monkeypatch.setattr(FakeLLM, "stream", broken)
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


def test_the_first_column_of_a_table_is_whole_on_a_narrow_terminal(monkeypatch, capsys):
    """`locret eval --compare` and `locret methods` cut the names of tasks and methods at 80 columns."""
    monkeypatch.setenv("COLUMNS", "40")
    output.table(("name", "text"), [("expected_attention_and_more", "a b c " * 20)])
    assert "expected_attention_and_more" in capsys.readouterr().out


def test_a_first_column_of_sentences_leaves_room_for_the_others(capsys, monkeypatch):
    """Names stay whole, as they may be typed; a question must not push its answer off the screen."""
    monkeypatch.setenv("COLUMNS", "80")
    output.table(("question", "answer"), [("Which of the many codes " * 5, "4711")])
    assert "4711" in capsys.readouterr().out
    output.table(("name", "summary"), [("a" * 40, "what it is " * 8)])
    assert "a" * 40 in capsys.readouterr().out
