"""Which fused kernel takes a chunk's attention on a GPU: the fastest present one by a measured table.

LOCRET_ATTENTION=flash3          this one instead (a name of KERNELS)
LOCRET_ATTENTION= (or not set)   by the table; on cards that it does not have: flash

The variable concerns bf16 and fp16 on CUDA. What no fused kernel takes goes its own way as ever: CPUs, fp32, odd head
dims, softcaps, biases; so do windows and single queries or keys (always FlashAttention-2).
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from locret.errors import ConfigError, unknown

VARIABLE = "LOCRET_ATTENTION"
FALLBACK = "flash"  # runs wherever `fused` inputs do
_AMPERE_ON = range(8, 100)


class Kernel(NamedTuple):
    """What a fused kernel takes of `fused` inputs, and where it runs."""

    majors: range  # of compute capabilities
    dims: Sequence[int]  # head dims
    package: str | None = None  # not torch's own: this module has it


KERNELS = {
    "cudnn": Kernel(_AMPERE_ON, range(8, 129, 8)),
    "flash": Kernel(_AMPERE_ON, range(8, 257, 8)),  # FlashAttention-2, as torch has it
    "flash3": Kernel(range(9, 10), range(8, 257, 8), "flash_attn_interface"),
    "flash4": Kernel(range(9, 12), (64, 96, 128), "flash_attn.cute.interface"),
    "efficient": Kernel(range(5, 100), range(8, 257, 8)),  # wants KV heads expanded
}


class Measured(NamedTuple):
    """Rates on one card; they count for head dims up to `dim`, and from `rows` queries on to the next entry's."""

    capability: tuple[int, int]
    dim: int
    rows: int
    tflops: dict[str, float]  # of each kernel that was timed
    source: str


_H200 = "one H200, torch 2.11, cuDNN 9.19, prefix of 16,384: benchmarks/results/prefill-kernels-h200.json"

# New entries: python benchmarks/kernel_speed.py --sweep prefill prints them. Below an entry's rows: flash.
TABLE = (
    # 1,024 is no crossing of rates: a new shape costs cuDNN 40 ms of planning once, and short ends of prompts differ
    Measured((9, 0), 64, 1024, {"cudnn": 439.8, "flash": 287.4, "efficient": 106.8}, _H200),
    Measured((9, 0), 128, 1024, {"cudnn": 645.1, "flash": 342.1, "efficient": 142.3}, _H200),
)  # fmt: skip


def fused(q: Tensor) -> bool:
    """Whether there is a choice at all."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0


def prefill_kernel(q: Tensor, keys: int) -> str:
    """The kernel for q [B, Hq, T, D] over this many keys: a name of KERNELS, or "cpu".

    Raises: ConfigError: the variable names no kernel, or one that is not here or does not take q.
    """
    if not q.is_cuda:
        return "cpu"
    if not fused(q):
        return "efficient"  # fp32 and odd head dims
    rows = q.shape[2]
    if rows == 1 or keys == 1:  # shapes that cuDNN refuses or, on some cards, gets wrong
        return FALLBACK
    return next(name for least, name in kernels_by_rows(q.device, q.shape[3]) if rows >= least)


def kernels_by_rows(device: torch.device, dim: int) -> tuple[tuple[int, str], ...]:
    """(least query rows, kernel) on this GPU, most rows first; the last takes any number."""
    return _by_rows(os.environ.get(VARIABLE, ""), device, dim)


@functools.cache
def _by_rows(value: str, device: torch.device, dim: int) -> tuple[tuple[int, str], ...]:
    capability = torch.cuda.get_device_capability(device)
    if not value:
        return by_table(capability, dim)
    if value not in KERNELS:
        raise unknown(VARIABLE, value, KERNELS)
    if reason := obstacle(value, capability, dim):
        raise ConfigError(
            f"{VARIABLE}={value}, but {reason}; unset it or name one that runs here: "
            f"{', '.join(present(capability, dim))}"
        )
    return ((0, value),)


def by_table(capability: tuple[int, int], dim: int, table: Sequence[Measured] = TABLE) -> tuple[tuple[int, str], ...]:
    """`kernels_by_rows` for a card: of each entry the fastest kernel that is present and takes this head dim."""
    entries = [entry for entry in table if entry.capability == capability and entry.dim >= dim]
    nearest = min((entry.dim for entry in entries), default=None)
    steps = [(0, FALLBACK)]
    for entry in sorted(entries, key=lambda entry: entry.rows):
        if entry.dim == nearest:
            ranked = sorted(entry.tflops, key=lambda name: -entry.tflops[name])
            name = next((name for name in ranked if not obstacle(name, capability, dim)), FALLBACK)
            if name != steps[-1][1]:
                steps.append((entry.rows, name))
    return tuple(reversed(steps))


def present(capability: tuple[int, int], dim: int) -> list[str]:
    """Names of the kernels that run on such a card with such heads, here and now."""
    return [name for name in KERNELS if not obstacle(name, capability, dim)]


def obstacle(name: str, capability: tuple[int, int], dim: int) -> str | None:
    """Why a kernel does not run there, or None."""
    majors, dims, package = KERNELS[name]
    if capability[0] not in majors:
        allowed = f"from {majors[0]}.0 on" if majors[-1] == 99 else " or ".join(f"{major}.x" for major in majors)
        return f"it needs compute capability {allowed}, and this GPU has {capability[0]}.{capability[1]}"
    if dim not in dims:
        allowed = f"up to {dims[-1]}" if isinstance(dims, range) else ", ".join(map(str, dims))
        return f"it takes head dims {allowed}, and the model has {dim}"
    if name == "cudnn" and not _has_cudnn():
        return "this torch has no cuDNN"
    if package and isinstance(found := load(package), str):
        return f"{package} cannot be imported ({found})"
    return None


@functools.cache
def load(package: str) -> ModuleType | str:
    """The module, or why it cannot be imported."""
    try:
        return importlib.import_module(package)
    except Exception as error:  # built for another torch or driver, half installed: whatever it is, it is not here
        return f"{type(error).__name__}: {error}"


@functools.cache
def _has_cudnn() -> bool:
    return torch.version.cuda is not None and torch.backends.cudnn.is_available()
