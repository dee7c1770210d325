"""Two results files: what changed on the samples that both have run, and whether that could be chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from locret.errors import ConfigError
from locret.evaluate.stats import bootstrap, holm, paired_test
from locret.evaluate.summary import Cell, Results

_LEVEL = 0.05


@dataclass(frozen=True)
class Change:
    """One cell that both files have.

    Attributes:
        n: samples that both have run, the same texts.
        difference: mean of B minus A, in points, with its paired 95 % interval.
        p: of "no difference"; p_adjusted: with regard to how many cells are compared (Holm).
        significant: p_adjusted is below 0.05.
    """

    task: str
    length: int
    method: str
    budget: int | str | None
    n: int
    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    p: float
    p_adjusted: float = 1.0

    @property
    def significant(self) -> bool:
        return self.p_adjusted < _LEVEL


@dataclass(frozen=True)
class Comparison:
    """Attributes: changes: in the order of A;  only_a, only_b: cells without a partner;  settings: what differs."""

    changes: list[Change]
    only_a: list[str]
    only_b: list[str]
    settings: dict[str, tuple[Any, Any]]


def compare(a: Results, b: Results) -> Comparison:
    """Pairs cells by (task, length, method, budget) and samples by their text.

    Raises: ConfigError: one file is query-aware and the other is not, or no cell has a sample in common.
    """
    if a["grid"]["query_aware"] != b["grid"]["query_aware"]:
        raise ConfigError("one of the two is query-aware and the other query-agnostic; these are never compared")
    cells_a, cells_b = ({_key(cell): cell for cell in side["cells"]} for side in (a, b))
    raw = [change for key in cells_a if key in cells_b and (change := _change(cells_a[key], cells_b[key]))]
    if not raw:
        raise ConfigError("the two have no cell (task, length, method, budget) with a sample in common")
    adjusted = holm([change.p for change in raw])
    axes = ("tasks", "methods", "budgets", "lengths", "seeds", "samples", "part", "public")
    settings = {
        name: (a["grid"].get(name), b["grid"].get(name))
        for name in a["grid"] if name not in axes and a["grid"].get(name) != b["grid"].get(name)
    }  # fmt: skip
    if a["model"] != b["model"]:
        settings["model"] = (a["model"], b["model"])
    return Comparison(
        [Change(**{**vars(change), "p_adjusted": p}) for change, p in zip(raw, adjusted, strict=True)],
        [_name(key) for key in cells_a if key not in cells_b],
        [_name(key) for key in cells_b if key not in cells_a],
        settings,
    )


def _change(a: Cell, b: Cell) -> Change | None:
    theirs = dict(zip(b["samples"], b["scores"], strict=True))
    pairs = [(s, theirs[name]) for name, s in zip(a["samples"], a["scores"], strict=True) if name in theirs]
    if not pairs:
        return None
    first, second = [x for x, _ in pairs], [y for _, y in pairs]
    differences = [y - x for x, y in pairs]
    return Change(
        a["task"], a["length"], a["method"], a["budget"], len(pairs), _mean(first), _mean(second), _mean(differences),
        bootstrap(differences), paired_test(first, second),
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _key(cell: Cell) -> tuple[Any, ...]:
    return (cell["task"], cell["length"], cell["method"], cell["budget"])


def _name(key: tuple[Any, ...]) -> str:
    return "/".join(map(str, key))
