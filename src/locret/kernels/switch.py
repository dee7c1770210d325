"""Which Triton kernels run: none, until a measurement on the device says that one wins (docs/kernels.md).

LOCRET_TRITON=compact,decode_attention   these
LOCRET_TRITON=all                        all of them
LOCRET_TRITON= (or not set)              none: the torch paths
"""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor

from locret.errors import ConfigError, unknown

KERNELS = ("append", "compact", "decode_attention", "linear")
VARIABLE = "LOCRET_TRITON"


def use_triton(kernel: str, x: Tensor) -> bool:
    """Whether the Triton kernel of this name takes tensors where `x` lies.

    Raises: ConfigError: the variable names no kernel, or names one and Triton is not installed.
    """
    wanted = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    for name in wanted:
        if name != "all" and name not in KERNELS:
            raise unknown(VARIABLE, name, ("all", *KERNELS))
    if not x.is_cuda or not {"all", kernel} & set(wanted):
        return False
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(f"{VARIABLE} asks for {kernel}, but Triton is not installed; pip install 'locret[gpu]'")
    return True
