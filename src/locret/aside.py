"""Work beside the main stream: what nobody needs soon fills the multiprocessors and the bandwidth that others leave.

    with Aside() as aside:
        with aside.run(device, tensors):    behind everything launched so far, beside what is launched from here on
            ...
        aside.join()                        what is launched from here on is behind it
    ...                                     joined, whatever happened in between

Outside `with Aside()`, and where there is no CUDA, `run` is the main stream: the same order, one after the other. A
fork and its join are events, so both can be captured in a CUDA graph.

The allocator gives memory that is freed to the next who asks on the stream that it was allocated on, and knows nothing
of others that still use it. So tensors from outside are given to `run`, which holds them until the join.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import torch


class Aside:
    """One side stream a device; see the top of this file."""

    def __init__(self) -> None:
        self._on = False
        self._running: dict[torch.device, list[object]] = {}  # what each device's work needs until the join

    def __enter__(self) -> Self:
        self._on = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._on = False
        self.join()

    @contextlib.contextmanager
    def run(self, device: torch.device, *needed: object) -> Iterator[None]:
        """What is launched inside runs aside. needed: tensors, or what holds them, that were allocated outside."""
        if not self._on or device.type != "cuda":
            yield
            return
        side = _side(device)
        self._running.setdefault(device, []).extend(needed)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            yield

    def join(self) -> None:
        """The main stream waits for what runs aside; the host does not."""
        for device in self._running:
            torch.cuda.current_stream(device).wait_stream(_side(device))
        self._running.clear()


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def forget_workspaces() -> None:
    """cuBLAS has a workspace for every stream that it ever ran on, 32 MiB on Hopper; whoever comes next gets a new one.

    Around a capture: its workspace lies in the graph's own memory.
    """
    torch._C._cuda_clearCublasWorkspaces()
