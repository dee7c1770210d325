"""Which Triton kernels run on a GPU: all; those that did not win are not kept (docs/kernels.md).

LOCRET_TRITON=none                       none: the torch paths
LOCRET_TRITON=compact,decode_attention   these
LOCRET_TRITON=all (or not set)           all of them
"""

from __future__ import annotations

import functools
import importlib.util
import os

from torch import Tensor

from locret.errors import ConfigError, unknown

KERNELS = ("append", "compact", "decode_attention", "linear", "merge", "rotate")
VARIABLE = "LOCRET_TRITON"


def use_triton(kernel: str, x: Tensor) -> bool:
    """Whether the Triton kernel of this name takes tensors where `x` lies.

    Raises: ConfigError: the variable names no kernel, or names one and Triton is not installed.
    """
    if not x.is_cuda:
        return False
    value = os.environ.get(VARIABLE, "")
    if kernel not in _wanted(value):
        return False
    if not _installed():
        if not value:
            return False
        raise ConfigError(f"{VARIABLE} asks for {kernel}, but Triton is not installed; pip install 'locret[gpu]'")
    return True


@functools.cache
def _wanted(value: str) -> frozenset[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    for name in names:
        if name not in ("all", "none", *KERNELS):
            raise unknown(VARIABLE, name, ("all", "none", *KERNELS))
    return frozenset(KERNELS) if not names or "all" in names else frozenset(names)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
