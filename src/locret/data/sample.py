"""What training learns from: token ids of a prompt and its answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from locret.errors import DataError

Span = tuple[int, int]  # [start, stop) of tokens


class RecordError(DataError):
    """One record that cannot be used: training drops it and counts it under `reason`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Sample:
    """One prompt and its answer.

    Attributes:
        prompt_ids: everything before the last answer.
        answer_ids: the last answer.
        name: where they come from ("train.jsonl:17").
        turns: spans of earlier answers, in the prompt's tokens.
        gold: spans of the prompt's tokens that hold what the last answer needs, where somebody said so.
        lost_turns: earlier answers whose place the chat template hides, so that nothing is learned from them.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    name: str = "sample"
    turns: tuple[Span, ...] = field(default=(), repr=False)
    gold: tuple[Span, ...] = field(default=(), repr=False)
    lost_turns: int = field(default=0, repr=False, compare=False)

    def __post_init__(self) -> None:
        for what, ids in (("prompt", self.prompt_ids), ("answer", self.answer_ids)):
            if not ids:
                raise RecordError(
                    f"empty {what}", f"{self.name}: the {what} is empty; a sample needs at least one token of each"
                )

    @property
    def answers(self) -> list[Span]:
        """Spans of all answers, in the tokens of prompt and answer together; an answer at the very start is none."""
        last = (len(self.prompt_ids), len(self.prompt_ids) + len(self.answer_ids))
        return [*(turn for turn in self.turns if turn[0] > 0), last]
