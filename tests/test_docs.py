"""What the pages say exists: commands, flags, Python names, links; docs/cli.md is what --help says."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from oracles import llm_of

import locret
from locret.cli import app
from locret.methods import base, list_methods

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUP: Any = typer.main.get_command(app)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """(page, command line) for every `$ ...` line in a console block."""
    return [
        (page.name, line[2:].split("  #")[0].strip())
        for page in PAGES
        for block in blocks(page, "console")
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


def test_cli_page_is_what_help_says() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "generate_cli.py"))
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == module["render"](), "run: make docs"


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value[:60])
def test_commands_exist(page: str, command: str) -> None:
    """Every `locret` line parses, every `make` target is one."""
    words = shlex.split(command.split(" | ")[-1])
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:] if "=" not in target)
    elif words[0] == "locret":
        verb = GROUP.commands[words[1]]
        verb.make_context(words[1], words[2:])  # raises for an unknown flag or a bad value
    else:
        assert words[0] in ("pip", "git", "cd"), f"{page}: {command}"


CODE_PAGES = [page for page in PAGES if page.name != "architecture.md"]  # its block is signatures, not code


@pytest.mark.parametrize("page", CODE_PAGES, ids=lambda page: page.name)
def test_python_blocks_parse_and_use_public_names(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "locret":
                assert node.attr in locret.__all__, f"{page.name}: locret.{node.attr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_starts_with_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    first = [line for line in lines if line.startswith("$ ")][:2]
    assert [line.split()[1:3] for line in first] == [["make", "demo"], ["make", "test"]]
    assert lines.index(first[1]) < 6


def test_the_example_method_in_the_docs_is_the_code() -> None:
    (example,) = blocks(ROOT / "docs" / "add-a-method.md", "python")
    assert example == (ROOT / "src" / "locret" / "methods" / "knorm.py").read_text(encoding="utf-8")
    assert len(example.splitlines()) <= 30


def test_the_example_method_runs_as_it_stands_on_the_page() -> None:
    """Registered under another name it goes through a prefill and keeps what the shipped one keeps."""
    (example,) = blocks(ROOT / "docs" / "add-a-method.md", "python")
    exec(compile(example.replace('"knorm"', '"knorm-of-the-page"'), "add-a-method.md", "exec"), {"__name__": __name__})
    ids = [8 + (7 * i) % 250 for i in range(100)]
    try:
        mine, shipped = (
            [layer.tolist() for layer in llm_of(method=name, budget=40, chunk_size=16).compress(ids).kept()]
            for name in ("knorm-of-the-page", "knorm")
        )
    finally:
        del base._METHODS["knorm-of-the-page"]
    assert mine == shipped
    assert len(mine[0][0]) == 40


def test_the_table_of_methods_holds_all_of_them() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for info in list_methods():
        row = re.search(rf"^\| `{info.name}` \|.*$", page, re.MULTILINE)
        assert row, f"docs/methods.md has no row for {info.name}"
        assert info.summary in row[0], info.name
        assert info.paper in row[0], info.name
        assert info.variant in row[0], info.name


def test_licence_is_the_whole_apache_text() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.strip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(re.findall(r"^   \d\. ", text, re.MULTILINE)) == 9
