"""Several processes, one run: what has to be agreed on, over torch.distributed.

Alone, every function here is the identity. Under tensor parallelism `share` processes work on one sample together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from locret.parallel import join

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """This process's place among `size` equal ones, `share` of which see the same samples."""

    rank: int = 0
    size: int = 1
    share: int = 1

    @classmethod
    def current(cls, share: int = 1) -> Group:
        """The group of `torchrun`, joined now if nobody did before; alone where there is none."""
        return cls(dist.get_rank(), dist.get_world_size(), share) if join() else cls()

    @property
    def is_main(self) -> bool:
        """The one that writes files."""
        return self.rank == 0

    @property
    def readers(self) -> int:
        """How many samples are read at a time."""
        return self.size // self.share

    @property
    def reader(self) -> int:
        """Which of them is this process's."""
        return self.rank // self.share

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T | None) -> T:
        """What the first process has."""
        if self.size > 1:
            box = [value]
            dist.broadcast_object_list(box)
            value = box[0]
        assert value is not None
        return value

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each by its sum over processes; the same bits everywhere."""
        if self.size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()
