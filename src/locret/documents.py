"""A file or stdin -> text. What cannot be read is a DataError that says what was seen and what to do."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import BinaryIO

from locret.errors import DataError

READABLE = (".txt", ".md", ".pdf", "- (stdin)")
_PDF = b"%PDF-"  # how every PDF begins


def read_document(source: str | Path) -> str:
    """The text of a PDF, of stdin ("-", a PDF or text), or of any other file, which must be UTF-8.

    White space at the end is dropped: models were trained with one blank line between a document and a question.

    Raises: DataError: missing, a folder, empty, not UTF-8, or a PDF that is encrypted, broken or has no text.
    """
    return _read(source).rstrip()


def _read(source: str | Path) -> str:
    if str(source) == "-":
        data = _stdin().read()
        return _pdf_text(data, "stdin") if data.startswith(_PDF) else _decode(data, "stdin")
    path = Path(source)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{_similar(path)}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; name one file, or pass several files joined: cat {path}/*.txt | "
                        f"locret generate --file - ...") from None  # fmt: skip
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from None
    if path.suffix.lower() == ".pdf" or data.startswith(_PDF):
        return _pdf_text(data, str(path))
    return _decode(data, str(path))


def _decode(data: bytes, name: str) -> str:
    """UTF-8 (a byte order mark is dropped), with Unix line ends."""
    if not data.strip():
        raise DataError(f"{name} is empty; there is nothing to read")
    if b"\0" in data[:8192]:
        kind = "UTF-16 text" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "a binary file"
        raise DataError(f"{name} looks like {kind}; convert it to UTF-8 text first. Readable: {', '.join(READABLE)}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8; convert it, "
            f"for example: iconv -f latin1 -t utf-8 {name} > utf8.txt"
        ) from None
    return text.replace("\r\n", "\n")


def _pdf_text(data: bytes, name: str) -> str:
    """The pages' text with a blank line between pages."""
    import logging

    from pypdf import PdfReader  # here: only a PDF pays for its import
    from pypdf.errors import DependencyError, FileNotDecryptedError, PyPdfError

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns per object about files that read well enough
    locked = DataError(f"{name} is encrypted; save a copy without a password (qpdf --decrypt in.pdf out.pdf)")
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):  # many files have an empty user password
            raise locked
        text = "\n\n".join(page.extract_text() for page in reader.pages)
    except (FileNotDecryptedError, DependencyError):
        raise locked from None
    except DataError:
        raise
    except (PyPdfError, ValueError, KeyError, TypeError, IndexError, AttributeError, OSError, RecursionError) as error:
        # pypdf raises plain Python errors on damaged objects
        raise DataError(f"{name} is not a readable PDF ({error}); open and re-save it, or convert it to text") from None
    if not text.strip():
        raise DataError(f"{name} has {len(reader.pages)} pages and no text in them (scanned?); run OCR on it first")
    return text


def _stdin() -> BinaryIO:
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError("stdin is a terminal; pipe text into it: cat report.txt | locret generate --file - ...")
    return sys.stdin.buffer


def _similar(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return f" (the folder {path.parent} does not exist either)"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f" (did you mean {str(path.with_name(near[0]))!r}?)" if near else ""
