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

import locret
from locret.cli import app

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


def test_licence_is_the_whole_apache_text() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.strip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(re.findall(r"^   \d\. ", text, re.MULTILINE)) == 9
