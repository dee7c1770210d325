"""The processes of one run, one a GPU: started by torchrun, or a single one when it is not there.

Each process makes and reads its own rows of a batch; gradients are summed, so the weights are the same everywhere, and
the first process alone keeps the clock, logs, validates and saves.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(seconds=90)  # longer than a validation; a process that is silent for so long hangs


@dataclass
class Team:
    """`rank` of `size` processes. Connect only after the data workers are forked: threads do not survive a fork."""

    rank: int = 0
    size: int = 1
    _clock: Any = None

    @classmethod
    def from_environment(cls) -> Team:
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        """This process's own GPU, or the CPU."""
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)

    def connect(self, device: torch.device) -> None:
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
            self._clock = dist.new_group(
                backend="gloo", timeout=PATIENCE
            )  # numbers on the host: nobody waits for a GPU

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def abandon(self) -> None:
        """End this process, whose error is being raised, if there are others: they wait for it in an exchange, closing
        would wait for them, and nobody would see the error. Whoever started them ends the others."""
        if self.size > 1:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replace fp32 tensors by their sums over all processes, in one exchange."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def agree(self, *values: float) -> list[float]:
        """The first process's numbers, everywhere."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(shared, 0, group=self._clock)
        return shared.tolist()
