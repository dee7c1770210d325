"""Write SHA256SUMS of the embedded model's files, which `locret doctor` checks: python recipes/embedded/seal.py"""

from __future__ import annotations

import hashlib

from locret.backbone import EMBEDDED
from locret.files import write_text

NAME = "SHA256SUMS"


def main() -> None:
    files = sorted(path for path in EMBEDDED.rglob("*") if path.is_file() and path.name not in (NAME, "README.md"))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(EMBEDDED)}" for path in files]
    write_text(EMBEDDED / NAME, "\n".join(lines) + "\n")
    print(f"{len(lines)} files")


if __name__ == "__main__":
    main()
