"""The samples of a grid in kvpress's schema, so that another harness reads the texts that `locret eval` reads."""

from __future__ import annotations

import json
from pathlib import Path

from locret.errors import ConfigError
from locret.evaluate.prompts import digest
from locret.evaluate.samples import Samples
from locret.files import write_text
from locret.tasks.public import to_kvpress


def export_grid(samples: Samples, path: Path) -> int:
    """Write one row a question; returns the number of rows.

    Columns besides kvpress's, which it does not read: metric, and what names the sample in our results: length, seed,
    index, sample (a digest of its texts).
    Raises: ConfigError: contexts are to be cut to `max_context` tokens, so their texts are not what is read.
            DataError: turns with different answer prefixes.
    """
    if samples.grid.max_context is not None:
        raise ConfigError("max_context cuts contexts by tokens, and rows of kvpress's schema are whole texts; export "
                          "without it, or set max_context_length in kvpress")  # fmt: skip
    lines: list[str] = []
    for block in samples.grid.blocks():
        for record in samples.records(block, block.samples):
            name = {"length": block.length, "seed": block.seed, "index": record.index, "sample": digest(record)}
            lines += [json.dumps({**row, **name}, ensure_ascii=False) for row in to_kvpress([record])]
    write_text(path, "".join(line + "\n" for line in lines))
    return len(lines)
