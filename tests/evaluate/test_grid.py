"""Grids: strict keys, names and budgets checked, every (task, length, seed) once with all that share its samples."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from eval_samples import grid

from locret.errors import ConfigError
from locret.evaluate.grid import Grid, parse_method
from locret.evaluate.suite import SuiteSource

TOML = """
tasks = ["a", "b"]
methods = ["full", "recency"]
budgets = ["10%", 64]
lengths = [128, 256]
samples = 3

[[part]]

[[part]]
tasks = ["a"]
methods = ["full", "snapkv:window=4"]
budgets = ["10%"]
lengths = [256]
samples = 9
"""


def test_parts_share_the_samples_of_a_task_and_length(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(TOML)
    blocks = {(b.task, b.length): b for b in Grid.from_toml(path).blocks()}
    assert list(blocks) == [("a", 128), ("a", 256), ("b", 128), ("b", 256)]
    assert [(v.method, v.budget, v.samples) for v in blocks["b", 128].variants] == [
        ("full", None, 3), ("recency", "10%", 3), ("recency", 64, 3),
    ]  # fmt: skip
    assert [(v.method, v.budget, v.samples) for v in blocks["a", 256].variants] == [
        ("full", None, 9), ("recency", "10%", 3), ("recency", 64, 3), ("snapkv:window=4", "10%", 9),
    ]  # fmt: skip
    assert (blocks["a", 256].samples, blocks["a", 256].cuts) == (9, (3, 9))


def test_stages_are_the_parts_in_their_order(tmp_path: Path) -> None:
    """A run that is cut off has done the first parts; what a part wants is not changed by a later one."""
    path = tmp_path / "grid.toml"
    path.write_text(TOML)
    stages = list(Grid.from_toml(path).stages())
    assert [(s.block.task, s.block.length) for s in stages] == [
        ("a", 128), ("a", 256), ("b", 128), ("b", 256), ("a", 256),
    ]  # fmt: skip
    assert [(v.method, v.budget, v.samples) for v in stages[1].variants] == [
        ("full", None, 3), ("recency", "10%", 3), ("recency", 64, 3),
    ]  # fmt: skip
    assert [(v.method, v.samples) for v in stages[4].variants] == [("full", 9), ("snapkv:window=4", 9)]


def test_a_batch_has_as_many_rows_as_tokens_allow() -> None:
    assert grid(batch_size=3).rows(1000) == 3
    assert [grid(batch_tokens=4000).rows(n) for n in (1000, 1001, 5000)] == [4, 3, 1]


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text('tasks = ["a"]\nsamples = 3\n')
    assert Grid.from_toml(path, samples=7).samples == 7


def test_public_sets_have_the_lengths_they_have() -> None:
    blocks = grid(tasks=["key", "qasper"], lengths=[64, 128], seeds=[1, 2], public={"qasper": {"path": "x"}}).blocks()
    assert [(b.task, b.length, b.seed) for b in blocks if b.task == "qasper"] == [("qasper", 0, 0)]
    assert len(blocks) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(task=["a"]), "did you mean 'tasks'"),
        (dict(methods=["snapvk"]), "did you mean 'snapkv'"),
        (dict(methods=[]), "at least one entry"),
        (dict(methods=["full", "full"]), "twice"),
        (dict(budgets=["5 percent"]), "budget"),
        (dict(budgets="5%"), "must be a list"),
        (dict(lengths=[0]), "no number of tokens"),
        (dict(samples=0), "samples is 0"),
        (dict(mode="harder"), "unknown mode"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(cache={"budget": 5}), "holds no budget"),
        (dict(cache={"positoins": "compact"}), "did you mean 'positions'"),
        (dict(part=[{"method": ["full"]}]), "did you mean 'methods'"),
        (dict(part=[{"methods": ["fulll"]}]), "did you mean 'full'"),
        (dict(tasks=[3]), "list of names"),
        (dict(query_aware=1), "query_aware is 1; it must be true or false"),
        (dict(answer_prefix="no"), "answer_prefix is 'no'; it must be true or false"),
        (dict(model=3), "model is 3; it must be a text"),
        (dict(public=3), "public is 3; it must be a table"),
        (dict(public={"longbench/qasper": "data"}), r"a table a set, .*; longbench/qasper is 'data'"),
        (dict(public={"longbench/qasper": {"paht": "x"}}), "did you mean 'path'"),
    ],
)
def test_bad_grids_say_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grid(**changes)


def test_names_are_checked_against_what_there_is() -> None:
    with pytest.raises(ConfigError, match="did you mean 'key'"):
        grid(tasks=["kee"]).check_names(["key", "turns"])
    with pytest.raises(ConfigError, match="did you mean 'ruler'"):
        grid(tasks=["rulr"]).check_names(["key"], ["ruler"])
    with pytest.raises(ConfigError, match=r'\[public\."longbench/qasper"\] with path = '):
        grid(tasks=["longbench/qasper"]).check_names(["key"])
    grid(tasks=["key", "qasper"], public={"qasper": {}}).check_names(["key"])


def test_groups_stand_for_their_tasks() -> None:
    given = grid(tasks=["ruler", "b"], part=[{}, {"tasks": ["ruler"]}]).expanded({"ruler": ["a", "b"]})
    assert given.tasks == ("a", "b")
    assert given.part == ({}, {"tasks": ["a", "b"]})


def test_method_options() -> None:
    assert parse_method("snapkv:window=64:kernel_size=5") == ("snapkv", {"window": 64, "kernel_size": 5})
    assert parse_method("x:mode=fast:on=true") == ("x", {"mode": "fast", "on": True})
    with pytest.raises(ConfigError, match="option=value"):
        parse_method("snapkv:64")


def test_a_grid_without_tasks_says_so() -> None:
    with pytest.raises(ConfigError, match="names its tasks"):
        Grid.from_dict({"methods": ["full"]})


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text("tasks = [")
    with pytest.raises(ConfigError, match=r"grid\.toml"):
        Grid.from_toml(path)


def test_the_grids_in_the_repository_are_grids() -> None:
    root = Path(__file__).parent.parent.parent
    [example] = re.findall(r"^```toml\n(.*?)^```", (root / "docs/evaluate.md").read_text(), re.MULTILINE | re.DOTALL)
    documented = Grid.from_dict(tomllib.loads(example))
    assert {variant.samples for block in documented.blocks() for variant in block.variants} == {50, 200}
    quick = Grid.from_toml(root / "recipes/grids/quick.toml")
    assert (len(quick.tasks), len(quick.methods), len(quick.budgets), quick.samples) == (6, 5, 2, 20)
    quick.check_names(SuiteSource().tasks())
