"""Files -> text: what is readable, and for the rest an error that says what was seen and what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import pipe

from locret.documents import read_document
from locret.errors import DataError

pypdf = pytest.importorskip("pypdf")  # a machine with a GPU may have only what its tests need


def pdf(path: Path, text: str = "", password: str | None = None) -> Path:
    """A one-page PDF with one line of text, written by hand through pypdf's objects."""
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(width=300, height=300)
    if text:
        font = DictionaryObject(
            {
                NameObject("/Type"): NameObject("/Font"),
                NameObject("/Subtype"): NameObject("/Type1"),
                NameObject("/BaseFont"): NameObject("/Helvetica"),
            }
        )
        fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
    if password is not None:
        writer.encrypt(password, algorithm="RC4-128")
    with open(path, "wb") as file:
        writer.write(file)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "noextension", "a.log"])
def test_utf8_text_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("# Häuser\n\n日本 ✓\n", encoding="utf-8")
    assert read_document(tmp_path / name) == "# Häuser\n\n日本 ✓"


def test_windows_files_lose_their_mark_and_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_document(tmp_path / "a.txt") == "one\ntwo"


def test_pdf_text_is_extracted_whatever_the_name(tmp_path: Path) -> None:
    assert "The code is 4711" in read_document(pdf(tmp_path / "a.pdf", "The code is 4711"))
    assert "The code is 4711" in read_document(pdf(tmp_path / "renamed.bin", "The code is 4711"))


def test_pdf_with_an_empty_password_opens(tmp_path: Path) -> None:
    assert "hello" in read_document(pdf(tmp_path / "a.pdf", "hello", password=""))


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, "grüß".encode())
    assert read_document("-") == "grüß"


def test_a_pdf_on_stdin_is_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pdf(tmp_path / "a.pdf", "The code is 4711").read_bytes()
    pipe(monkeypatch, data)
    assert read_document("-") == "The code is 4711"
    pipe(monkeypatch, b"%PDF-1.7 broken")
    with pytest.raises(DataError, match="stdin is not a readable PDF"):
        read_document("-")


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("x")
    with pytest.raises(DataError, match=r"reprot\.txt: no such file .*did you mean .*report\.txt"):
        read_document(tmp_path / "reprot.txt")
    with pytest.raises(DataError, match="does not exist either"):
        read_document(tmp_path / "nowhere" / "a.txt")


@pytest.mark.parametrize("data", [b"", b" \n\t\n"])
def test_empty_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match="is empty"):
        read_document(tmp_path / "a.txt")


def test_not_utf8_names_line_byte_and_command(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("eins\nzwei\nfünf\n".encode("latin1"))
    with pytest.raises(DataError, match=r"line 3: byte 0xfc at offset 11 is not UTF-8; .*iconv"):
        read_document(tmp_path / "a.txt")


@pytest.mark.parametrize(("data", "kind"), [(b"\x7fELF\0\0", "binary"), ("text".encode("utf-16"), "UTF-16")])
def test_binary_and_utf16_are_told_apart(tmp_path: Path, data: bytes, kind: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=kind):
        read_document(tmp_path / "a.txt")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        read_document(tmp_path)


def test_encrypted_pdf(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="encrypted"):
        read_document(pdf(tmp_path / "a.pdf", "secret", password="hunter2"))


def test_pdf_without_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text in them"):
        read_document(pdf(tmp_path / "a.pdf"))


@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 0.9])
def test_broken_pdf_is_an_error_and_not_a_traceback(tmp_path: Path, keep: float) -> None:
    data = pdf(tmp_path / "a.pdf", "hello").read_bytes()
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7\n" + os.urandom(64) if keep == 0 else data[: int(len(data) * keep)])
    with pytest.raises(DataError, match=r"PDF|no text"):
        read_document(tmp_path / "a.pdf")
