"""Every sample looked at before the first step: what is dropped, why, and where it stands."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from locret.data.sample import RecordError, Sample
from locret.data.sources import Samples
from locret.errors import DataError

TOO_LONG = "over max_length"
_SHOWN = 1000  # places named per reason


@dataclass
class Drops:
    """Samples dropped for one reason."""

    count: int = 0
    example: str = ""  # the first one's message
    places: list[str] = field(default_factory=list)


@dataclass
class DataReport:
    """What `check_samples` found; `output/data.json` of a training run.

    Attributes:
        total: samples in all sources.
        lengths: tokens of prompt and answer, by index; 0: dropped.
        dropped: by reason.
        turns, lost_turns: earlier answers of conversations that are learned from, and that are not because the chat
            template hides their place.
    """

    total: int
    lengths: array[int]
    dropped: dict[str, Drops]
    turns: int = 0
    lost_turns: int = 0

    @property
    def num_dropped(self) -> int:
        return sum(drops.count for drops in self.dropped.values())

    def kept(self, index: int) -> bool:
        """Whether the sample may be used."""
        return self.lengths[index] > 0

    def summary(self) -> str:
        """One line for people; empty when there is nothing to say."""
        parts = [f"{drops.count} {reason}" for reason, drops in self.dropped.items()]
        text = f"{self.num_dropped} of {self.total} samples dropped ({', '.join(parts)})" if parts else ""
        lost = f"{self.lost_turns} earlier answers have no place in the template" if self.lost_turns else ""
        return "; ".join(part for part in (text, lost) if part)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        values = dataclasses.asdict(self)
        return {**values, "lengths": list(self.lengths)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        """What `to_dict` gave."""
        dropped = {reason: Drops(**drops) for reason, drops in values["dropped"].items()}
        return cls(**{**values, "lengths": array("q", values["lengths"]), "dropped": dropped})


def check_samples(
    samples: Samples,
    *,
    max_length: int | None,
    vocab_size: int,
    window: int,
    max_dropped: float = 1.0,
    on_progress: Callable[[int, int], object] | None = None,
) -> DataReport:
    """Read and tokenize every sample once, one at a time.

    Args:
        max_length: prompt tokens; None: any.
        vocab_size: ids must be below.
        window: tokens the model was trained for; no answer may be longer.
        max_dropped: share of samples that may be dropped for other reasons than their length.
    Raises: DataError: nothing is left, or too much was dropped; the message gives counts and the first of each kind.
    """
    total = len(samples)
    report = DataReport(total, array("q", bytes(8 * total)), {})
    for index in range(total):
        try:
            sample = samples[index]
            _check(sample, max_length, vocab_size, window)
        except RecordError as error:
            drops = report.dropped.setdefault(error.reason, Drops(example=str(error)))
            drops.count += 1
            if len(drops.places) < _SHOWN:
                drops.places.append(str(error).split(": ", 1)[0])
        else:
            report.lengths[index] = len(sample.prompt_ids) + len(sample.answer_ids)
            report.turns += len(sample.turns)
            report.lost_turns += sample.lost_turns
        if on_progress is not None:
            on_progress(index + 1, total)
    judge(report, max_dropped)
    return report


def _check(sample: Sample, max_length: int | None, vocab_size: int, window: int) -> None:
    largest = max(max(sample.prompt_ids), max(sample.answer_ids))
    if largest >= vocab_size:
        raise RecordError(
            "token id outside the vocabulary",
            f"{sample.name}: token id {largest}, but the backbone knows 0 to {vocab_size - 1}",
        )
    if len(sample.answer_ids) > window:
        raise RecordError(
            "answer longer than the model's window",
            f"{sample.name}: the answer has {len(sample.answer_ids)} tokens, the model was trained for {window}",
        )
    if max_length is not None and len(sample.prompt_ids) > max_length:
        raise RecordError(
            TOO_LONG,
            f"{sample.name}: the prompt has {len(sample.prompt_ids)} tokens; raise max_length {max_length}, or set "
            "truncate",
        )


def judge(report: DataReport, max_dropped: float) -> None:
    """Raise a DataError where nothing is left, or more than `max_dropped` of all was dropped for other than length."""
    examples = "; ".join(f"{d.count} {reason}, first {d.example}" for reason, d in report.dropped.items())
    if report.num_dropped == report.total:
        raise DataError(f"none of {report.total} samples can be used: {examples}")
    broken = report.num_dropped - (report.dropped[TOO_LONG].count if TOO_LONG in report.dropped else 0)
    if broken > max_dropped * report.total:
        raise DataError(
            f"{broken} of {report.total} samples cannot be used, more than max_dropped {max_dropped:.0%}: {examples}. "
            "Mend them, or raise max_dropped"
        )
