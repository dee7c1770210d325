"""What a reader needs to repeat the numbers: program, versions, machine. Every process of a run leaves its own note."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import locret
from locret.backbone import Backbone
from locret.files import write_text


def provenance(backbone: Backbone) -> dict[str, Any]:
    """What a reader needs to repeat the numbers."""
    cuda = backbone.device.type == "cuda"
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "locret": locret.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name() if cuda else f"CPU {_cpu()}, {os.cpu_count()} cores",
    }


def commit() -> str:
    """Of this program, or ""; LOCRET_COMMIT says it where git does not know."""
    if named := os.environ.get("LOCRET_COMMIT"):
        return named
    ask, place = ["git", "rev-parse", "--short=12", "HEAD"], Path(__file__).parent
    try:
        run = subprocess.run(ask, cwd=place, capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip()


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")


def leave_note(folder: Path, rank: int, backbone: Backbone) -> None:
    """Who wrote journal/RANK.jsonl, as machines/RANK.json; a run that goes on elsewhere adds a note."""
    path = folder / "machines" / f"{rank:03}.json"
    notes = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    note = provenance(backbone)
    if note not in notes:
        write_text(path, json.dumps([*notes, note]) + "\n")


def machines(folder: Path) -> list[dict[str, Any]]:
    """All notes of a run."""
    paths = sorted((folder / "machines").glob("*.json"))
    return [note for path in paths for note in json.loads(path.read_text(encoding="utf-8"))]


def joined(notes: list[dict[str, Any]]) -> dict[str, str]:
    """One note that says everything that any of them does."""
    return {name: " + ".join(dict.fromkeys(note[name] for note in notes)) for name in notes[0]}
