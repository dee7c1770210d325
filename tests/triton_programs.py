"""Python programs that use Triton, each in a process of its own: it reads the environment when it is imported."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def interpret(program: str, *arguments: str) -> Any:
    """The JSON that a program prints as its last line, its kernels running in Triton's interpreter."""
    return json.loads(_run(program, arguments, {"TRITON_INTERPRET": "1"}).splitlines()[-1])


def compile_only(program: str, cache: Path) -> list[list[str]]:
    """The words of every line that a program prints; what it compiles is kept in `cache` only."""
    return [line.split() for line in _run(program, (), {"TRITON_CACHE_DIR": str(cache)}).splitlines()]


def _run(program: str, arguments: tuple[str, ...], environment: dict[str, str]) -> str:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install triton; no GPU needed)")
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
