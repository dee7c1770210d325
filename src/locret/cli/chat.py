"""`locret chat`: a conversation without end in a KV cache that stays within the budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from locret.cli.options import ContextOption, ModelOptions, OutputOptions, SamplingOptions, as_unicode, with_options
from locret.cli.output import emit, note, say, say_stream
from locret.cli.session import beside, note_stats, open_context, open_llm, refuse_folder
from locret.errors import ConfigError, DataError, LocretError

if TYPE_CHECKING:
    from locret.context import Context
    from locret.decode import Output
    from locret.engine import LLM

_HELP = "/exit ends, /reset forgets the conversation, /stats shows the cache, /save FILE keeps it for --context"


@with_options
def chat(
    model: ModelOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    file: Annotated[
        Path | None, Option("--file", help="Document: .txt, .md or .pdf; not -, as stdin has the turns.")
    ] = None,
    context: ContextOption = None,
) -> None:
    """Talk with the model; every turn stays in the same budget.

    /exit /reset /stats /save FILE. With --json: one message per line of stdin, one JSON object per line of stdout.
    """
    if file is not None and str(file) == "-":
        raise ConfigError(
            "stdin cannot be both the document and the turns; give a file, or compress it first: ... | "
            "locret compress --file - --output report.ctx, then locret chat --context report.ctx"
        )
    llm = open_llm(model)
    start = _start(llm, model, file, context)
    current = start.fork()
    last: Output | None = None
    if not output.json:
        note(_HELP)
    while True:
        try:
            message = _read(prompt=not output.json)
            if message is None or message == "/exit":
                break
            if message == "/reset":
                current, last = start.fork(), None
                note("the conversation is forgotten")
            elif message == "/stats":
                note_stats(last) if last else note("nothing was said yet")
            elif message.split(" ")[0] == "/save":
                _save(current, message[5:].strip())
            elif message.startswith("/"):
                note(f"unknown command {message.split()[0]!r}; {_HELP}")
            elif message:
                last = _turn(start, current, message, sampling, output)
        except LocretError as error:  # a bad turn does not end the conversation
            note(f"error: {error}")
            if output.json:
                emit({"error": {"type": type(error).__name__, "message": str(error)}}, line=True)


def _turn(start: Context, context: Context, message: str, sampling: SamplingOptions, output: OutputOptions) -> Output:
    """`start` stays beside the conversation, for /reset."""
    if output.json:
        result = beside(start, context.chat(message, **sampling.given()))
        emit(result.to_dict(), line=True)
        return result
    stream = context.reply(message, **sampling.given())
    say_stream(stream)
    return beside(start, stream.output)


def _start(llm: LLM, model: ModelOptions, file: Path | None, context: Path | None) -> Context:
    if file is None and context is None:
        return llm.open()
    return open_context(llm, model, file=file, context=context).context


def _save(context: Context, name: str) -> None:
    if not name:
        note("say where: /save talk.ctx")
        return
    refuse_folder(Path(name))
    context.save(Path(name))
    note(f"saved; continue with: locret chat --context {name}")


def _read(*, prompt: bool) -> str | None:
    """The next message; None at the end of input. Raises: DataError: it is not UTF-8."""
    try:
        if prompt and sys.stdin.isatty():
            return as_unicode("the message", input("> ")).strip()
        line = sys.stdin.buffer.readline()  # bytes: one that is not UTF-8 must not cost the lines after it
        return line.decode().strip() if line else None
    except EOFError:
        say("")
        return None
    except UnicodeDecodeError as error:
        raise DataError(
            f"the message has byte 0x{error.object[error.start]:02x} at offset {error.start}, which is not UTF-8; it "
            "was not read, send it again as UTF-8"
        ) from None
