"""benchmarks/objectives.py: its tables say what the answers say, and call a tie a tie."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "objectives.py"


@pytest.fixture(scope="module")
def objectives():
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("objectives", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))
    del sys.modules[spec.name]


def result_of(objectives, shares, parts=2, each=40):
    """Answers that are right with the given chance, by variant."""
    rng = random.Random(0)
    settings = dict(variants=[name for name in shares if name not in objectives.REFERENCES], seeds=3,
                    tasks=["number", "kv"], budgets=["10%", "5%"], part=each, steps=400)  # fmt: skip
    jobs = {}
    for name, share in shares.items():
        names = [objectives.cell_name(t, b, s) for t in settings["tasks"] for b in ("100%", "10%", "5%")
                 for s in (None, *objectives.FEWER_STABILIZERS)]  # fmt: skip
        for seed in range(3):
            for part in range(parts):
                right = {cell: [int(rng.random() < share) for _ in range(each)] for cell in names}
                jobs[f"{name}/{seed}/{part}"] = {"right": right}
    return {"settings": settings, "jobs": jobs}


def test_a_clear_difference_is_marked_and_a_tie_is_not(objectives):
    shares = {"full": 1.0, "shipped": 0.9, "paper": 0.5, "ranking": 0.9, "top-k": 0.5}
    rows = objectives.tables(result_of(objectives, shares))["objectives"].splitlines()
    assert rows[0] == "| heads | sparse 10x | sparse 20x | dense 10x | dense 20x |"
    by_name = {row.split(" | ")[0].strip("| "): row for row in rows[2:]}
    assert "100.0" in by_name["full"]
    assert "*" not in by_name["paper"]
    assert by_name["ranking"].count("*") == 4
    assert by_name["top-k"].count("*") <= 1


def test_the_interval_of_a_difference_holds_the_difference_and_knows_pairs(objectives):
    """Differences between prompts cancel, those between seeds do not."""
    hard = np.repeat([[0.0, 1.0, 0.0, 1.0] * 20], 3, axis=0)
    assert objectives.difference([hard], [hard]) == (0.0, 0.0)
    unsure = hard.copy()
    unsure[0] = 1 - unsure[0]
    unsure[0, ::2] = 1.0
    low, high = objectives.difference([unsure], [hard])
    assert low <= (unsure - hard).mean() <= high
    assert high > low


def test_parts_that_not_all_variants_have_are_left_out(objectives):
    def table():
        return objectives.tables(result)["objectives"].splitlines()

    result = result_of(objectives, {"full": 1.0, "shipped": 1.0, "paper": 1.0, "ranking": 1.0})
    whole = table()
    assert whole[-1] == "3 seeds, 80 prompts a task, 400 steps."
    result["jobs"]["paper/2/1"] = {"right": {key: [0] * 40 for key in result["jobs"]["paper/2/1"]["right"]}}
    assert table() != whole
    del result["jobs"]["ranking/0/1"]
    assert table() == [*whole[:-1], "3 seeds, 40 prompts a task, 400 steps."]
    del result["jobs"]["ranking/0/0"]
    assert not any("ranking" in line for line in table()[:-1])
    assert table()[-1].endswith("Not measured: ranking.")


def test_a_run_that_was_cut_off_shows_the_seeds_that_it_has(objectives):
    result = result_of(objectives, {"full": 1.0, "shipped": 1.0, "paper": 1.0, "ranking": 1.0})
    for part in range(2):
        del result["jobs"][f"paper/2/{part}"]
    assert objectives.tables(result)["objectives"].splitlines()[-1] == "2 seeds, 80 prompts a task, 400 steps."
    for seed, part in ((0, 0), (0, 1), (1, 0), (1, 1)):
        del result["jobs"][f"paper/{seed}/{part}"]
    assert "no part" in objectives.tables(result)["objectives"]
