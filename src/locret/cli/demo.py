"""`locret demo`: the embedded model answers questions about a long document from a cache 20 times smaller than the full one."""

from __future__ import annotations

import time
from typing import Annotated, Any

from typer import Option

from locret.cli.options import ModelOptions, OutputOptions, with_options
from locret.cli.output import bytes_text, emit, note, progress, say, table
from locret.cli.session import as_json, open_llm

_SHRINK = 20  # the document's tokens per kept unit, unless --budget says otherwise


@with_options
def demo(
    model: ModelOptions,
    output: OutputOptions,
    tokens: Annotated[int, Option("--tokens", min=1000, help="Length of the document.")] = 33_000,
    seed: Annotated[int, Option("--seed", help="Another document, other facts, other questions.")] = 0,
) -> None:
    """Ask about facts planted in a long document, from one small KV cache; answers beside the truth."""
    began = time.perf_counter()
    llm = open_llm(model, **({} if model.budget else {"budget": max(64, tokens // _SHRINK)}))
    document, asked = _document(llm, tokens, seed)
    num_tokens = len(llm.backbone.tokenizer(document, add_special_tokens=False).input_ids)  # type: ignore[misc]
    note(
        f"a document of {num_tokens:,} tokens with facts planted in it; {len(asked)} questions, unseen while it is read"
    )
    with progress("reading") as report:
        context = llm.compress(document, on_progress=report)
    rows: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for question, expected in asked:
        answer = context.ask(question, max_new_tokens=48)
        first = first or as_json(answer)
        rows.append(
            {
                "question": question,
                "answer": answer.text,
                "expected": expected,
                "correct": is_correct(answer.text, expected),
            }
        )
    seconds = time.perf_counter() - began
    correct = sum(row["correct"] for row in rows)
    if output.json:
        emit(
            {
                **first,
                "document_tokens": num_tokens,
                "correct": correct,
                "seconds": round(seconds, 2),
                "questions": rows,
            }
        )
        return
    marks = {True: "✓", False: "✗"}
    table(
        ("question", "answer", "truth", ""),
        [(row["question"], row["answer"].strip(), row["expected"], marks[row["correct"]]) for row in rows],
    )
    stats = context.stats
    say(
        f"{correct} of {len(rows)} right from {bytes_text(stats.kv_bytes)} of KV cache; the full cache would be "
        f"{bytes_text(stats.kv_bytes_full)}, {stats.kv_bytes_full / stats.kv_bytes:.1f} times as much.\n"
        f"{num_tokens:,} tokens read and {len(rows)} questions answered in {seconds:.0f} s.\n"
        'Now yours: locret generate --file report.txt --question "..." [--model FOLDER_OR_HUB_ID]'
    )
