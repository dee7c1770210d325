"""`locret demo`: questions about a long document, answered from a cache 20 times smaller than the full one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from locret.cli.answer import several
from locret.cli.options import ModelOptions, OutputOptions, with_options
from locret.cli.output import bytes_text, emit, note, say, table
from locret.cli.session import beside, compress_text, open_llm

if TYPE_CHECKING:
    from locret.tasks.base import Sample

_FAMILIES = ("number", "word", "fact", "passkey")  # what the embedded model can do: see docs/results.md
_SHRINK = 20  # document tokens per kept unit, unless --budget says otherwise


@with_options
def demo(
    model: ModelOptions,
    output: OutputOptions,
    tokens: Annotated[int, Option("--tokens", min=1000, help="Length of the document.")] = 33_000,
    seed: Annotated[int, Option("--seed", help="Another document, other facts, other questions.")] = 0,
) -> None:
    """Ask about facts planted in a long document, from one small KV cache; answers beside the truth."""
    from locret.tasks.build import score

    began = time.perf_counter()
    llm = open_llm(model, **({} if model.budget else {"budget": max(64, tokens // _SHRINK)}))
    tokenizer: Any = llm.backbone.tokenizer
    sample = planted(tokenizer, tokens, seed)
    note(
        f"a document of {len(sample.document):,} tokens with {len(sample.questions)} facts planted in it; "
        "the questions are asked after it has been read"
    )
    opened = compress_text(llm, tokenizer.decode(sample.document.tolist()))
    rows: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for question in sample.questions:
        answer = beside(opened.context, opened.context.ask(question.text, max_new_tokens=48))
        answers.append({"question": question.text, **answer.to_dict()})
        rows.append(
            {
                "question": question.text,
                "answer": answer.text,
                "expected": question.answer,
                "correct": score(question.answer, answer.text, question.family) == 1.0,
            }
        )
    seconds = time.perf_counter() - began
    correct = sum(row["correct"] for row in rows)
    if output.json:
        result = several(opened, answers)
        del result["answers"]  # `questions` says it all
        tokens_read = len(sample.document)
        emit({**result, "document_tokens": tokens_read, "correct": correct, "seconds": seconds, "questions": rows})
        return
    table(
        ("question", "answer", "truth", ""),
        [(row["question"], row["answer"].strip(), row["expected"], "✓" if row["correct"] else "✗") for row in rows],
    )
    small, full = (opened.to_dict()[name] for name in ("kv_bytes", "kv_bytes_full"))
    say(
        f"{correct} of {len(rows)} right, from {bytes_text(small)} of KV cache; the full cache takes "
        f"{bytes_text(full)}, {full / small:.1f} times as much.\n"
        f"{len(sample.document):,} tokens read in {opened.seconds:.1f} s, all done in {seconds:.1f} s.\n"
        'Now yours: locret generate --file report.txt --question "..."'
    )


def planted(tokenizer: Any, num_tokens: int, seed: int) -> Sample:
    """A document that this project wrote, with facts in it and questions about them."""
    from locret.tasks.build import build
    from locret.tasks.filler import ProseFiller

    return build(
        "mixed",
        seed=seed,
        length=num_tokens,
        tokenizer=tokenizer,
        filler=ProseFiller.from_seed(seed, tokenizer),
        num_questions=8,
        num_facts=10,
        wording="train",
        families=_FAMILIES,
    )
