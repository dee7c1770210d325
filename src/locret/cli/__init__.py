"""The command line: `locret VERB`. One file per group of verbs; this one joins them and turns errors into exits.

Exit codes: 0 done · 1 something is broken (a failed check, a bug) · 2 the command or its input was wrong · 130 Ctrl-C.
With --json stdout holds one JSON value and nothing else, also for an error: {"error": {"type", "message"}}.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from locret import __version__
from locret.cli import answer, bench, chat, contexts, demo, doctor, evaluate, heads, inspect, methods, plan, train
from locret.cli.output import emit_error, json_only, note
from locret.errors import LocretError

app = typer.Typer(
    name="locret",
    help="Long-context inference in a fixed KV-cache budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("generate")(answer.generate)
app.command("chat")(chat.chat)
app.command("compress")(contexts.compress)
app.command("contexts")(contexts.contexts)
app.command("ask")(answer.ask)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.add_typer(heads.app)
app.command("inspect")(inspect.inspect)
app.command("methods")(methods.methods)
app.command("plan")(plan.plan)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"locret {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Flags before the verb."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. This is the entry point `locret`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character still shows the rest
    with json_only() if "--json" in arguments else contextlib.nullcontext():
        return _run(arguments, debug="--debug" in arguments)


def _run(arguments: list[str], *, debug: bool) -> int:
    try:
        code: Any = app(arguments, prog_name="locret", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except LocretError as error:
        if debug:
            raise
        return _fail(type(error).__name__, str(error))
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors: unknown options, missing values
            error.show()  # type: ignore[attr-defined]
            emit_error("UsageError", error.format_message())
            return 2
        if type(error).__name__ == "OutOfMemoryError" and not debug:  # torch's; not imported for its name
            advice = "out of GPU memory; lower --chunk-size or --budget, or choose a smaller --dtype"
            return _fail("OutOfMemoryError", f"{advice} ({str(error).splitlines()[0]})")
        emit_error(type(error).__name__, str(error))
        raise  # a bug: its traceback belongs in the report
    if code == 130:
        note("interrupted")
        emit_error("KeyboardInterrupt", "interrupted")
    return code if isinstance(code, int) else 0


def _fail(kind: str, message: str) -> int:
    note(f"error: {message}")
    emit_error(kind, message)
    return 2


__all__ = ["app", "main"]
