"""What holds while a run goes on, and is put back after it: signal handlers, no dropout, TF32 products."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import torch
from torch import nn

from locret.backbone import Backbone


@contextlib.contextmanager
def stop_on_signals() -> Iterator[list[str]]:
    """The names of SIGINT and SIGTERM as they arrive; a second one raises KeyboardInterrupt."""
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield caught
        return

    def note(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout in the backbone."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def tf32(backbone: Backbone) -> Iterator[None]:
    """Heads and labels are fp32; on CUDA with a 16-bit backbone TF32 holds its values exactly and is faster."""
    if backbone.device.type != "cuda" or backbone.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
