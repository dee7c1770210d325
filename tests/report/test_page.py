"""The page: whole by itself, its numbers those of the results, and alive in a browser where one is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from eval_results import write_results

from locret.errors import ConfigError
from locret.report.charts import Point, Series, heat, plot
from locret.report.page import write_report
from locret.report.study import Heat, column_text, depth_map, length_text, load_studies, p_against_full

BROWSER = next(filter(None, map(shutil.which, (
    "chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome",
))), None)  # fmt: skip
VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_results(tmp_path_factory.mktemp("results"))
    write_report([folder], folder)
    return folder


class Balance(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_by_itself(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert not re.search(r"https?:|\bsrc=|@import|url\(", page), "nothing is fetched"
    assert "variables &amp; chains &lt;of&gt; them" in page, "texts are escaped"
    assert "--output &lt;runs&gt;" in page, "the exact command"
    for name in ("Query-agnostic", "Where the needle lies", "Which layers and heads", "Accuracy and length"):
        assert name in page


def test_the_same_results_give_the_same_page(folder: Path, tmp_path: Path) -> None:
    assert write_report([folder], tmp_path).read_bytes() == (folder / "report.html").read_bytes()


def test_rows_are_means_over_tasks(folder: Path) -> None:
    [study] = load_studies([folder])
    cells = json.loads((folder / "results.json").read_text())["cells"]
    mine = [c for c in cells if (c["method"], c["budget"], c["length"]) == ("locret", "5%", 4096)]
    full = [c for c in cells if (c["method"], c["length"]) == ("full", 4096)]
    row = next(r for r in study.rows(4096) if r.column == ("locret", "5%"))
    assert row.score == pytest.approx(sum(c["score"] for c in mine) / 3)
    assert row.against_full == pytest.approx(row.score - sum(c["score"] for c in full) / 3)
    assert row.interval[0] < row.score < row.interval[1]
    assert row.ttft == pytest.approx(0.7)
    assert f"{row.score:.1f} [{row.interval[0]:.1f}, {row.interval[1]:.1f}]" in (folder / "report.md").read_text()
    assert f"{row.score:.1f}<small>" in (folder / "report.html").read_text()


def test_depths_fall_into_bins() -> None:
    cells = [{"length": 4096, "depths": [0.0, 0.05, 0.5, 1.0], "scores": [100.0, 0.0, 100.0, 0.0]},
             {"length": 8192, "depths": [0.95], "scores": [100.0]}, {"length": 16384, "scores": [0.0]}]  # fmt: skip
    found = depth_map(cells)
    assert found is not None
    assert (found.columns, found.rows[5]) == (["4K", "8K"], "50 %")
    assert [row[0] for row in found.values] == [0.5, None, None, None, None, 1.0, None, None, None, 0.0]
    assert found.values[9][1] == 1.0
    assert depth_map(cells[2:]) is None


def test_p_against_full_pairs_the_samples() -> None:
    full = {"budget": None, "samples": list("abcdef"), "scores": [100.0] * 6}
    cell = {"budget": "5%", "samples": list("fedcba"), "scores": [0.0] * 6}
    assert p_against_full(cell, full) == 2 / 64
    assert p_against_full(full, full) is None


def test_modes_are_never_in_one_table(folder: Path, tmp_path: Path) -> None:
    other = json.loads((folder / "results.json").read_text())
    other["grid"]["query_aware"] = True
    (tmp_path / "results.json").write_text(json.dumps(other))
    assert [study.query_aware for study in load_studies([folder, tmp_path])] == [False, True]
    page = write_report([folder, tmp_path], tmp_path / "both").read_text()
    assert "Query-aware: every question was known" in page
    assert "Query-agnostic: contexts" in page


def test_several_runs_of_one_kind_are_one_study(folder: Path, tmp_path: Path) -> None:
    """The cell with more samples stays."""
    more = write_results(tmp_path, samples=30, lengths=(4096,), seed=1)
    [study] = load_studies([folder, more])
    assert {(c["length"], c["n"]) for c in study.cells} == {(4096, 30), (16384, 20)}


def test_rows_that_know_the_answers_are_said_to(folder: Path, tmp_path: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert "references" not in (folder / "report.html").read_text()
    for cell in results["cells"]:
        cell["method"] = cell["method"].replace("recency", "oracle_gold")
    (tmp_path / "results.json").write_text(json.dumps(results))
    note = "Not methods but references: oracle_gold (the units of the gold facts, then the newest). They know"
    assert note in write_report([tmp_path], tmp_path).read_text()
    assert note in (tmp_path / "report.md").read_text()


def test_names() -> None:
    assert [column_text(("full", None)), column_text(("snapkv", 512))] == ["full", "snapkv 512"]
    assert [length_text(n) for n in (0, 4096, 5000)] == ["as it is", "4K", "5,000"]


def test_points_lie_where_their_numbers_say() -> None:
    points = [Point(1024, 0, 0, 0, "a"), Point(4096, 100, 100, 100, "b < c"), Point(2048, 50, 50, 50, "m")]
    picture = plot([Series("x", 12, points)], x_label="x", y_label="y", label="l", x_text=str)
    circles = [tuple(map(float, found)) for found in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', picture)]
    assert circles[0][1] > circles[1][1] > circles[2][1], "higher scores are higher up"
    assert circles[1][0] == pytest.approx((circles[0][0] + circles[2][0]) / 2), "x is logarithmic"
    assert "b &lt; c" in picture
    assert 'class="dashed"' in picture, "a second round of colours is told apart"


def test_heat_shades_by_value_and_leaves_gaps() -> None:
    picture = heat(Heat(["0"], ["a", "b"], [[0.25, None]]), label="l", row_name="r", column_name="c")
    assert 'fill-opacity="0.280"' in picture
    assert picture.count('class="none"') == 1
    large = heat(Heat([str(i) for i in range(64)], [str(i) for i in range(32)], [[0.5] * 32] * 64),
                 label="l", row_name="r", column_name="c")  # fmt: skip
    assert 'class="number' not in large, "no numbers where they would not fit"


@pytest.mark.parametrize("lengths", [(4096,), (0,)], ids=["generated", "public"])
def test_a_single_variant_without_full_cache_gold_or_depth(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    """Nothing to compare with, nothing to draw but one point: the page leaves out what it does not know."""
    results = json.loads((write_results(tmp_path, samples=3, lengths=(4096,)) / "results.json").read_text())
    [cell] = [c for c in results["cells"] if (c["task"], c["method"], c["budget"]) == ("vt", "recency", "5%")]
    for name in ("retention", "retention_map", "against_full", "against_full_interval", "length_shift", "depths"):
        cell.pop(name, None)
    cell.update(kl=None, delta=None, agreement=None, length=lengths[0])
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "results.json").write_text(json.dumps({**results, "cells": [cell]}))
    page = write_report([bare], bare).read_text()
    assert "Where the needle lies" not in page
    assert "Which layers and heads" not in page
    assert f"{cell['score']:.1f}<small>" in page
    assert "None" not in page.partition("How these numbers were made")[0]


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="no results file"):
        write_report([tmp_path], tmp_path)


# --- in a browser

SCRIPT = """
<script>
const out = {};
const table = document.querySelector("table");
const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].dataset.v);
const values = (at) => [...table.tBodies[0].rows].map((row) => row.cells[at].dataset.v);
const click = (at) => table.tHead.rows[0].cells[at].querySelector("button").click();
click(3); out.down = values(3).map(Number);
click(3); out.up = values(3).map(Number); out.aria = table.tHead.rows[0].cells[3].getAttribute("aria-sort");
click(2); out.gaps = values(2);
click(0); out.names = names();
out.wide = document.documentElement.scrollWidth <= innerWidth;
out.width = innerWidth;
const colour = () => getComputedStyle(document.body).backgroundColor;
out.before = colour(); document.getElementById("theme").click(); out.after = colour();
const small = [...document.querySelectorAll("td, p, figcaption")].map((e) => parseFloat(getComputedStyle(e).fontSize));
out.smallest = Math.min(...small);
const found = parent.document.createElement("pre");
found.id = "out"; found.textContent = JSON.stringify(out); parent.document.body.prepend(found);
</script>
"""


@pytest.fixture
def browse(folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")

    def run(width: int) -> dict[str, Any]:
        """In a frame: a window of Chromium's is never narrower than 500 pixels, which no phone is wide."""
        page = tmp_path / "page.html"
        inner = (folder / "report.html").read_text().replace("</body>", SCRIPT + "</body>")
        page.write_text(
            f'<!doctype html><iframe width="{width}" height="800" frameborder="0" srcdoc="{escape(inner)}">'
        )
        done = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
             f"--user-data-dir={tmp_path}/profile", "--window-size=1300,900", page.as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
        assert "CONSOLE" not in done.stderr, done.stderr
        assert found, done.stdout[-2000:]
        result: dict[str, Any] = json.loads(found[1])
        return result

    return run


@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser(browse: Callable[..., dict[str, Any]], width: int) -> None:
    """No console errors; columns sort both ways, gaps last; nothing sticks out at a phone's width; dark and light."""
    out = browse(width)
    assert out["width"] == width
    assert out["down"] == sorted(out["down"], reverse=True)
    assert out["up"] == sorted(out["up"])
    assert out["aria"] == "ascending"
    assert out["gaps"][-1] == "", "the full cache has no distance to itself"
    assert out["names"] == sorted(out["names"])
    assert out["wide"], "only tables scroll sideways, not the page"
    assert out["before"] != out["after"]
    assert out["smallest"] >= 13
