"""Writes docs/cli.md from the data behind --help: `make docs`. tests/test_docs.py fails when it is stale."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from locret.cli import app

HEAD = """# Command line

Written by `make docs` from `--help`; do not edit. Exit codes: 0 done, 1 something is broken (a failed check of
`locret doctor`, a bug), 2 the command or its input was wrong, 130 stopped by Ctrl-C. With `--json` stdout holds
JSON only; notes and progress go to stderr; an error is `{"error": {"type": ..., "message": ...}}` besides its text on
stderr. `locret chat --json` prints one object per line.
"""


def render() -> str:
    """The page."""
    group: Any = typer.main.get_command(app)
    verbs = [_verb(name, command) for name, command in _flat(group)]
    return "\n".join([HEAD, *verbs])


def _flat(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Verbs, and the verbs of groups such as `locret heads`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _flat(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _verb(name: str, command: Any) -> str:
    lines = [f"## `locret {name}`", "", inspect.cleandoc(command.help or ""), ""]
    options = [p for p in command.params if p.name != "help"]
    arguments = [p for p in options if p.param_type_name == "argument"]
    lines += [f"- `{p.name.upper()}`: {_escape(p.help or '')}" for p in arguments] + [""] * bool(arguments)
    options = [p for p in options if p not in arguments]
    for panel, members in groupby(options, key=lambda p: p.rich_help_panel or "Options"):
        lines += [f"| {panel} | default | meaning |", "|---|---|---|"]
        lines += [f"| {_flags(p)} | {_default(p)} | {_escape(p.help or '')} |" for p in members]
        lines += [""]
    return "\n".join(lines)


def _flags(parameter: Any) -> str:
    return " ".join(f"`{flag}`" for flag in [*parameter.opts, *parameter.secondary_opts])


def _default(parameter: Any) -> str:
    value = parameter.default
    if value is None or value is False or callable(value):
        return ""
    return f"`{value}`" if value is not True else "on"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(render(), encoding="utf-8")
