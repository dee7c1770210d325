"""What the model learns from and is measured with: the generated tasks over the corpus."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Sample(NamedTuple):
    """A finished dialogue: token ids and the [start, end) of every answer in it."""

    ids: np.ndarray
    answers: list[tuple[int, int]]


class Source:
    """The tokenised corpus and the mixture of tasks (`locret.tasks`)."""
