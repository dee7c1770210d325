"""Rows of local data files: .jsonl, .json, both also as .gz, and .parquet where pyarrow is installed. Never scripts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from locret.errors import DataError

ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
Row = dict[str, Any]


def find(path: Path, where: str) -> list[Path]:
    """The data files of a folder (and of the folders in it), or the file itself.

    Args:    where: said when there is nothing, so that the user can get it.
    """
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise DataError(f"{path}: cannot read this kind of file; readable: {', '.join(ENDINGS)}")
        return [path]
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; {where}")
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(ENDINGS))
    if not found:
        raise DataError(f"{path} holds no data file ({', '.join(ENDINGS)}); {where}")
    return found


def stem(path: Path) -> str:
    """The name without its ending: "qasper" of qasper.jsonl.gz."""
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if path.name.endswith(ending):
            return path.name.removesuffix(ending)
    return path.stem


def rows(path: Path) -> Iterator[tuple[Row, str]]:
    """(row, "file:line" or "file, row n") for every row.

    A .json file holds a list of rows, an object with one under "data", or one row a line.
    Raises: DataError: a broken line, with file and line; a row that is no object.
    """
    if path.name.endswith(".parquet"):
        yield from _parquet(path)
    elif ".jsonl" in path.name:
        yield from _lines(path)
    else:
        yield from _whole(path)


def _open(path: Path) -> Any:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _lines(path: Path) -> Iterator[tuple[Row, str]]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _object(_parse(line, f"{path}:{number}"), f"{path}:{number}"), f"{path}:{number}"
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{number + 1}: broken file ({error}); download it again") from None


def _whole(path: Path) -> Iterator[tuple[Row, str]]:
    try:
        with _open(path) as file:
            text = file.read()
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(f"{path}: broken file ({error}); download it again") from None
    try:
        data = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("{") and "Extra data" in str(error):  # JSON lines under another name
            yield from _lines(path)
            return
        raise DataError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON: {error}") from None
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    for number, row in enumerate(data if isinstance(data, list) else [data]):
        yield _object(row, f"{path}, row {number}"), f"{path}, row {number}"


def _parse(line: str, name: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{name}: not JSON: {error}; the file may be cut short, download it again") from None


def _object(row: Any, name: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{name}: expected a JSON object, found {type(row).__name__}")
    return row


def _parquet(path: Path) -> Iterator[tuple[Row, str]]:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise DataError(
            f"{path}: .parquet files need pyarrow: pip install pyarrow (or take the .jsonl files)"
        ) from None
    number = 0
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=16):
        for row in batch.to_pylist():
            yield row, f"{path}, row {number}"
            number += 1
