"""Contexts in a folder: found again by what they follow from, whole or not at all, rebuilt when damaged."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from oracles import llm_of, random_heads, tokens

from locret.assets import ContextStore, context_key
from locret.cli import main
from locret.context import Context
from locret.errors import ConfigError, ContextError
from locret.prefill import Reader

OPTIONS: dict[str, Any] = dict(budget=40, chunk_size=16)
TEXT = "The code of the vault is 4711. " * 9


def key(llm: Any, ids: list[int] | None = None, **changes: Any) -> str:
    return context_key(
        llm, tokens(50)[0].tolist() if ids is None else ids, **{"protected": None, "kind": "ids"} | changes
    )


def test_a_context_is_found_again_and_answers_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of(**OPTIONS)
    first = llm.compress(TEXT, store=tmp_path / "store")
    monkeypatch.setattr(Reader, "read", lambda *_, **__: pytest.fail("the document was read again"))
    again = llm_of(**OPTIONS).compress(TEXT, store=tmp_path / "store")
    monkeypatch.undo()
    assert again.ids.tolist() == first.ids.tolist()
    assert [k.tolist() for k in again.kept()] == [k.tolist() for k in first.kept()]
    answers = [c.ask("what is the code?", max_new_tokens=9).tokens for c in (first, again, llm.compress(TEXT))]
    assert answers[0] == answers[1] == answers[2]
    (entry,) = ContextStore(tmp_path / "store").entries()
    assert entry.file_bytes == entry.path.stat().st_size > again.kv_bytes * 0.9
    assert (entry.tokens, entry.budget, entry.method, entry.storage) == (first.seen, 40, "knorm", "dense")


def test_equal_things_have_equal_keys() -> None:
    assert key(llm_of(**OPTIONS)) == key(llm_of(**OPTIONS))
    assert key(llm_of(method="kvzap", **OPTIONS)) == key(llm_of(method="kvzap", **OPTIONS))


def test_whatever_decides_the_units_changes_the_key() -> None:
    base = llm_of(**OPTIONS)
    mask = torch.zeros(50, dtype=torch.bool)
    mask[3] = True
    locret, other_heads = llm_of(method="locret", **OPTIONS), llm_of(method="locret", **OPTIONS)
    object.__setattr__(other_heads.method, "heads", random_heads(base.backbone, seed=5))
    keys = [
        key(base), key(base, ids=tokens(50, seed=1)[0].tolist()), key(base, ids=tokens(49)[0].tolist()),
        key(base, protected=mask), key(base, kind="text"),
        key(llm_of(budget=41, chunk_size=16)), key(llm_of(budget=40, chunk_size=17)),
        key(llm_of(**OPTIONS, storage="int8")), key(llm_of(**OPTIONS, positions="original")),
        key(llm_of(method="recency", **OPTIONS)), key(llm_of(build_tiny_model(seed=1), **OPTIONS)),
        key(llm_of("qwen3", **OPTIONS)), key(llm_of(build_tiny_model(dtype=torch.float64), **OPTIONS)),
        key(llm_of(method="snapkv", **OPTIONS)), key(locret), key(other_heads),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)


def test_options_of_a_method_change_the_key() -> None:
    first, second = llm_of(method="snapkv", **OPTIONS), llm_of(method="snapkv", **OPTIONS)
    object.__setattr__(second.method, "window", 9)
    assert key(first) != key(second)


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty", "foreign", "another"])
def test_a_damaged_file_is_built_anew(harm: str, tmp_path: Path) -> None:
    llm, store = llm_of(**OPTIONS), ContextStore(tmp_path)
    good = store.compress(llm, TEXT)
    data = bytearray(good.path.read_bytes())
    if harm == "truncated":
        data = data[: len(data) // 2]
    elif harm == "flipped":
        data[-9] ^= 1
    elif harm == "empty":
        data = bytearray()
    elif harm == "foreign":
        data = bytearray(b"something else " * 99)
    else:  # a whole context, under another document's name
        data = bytearray(store.compress(llm, TEXT + "?").path.read_bytes())
    good.path.write_bytes(data)
    if harm in ("truncated", "empty", "foreign"):
        assert [e.damaged for e in store.entries() if e.path == good.path] == [True]
    again = store.compress(llm, TEXT)
    assert not again.found
    assert again.path == good.path
    assert store.compress(llm, TEXT).found
    assert again.context.ids.tolist() == good.context.ids.tolist()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("locret.context.save_file", full_disk)
    with pytest.raises(ContextError, match="No space"):
        llm_of(**OPTIONS).compress(TEXT, store=tmp_path)
    assert list(tmp_path.iterdir()) == []


def _write(folder: str) -> bool:
    llm = llm_of(**OPTIONS)
    return all(llm.compress(TEXT, store=folder).held == 40 for _ in range(6))


def test_writers_at_the_same_time(tmp_path: Path) -> None:
    """Two processes, and six threads of a store that is damaged again and again."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_write, [str(tmp_path)] * 2) == [True, True]
    (path,) = tmp_path.iterdir()
    llm = llm_of(**OPTIONS)
    context = llm.compress(TEXT)

    def work(i: int) -> bool:
        if i % 3 == 0:
            context.save(path)
            return True
        return Context.load(path, llm).held == 40

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(work, range(30)))
    assert [p.suffix for p in tmp_path.iterdir()] == [".ctx"]


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_folder: Any) -> None:
    document, store = tmp_path / "a.txt", tmp_path / "store"
    document.write_text(TEXT)
    arguments = ["compress", "--model", str(tiny_folder()), "--method", "knorm", "--budget", "40", "--file",
                 str(document), "--store", str(store), "--json"]  # fmt: skip
    found = []
    for _ in range(2):
        assert main(arguments) == 0
        value = json.loads(capsys.readouterr().out)
        found.append(value["found"])
        assert value["file_bytes"] == Path(value["output"]).stat().st_size
    assert found == [False, True]
    assert main(["contexts", str(store), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["path"] == value["output"]
    assert main(["contexts", str(store)]) == 0
    assert "1 contexts" in capsys.readouterr().out
    assert main(["contexts", str(tmp_path / "none")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        ContextStore(tmp_path / "x")
