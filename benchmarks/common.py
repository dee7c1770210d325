"""What every benchmark writes beside its numbers, and how numbers get into a page."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import locret
from locret.evaluate.machine import commit

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def provenance() -> dict[str, Any]:
    """What a reader needs to repeat the numbers."""
    return {
        "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit(),
        "date": time.strftime("%Y-%m-%d"), "locret": locret.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
    }  # fmt: skip


def fill(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`."""
    old = page.read_text(encoding="utf-8")
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    assert re.search(pattern, old, re.DOTALL), f"{page.name} has no block {name}"
    page.write_text(re.sub(pattern, lambda m: m[1] + text + "\n" + m[2], old, flags=re.DOTALL), encoding="utf-8")
