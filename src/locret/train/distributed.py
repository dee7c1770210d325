"""Several processes, one run: what has to be agreed on, over torch.distributed.

`torchrun` starts the processes and sets their environment; alone, every function here is the identity. Gradients go
over NCCL where they lie on a GPU, everything else over gloo.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """This process's place among `size` equal ones."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Group:
        """The group of `torchrun`, joined now if nobody did before; alone where there is none."""
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return cls()
            device = local_device()
            if device is not None:
                torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """The one that writes files."""
        return self.rank == 0

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


def leave() -> None:
    """At the end of a process that joined: NCCL complains about groups that are never left."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def local_device() -> str | None:
    """The GPU that `torchrun` means for this process, "cuda:2"; None without it."""
    rank = os.environ.get("LOCAL_RANK")
    return None if rank is None or not torch.cuda.is_available() else f"cuda:{rank}"
