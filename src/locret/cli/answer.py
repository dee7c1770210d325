"""`locret generate` and `locret ask`: text from a prompt, or answers about a document."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from locret.cli.options import (
    ContextOption,
    FileOption,
    ModelOptions,
    OutputOptions,
    QuestionsOption,
    SamplingOptions,
    with_options,
)
from locret.cli.output import emit, note, progress, say, say_stream
from locret.cli.session import as_json, note_stats, open_context, open_llm
from locret.documents import read_document
from locret.errors import ConfigError

if TYPE_CHECKING:
    from locret.engine import LLM, Context, Output


@with_options
def generate(
    model: ModelOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    prompt: Annotated[
        str | None, Option("--prompt", help="The prompt, or what to do with --file; - or nothing reads stdin.")
    ] = None,
    file: FileOption = None,
    question: QuestionsOption = None,
) -> None:
    """Generate text from a prompt, or answer questions about a file.

    One --question is read together with the file. Several are answered from one compressed context.
    """
    asked = [text for text in (prompt, *(question or [])) if text is not None] if file else list(question or [])
    if file is not None:
        document = read_document(file)
        if len(asked) > 1:
            llm = open_llm(model)
            with progress("compressing") as report:
                context = llm.compress(document, on_progress=report)
            _answer_all(context, asked, sampling, output)
            return
        text = f"{document.rstrip()}\n\n{asked[0]}" if asked else document
    elif prompt is not None and asked:
        raise ConfigError("--prompt and --question without a --file: give one of them, or the document with --file")
    elif len(asked) > 1:
        raise ConfigError(f"{len(asked)} questions and no document; give it with --file (- reads stdin)")
    elif asked:
        text = asked[0]
    else:
        text = _prompt_or_stdin(prompt)
    _generate_one(open_llm(model), text, sampling, output)


@with_options
def ask(
    model: ModelOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    question: QuestionsOption = None,
    file: FileOption = None,
    context: ContextOption = None,
) -> None:
    """Answer questions from one compressed context: a file compressed now, or one saved by `locret compress`."""
    if not question:
        raise ConfigError('nothing to ask; add --question "..." (it may be repeated)')
    llm = open_llm(model)
    _answer_all(open_context(llm, file=file, context=context), question, sampling, output)


def _prompt_or_stdin(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise ConfigError('nothing to generate from; give --prompt "...", --file FILE, or pipe text into stdin')
    return read_document("-")


def _generate_one(llm: LLM, text: str, sampling: SamplingOptions, output: OutputOptions) -> None:
    with progress("reading") as report:
        if output.json:
            emit(as_json(llm.generate(text, on_progress=report, **sampling.given())))
            return
        stream = llm.stream(text, on_progress=report, **sampling.given())
        first = next(iter(stream), "")  # the whole prefill happens here, under the bar
    say(first, end="")
    say_stream(stream)
    note_stats(stream.output)


def _answer_all(context: Context, questions: list[str], sampling: SamplingOptions, output: OutputOptions) -> None:
    """The context is unchanged by a question: each answer is what it would be alone."""
    if output.json:
        answers = [{"question": each, **as_json(context.ask(each, **sampling.given()))} for each in questions]
        emit(_several(answers))
        return
    result: Output | None = None
    for each in questions:
        if len(questions) > 1:
            note(f"> {each}")
        stream = context.stream(each, **sampling.given())
        say_stream(stream)
        result = stream.output
    assert result is not None
    note_stats(result)


def _several(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The first answer's fields on top, where one answer has them, and every answer in `answers`."""
    first = {name: value for name, value in answers[0].items() if name != "question"}
    return {**first, "answers": answers}
