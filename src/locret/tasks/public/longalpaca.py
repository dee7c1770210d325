"""LongAlpaca-12k (arXiv:2309.12307): {instruction, input, output}; long texts whose question comes last, for loss."""

from __future__ import annotations

from collections.abc import Iterator

from locret.tasks.public.base import PublicSet
from locret.tasks.public.files import Row
from locret.tasks.records import Record

_LIMIT = 512


def _convert(task: str, row: Row, index: int) -> Iterator[Record]:
    text = "\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
    yield Record("longalpaca", index, text, "", (row["output"],), "rouge_l", _LIMIT, meta={"mode": "public"})


SET = PublicSet(
    "longalpaca", "12,000 instructions, most with long texts", "Yukang/LongAlpaca-12k",
    "get LongAlpaca-12k.json from https://huggingface.co/datasets/Yukang/LongAlpaca-12k", _convert,
)  # fmt: skip
