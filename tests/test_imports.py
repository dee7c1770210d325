"""The architecture, checked: imports point downwards, and the public names are the ones we keep on purpose."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import locret

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "locret"


def levels() -> dict[str, int]:
    """`{"engine": 5, ...}` from the table in docs/architecture.md; a folder's name stands for all files in it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", text, re.MULTILINE)
    return {name.rstrip("/"): int(level) for level, names in rows for name in re.findall(r"`([\w/]+)`", names)}


LEVELS = levels()
FREE = {"", "__init__", "__main__"}  # the package itself only re-exports


def concept(path: Path) -> str:
    """The top name under the package: `methods` for methods/knorm.py, `engine` for engine.py."""
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Names under locret that a file imports anywhere, also inside functions; not those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped.update(inner for child in node.body for inner in ast.walk(child))
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("locret.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            parts = (node.module or "").split(".")
            if parts[0] == "locret":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names if alias.name in LEVELS}
    return found


FILES = sorted(path for path in SOURCE.rglob("*.py") if concept(path) not in FREE and concept(path) != "models")


def test_every_file_has_a_level() -> None:
    without = sorted({concept(path) for path in FILES} - set(LEVELS))
    assert not without, f"add to the table in docs/architecture.md: {without}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downwards(path: Path) -> None:
    """A file may import its own folder and lower levels. An upward arrow means the concept is in the wrong file."""
    own = concept(path)
    for other in imported(path) - {own}:
        assert other in LEVELS, f"{path.name} imports locret.{other}, which has no level in docs/architecture.md"
        assert LEVELS[other] <= LEVELS[own], f"{own} (level {LEVELS[own]}) imports {other} (level {LEVELS[other]})"


def test_same_level_files_do_not_import_each_other_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(concept(path), set()).update(imported(path) - {concept(path)})
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_public_names_are_these() -> None:
    """Adding or removing one is a decision: change this list and the changelog with it."""
    assert locret.__all__ == sorted(locret.__all__, key=lambda name: (not name.isupper(), name))
    assert set(locret.__all__) == {
        "load", "attach", "LLM", "Context", "Output", "Stats", "Sampling", "__version__",
        "LocretError", "ConfigError", "BackboneError", "HeadsError", "DataError", "ContextError", "NumericsError",
    }  # fmt: skip


@pytest.mark.parametrize("name", locret.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(locret, name) is not None


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        locret.laod  # noqa: B018


@pytest.mark.parametrize(
    "command", ["import locret, locret.cli", "import locret.cli; locret.cli.main(['generate', '--help'])"]
)
def test_help_and_import_do_not_wait_for_torch(command: str) -> None:
    check = f"{command}; import sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr.decode()
