"""`locret inspect`: the document, each token as bright as the share of (layer, head) pairs that kept it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text
from typer import Option

from locret.cli.options import ContextOption, FileOption, ModelOptions, OutputOptions, with_options
from locret.cli.output import console, emit, note, say
from locret.cli.session import open_context, open_llm

if TYPE_CHECKING:
    from locret.context import Context
    from locret.engine import LLM


@with_options
def inspect(
    model: ModelOptions,
    output: OutputOptions,
    file: FileOption = None,
    context: ContextOption = None,
    min_share: Annotated[
        float,
        Option("--min-share", min=0.0, max=1.0, help="Without colours: show tokens kept by at least this share."),
    ] = 0.25,
) -> None:
    """Show what was kept: shaded text in a terminal, what remains of the text in a pipe, a token table with --json."""
    llm = open_llm(model)
    opened = open_context(llm, model, file=file, context=context)
    tokens = [int(token) for token in opened.context.ids]
    counts, pairs = kept_counts(opened.context)
    pieces = token_texts(llm, tokens)
    if output.json:
        rows = [
            {"position": at, "token": token, "text": piece, "kept": kept}
            for at, (token, piece, kept) in enumerate(zip(tokens, pieces, counts, strict=True))
        ]
        emit({"pairs": pairs, **opened.to_dict(), "tokens": rows})
        return
    view = console()
    if view.is_terminal:
        view.print(shaded(pieces, counts, pairs), soft_wrap=True)
        view.print(Text("kept by ").append_text(_legend(pairs)), soft_wrap=True)
    else:
        say(remaining(pieces, counts, pairs, min_share))
    note(f"{len(pieces):,} tokens; {pairs} (layer, KV head) pairs; {sum(counts) / max(1, pairs):,.0f} kept per pair")


def kept_counts(context: Context) -> tuple[list[int], int]:
    """Per token read: how many (layer, KV head) pairs keep it, of how many. Sliding-window layers do not count."""
    import torch

    counts = torch.zeros(context.seen, dtype=torch.int64)
    pairs = 0
    for spec, positions in zip(context.llm.backbone.layers, context.kept(), strict=True):
        if spec.window is None:
            counts += torch.bincount(positions[positions >= 0], minlength=context.seen)
            pairs += positions.shape[0]
    return counts.tolist(), pairs


def token_texts(llm: LLM, tokens: list[int]) -> list[str]:
    """Each token's own text; characters that span tokens appear with their last token."""
    tokenizer: Any = llm.backbone.tokenizer
    texts, pending = [], []
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending)
        if text.endswith("�") and len(pending) < 8:
            texts.append("")
        else:
            texts.append(text)
            pending = []
    return texts


def shaded(pieces: list[str], counts: list[int], pairs: int) -> Text:
    """Green behind a token, darker to brighter with the share that kept it; grey text where none did."""
    text = Text()
    for piece, count in zip(pieces, counts, strict=True):
        text.append(piece, style=_style(count, pairs))
    return text


def remaining(pieces: list[str], counts: list[int], pairs: int, min_share: float) -> str:
    """The text of tokens kept by at least `min_share` of the pairs; an ellipsis stands for each gap."""
    parts: list[str] = []
    for piece, count in zip(pieces, counts, strict=True):
        if count >= min_share * pairs:
            parts.append(piece)
        elif not parts or parts[-1] != " … ":
            parts.append(" … ")
    return "".join(parts)


def _style(count: int, pairs: int) -> str:
    if count == 0:
        return "grey50"
    level = round(40 + 160 * count / pairs)
    return f"{'black' if level > 120 else 'white'} on rgb({level // 4},{level},{level // 3})"


def _legend(pairs: int) -> Text:
    text = Text()
    for percent in (0, 25, 50, 75, 100):
        text.append(f" {percent}% ", style=_style(round(pairs * percent / 100), pairs))
    return text
