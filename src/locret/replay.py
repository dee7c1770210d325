"""The chunks of a full cache as one replayed CUDA graph: a chunk is some thousand launches, which may take the host
longer than the GPU takes for the work.

Once every layer holds its budget, a chunk that is as long as the one before and pins as many units is the same work at
the same addresses. Only its tokens and their positions differ, and they lie in buffers. Recording launches everything
once more, about as long as launching takes; it is only worth it where the GPU waits for the host (`Race`).

The graph has memory of its own, one chunk's activations, for as long as it lives.

Shapes: B batch, C chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from locret.memory import forget_workspaces

Work = Callable[[Tensor, Tensor], Tensor]  # ids [B, C] and positions [C], int64 -> what is read back
ROOM = 2**30  # bytes that must be free before a capture: activations and workspaces, several times over


class Race:
    """Who waits for whom: the GPU for the host that launches chunks, or the host for the GPU that works on them."""

    def __init__(self) -> None:
        self._reached: torch.cuda.Event | None = None  # the last layer of the newest chunk, on the GPU
        self._idle = 0

    def last_layer(self, device: torch.device) -> None:
        """The last layer of a chunk is launched next.

        That the chunk before has ended when this one is launched would say nothing: a GPU's queue takes 1,024 launches,
        a chunk is more, and so launching its end waits for the other to be over.
        """
        if device.type == "cuda":
            self._reached = torch.cuda.Event()
            self._reached.record(torch.cuda.current_stream(device))

    def launched(self) -> None:
        """All of a chunk has been launched."""
        self._idle = self._idle + 1 if self._reached is not None and self._reached.query() else 0

    def lost(self, device: torch.device) -> bool:
        """Whether the GPU had come to the last layer each time one of the last three chunks had just been launched;
        without a GPU: yes.

        Three: the first chunk of a shape takes the host longer, kernels are chosen and compiled.
        """
        return device.type != "cuda" or self._idle >= 3


class Replay:
    """Work that is recorded the first time and replayed from then on.

    Args:
        work: launches everything, and must have run before with tensors of the same shapes: what is compiled or
            planned at the first call cannot be captured.
        ids: of such a chunk, [B, C].
        needs: whatever else the work reads or writes and others might drop.
        capture: False: run the work each time, kernel by kernel (on a CPU, and for tests).
    """

    def __init__(self, work: Work, ids: Tensor, needs: object, *, capture: bool) -> None:
        self._work, self._needs, self._capture = work, needs, capture
        self._ids = torch.empty_like(ids, memory_format=torch.contiguous_format)
        self._at = torch.empty(ids.shape[1], dtype=torch.int64, device=ids.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out: Tensor | None = None

    def run(self, ids: Tensor, start: int) -> Tensor:
        """The work for the tokens at start, start + 1, ...; what it returns is written over by the next run."""
        self._ids.copy_(ids)
        torch.arange(start, start + ids.shape[1], out=self._at)
        if self._capture and self._graph is None:
            self._record()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._out = self._work(self._ids, self._at)
        assert self._out is not None
        return self._out

    def _record(self) -> None:
        """Unlike `torch.cuda.graph` without waiting for the device: it goes on with the chunk before meanwhile."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._ids.device)
        stream.wait_stream(torch.cuda.current_stream(self._ids.device))
        forget_workspaces()
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on
            try:
                self._out = self._work(self._ids, self._at)
            finally:
                graph.capture_end()
        forget_workspaces()
        self._graph = graph


def has_room(device: torch.device) -> bool:
    """Whether a graph may take memory of its own."""
    return device.type != "cuda" or torch.cuda.mem_get_info(device)[0] >= ROOM
