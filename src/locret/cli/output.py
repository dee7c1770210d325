"""What the verbs print: text and tables on stdout for people, exactly one JSON value for machines, notes on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

OnProgress = Callable[[int, int], None]
_SLOW_SECONDS = 10.0  # without a terminal: one line of progress this often
_json_stdout: TextIO | None = None
_emitted = False  # since `json_only` was opened


@contextlib.contextmanager
def json_only() -> Iterator[None]:
    """While this is open nothing but `emit` reaches stdout: a library's stray print lands on stderr."""
    global _json_stdout, _emitted
    _json_stdout, _emitted = sys.stdout, False
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _json_stdout = None


def emit(value: Any, *, line: bool = False) -> None:
    """One JSON value on stdout; `line`: on a line of its own (JSON Lines)."""
    global _emitted
    _emitted = True
    stream = _json_stdout or sys.stdout
    stream.write(json.dumps(value, indent=None if line else 2) + "\n")
    stream.flush()


def emit_error(kind: str, message: str) -> None:
    """What --json prints when there is no result; a result that was printed already stays the only value."""
    if _json_stdout is not None and not _emitted:
        emit({"error": {"type": kind, "message": message}})


def note(message: str) -> None:
    """A remark for the person at the terminal; never on stdout."""
    print(message, file=sys.stderr, flush=True)


def say(text: str, end: str = "\n") -> None:
    """The result itself; no markup is interpreted in it."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def say_stream(pieces: Iterable[str]) -> None:
    """Text as it is generated, and one line end after it."""
    for piece in pieces:
        say(piece, end="")
    say("")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """A table on stdout; cells are plain text. A first column of names, which one may want to type, is never broken."""
    from rich.table import Column
    from rich.text import Text

    rows = list(rows)
    names = all(" " not in row[0] for row in rows)
    shaped = [Column(name, no_wrap=names and not i, overflow="fold") for i, name in enumerate(columns)]
    view = Table(*shaped, title=title, title_justify="left", header_style="bold")
    for row in rows:
        view.add_row(*(Text(cell) for cell in row))
    Console(file=sys.stdout).print(view)


def console() -> Console:
    """A rich console on stdout, for shaded text."""
    return Console(file=sys.stdout, highlight=False)


@contextlib.contextmanager
def progress(label: str, unit: str = "tokens") -> Iterator[OnProgress]:
    """A bar on stderr when that is a terminal; otherwise a line now and then, if it takes long."""
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _SLOW_SECONDS:
            last = time.monotonic()
            note(f"{label}: {done:,} of {total:,} {unit}")

    yield report


def bytes_text(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    size = float(count)
    for name in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {name}" if name == "B" else f"{size:.1f} {name}"
        size /= 1024
    return f"{size:.1f} TiB"
