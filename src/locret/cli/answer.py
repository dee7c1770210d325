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
    typed,
    with_options,
)
from locret.cli.output import emit, note, progress, say, say_stream
from locret.cli.session import Opened, beside, compress_text, note_stats, open_context, open_llm
from locret.documents import read_document
from locret.errors import ConfigError

if TYPE_CHECKING:
    from locret.engine import LLM


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
    if prompt is not None:
        [prompt] = typed("--prompt", [prompt])
    asked = typed("--question", question)
    if file is not None:
        if prompt == "-" and str(file) == "-":
            raise ConfigError("stdin cannot be both --file and --prompt; give one of them as a file or as text")
        document = read_document(file)
        if prompt is not None:
            asked = [read_document("-") if prompt == "-" else prompt, *asked]
        if len(asked) > 1:
            _answer_all(compress_text(open_llm(model), document), asked, sampling, output)
            return
        from locret.chat import JOIN

        text = document + JOIN + asked[0] if asked else document
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
    """Answer questions from one compressed context: a file compressed now, or one saved by `locret compress`.

    The peak of the KV cache counts the context and the copy of it that answers.
    """
    asked = typed("--question", question)
    if not asked:
        raise ConfigError('nothing to ask; add --question "..." (it may be repeated)')
    llm = open_llm(model)
    _answer_all(open_context(llm, model, file=file, context=context), asked, sampling, output)


def _prompt_or_stdin(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise ConfigError('nothing to generate from; give --prompt "...", --file FILE, or pipe text into stdin')
    return read_document("-")


def _generate_one(llm: LLM, text: str, sampling: SamplingOptions, output: OutputOptions) -> None:
    with progress("reading") as report:
        stream = llm.stream(text, on_progress=report, **sampling.given())
        first = next(stream, "")  # the whole prefill happens here, under the bar
    if output.json:
        for _ in stream:
            pass
        emit(stream.output.to_dict())
        return
    say(first, end="")
    say_stream(stream)
    note_stats(stream.output)


def _answer_all(opened: Opened, questions: list[str], sampling: SamplingOptions, output: OutputOptions) -> None:
    """The context is unchanged by a question: each answer is what it would be alone."""
    context = opened.context
    if output.json:
        outputs = [beside(context, context.ask(each, **sampling.given())) for each in questions]
        answers = [{"question": q, **output.to_dict()} for q, output in zip(questions, outputs, strict=True)]
        emit(several(opened, answers))
        return
    for each in questions:
        if len(questions) > 1:
            note(f"> {each}")
        stream = context.stream(each, **sampling.given())
        say_stream(stream)
        note_stats(beside(context, stream.output))


def several(opened: Opened, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Where one answer has its fields, the first one's; reading the document counts there; all of them in `answers`."""
    first = {name: value for name, value in answers[0].items() if name != "question"}
    document = opened.to_dict()
    first["prefill_seconds"] += document["prefill_seconds"]
    first["peak_kv_bytes"] = max(document["peak_kv_bytes"], *(answer["peak_kv_bytes"] for answer in answers))
    return {**first, "answers": answers}
