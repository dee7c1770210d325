"""What a run says: lines on the terminal, records in metrics.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

BORN = time.perf_counter()  # the program's start, near enough


class Log:
    """Lines on the terminal and records in metrics.jsonl; of several processes only one speaks."""

    def __init__(self, path: Path, speaks: bool = True):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.speaks = path, speaks

    def say(self, text: str) -> None:
        if self.speaks:
            print(f"[{time.perf_counter() - BORN:6.1f}s] {text}", flush=True)

    def record(self, kind: str, **values: Any) -> None:
        if not self.speaks:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")
