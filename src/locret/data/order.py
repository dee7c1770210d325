"""In which order samples are learned from: a function of seed and step, so a resumed run needs no stored state."""

from __future__ import annotations

import random
from collections.abc import Sequence

_STEPS_PER_BUCKET = 64


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: 0..count-1, a function of its arguments alone."""
    order = list(range(count))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


class Order:
    """The endless sequence of samples of a run.

    Args:
        lengths: by index; 0: never used.
        held_out: how many samples (of all, dropped ones included) to keep apart.
        group: samples a step; with `bucketing` those of a step have similar lengths.
    """

    def __init__(self, lengths: Sequence[int], seed: int, held_out: int, *, group: int = 1, bucketing: bool) -> None:
        self._lengths, self._seed, self._group, self._bucketing = lengths, seed, group, bucketing
        order = shuffled(len(lengths), seed, -1)
        self.held_out = [i for i in order[:held_out] if lengths[i]]
        self._pool = order[held_out:]
        self.size = sum(1 for i in self._pool if lengths[i])  # samples of one epoch
        self._epoch: tuple[int, list[int]] | None = None

    def __getitem__(self, position: int) -> int:
        """The index of the sample at a position of the sequence."""
        epoch, offset = divmod(position, self.size)
        if self._epoch is None or self._epoch[0] != epoch:
            chosen = [self._pool[i] for i in shuffled(len(self._pool), self._seed, epoch)]
            usable = [i for i in chosen if self._lengths[i]]
            self._epoch = epoch, self._bucketed(usable, epoch) if self._bucketing else usable
        return self._epoch[1][offset]

    def _bucketed(self, indices: list[int], epoch: int) -> list[int]:
        """Within windows of many steps, steps of neighbours in length; then the steps in any order."""
        wide = self._group * _STEPS_PER_BUCKET
        steps = []
        for start in range(0, len(indices), wide):
            window = sorted(indices[start : start + wide], key=lambda i: (self._lengths[i], i))
            steps += [window[i : i + self._group] for i in range(0, len(window), self._group)]
        whole, rest = [s for s in steps if len(s) == self._group], [s for s in steps if len(s) < self._group]
        random.Random(f"{self._seed}:{epoch}:steps").shuffle(whole)
        return [i for step in (*whole, *rest) for i in step]
