"""Files to rows: JSONL, CSV, TSV and plain text, by index or as a stream; compressed files too.

`sources` opens these for a task, `pretraining` for a mixture, `predict` as a stream of any length.
"""

import array
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxprompt.typing import UserError

Fields = dict[str, Any]

FILE_KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".txt": "text"}
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}

_FIELD_LIMIT = 2**27  # characters of one CSV field; Python's own bound of 2**17 is less than a book


class JsonlSource:
    """A JSONL file by its line offsets: 16 bytes of memory a row; blank lines are passed over."""

    def __init__(self, path: str | Path):
        self._lines = _Lines(path)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Fields:
        return _json_row(self._lines[index], self.where(index))

    def where(self, index: int) -> str:
        """`file:line`."""
        return self._lines.where(index)


class TextSource(JsonlSource):
    """A text file, one text a line, in the field `text`."""

    def __getitem__(self, index: int) -> Fields:
        return {"text": _decode(self._lines[index], self.where(index))}


class TsvSource:
    """A TSV file by its line offsets, without quoting, as GLUE's are; a header unless `columns`."""

    def __init__(self, path: str | Path, columns: Sequence[str] = ()):
        self._lines = _Lines(path)
        self._skip = 0 if columns or not len(self._lines) else 1
        self._columns = list(columns) or (self._cells(0) if self._skip else [])

    def __len__(self) -> int:
        return len(self._lines) - self._skip

    def __getitem__(self, index: int) -> Fields:
        return _named(self._cells(index + self._skip), self._columns, self.where(index))

    def where(self, index: int) -> str:
        """`file:line`."""
        return self._lines.where(index + self._skip)

    def _cells(self, line: int) -> list[str]:
        return _decode(self._lines[line], self._lines.where(line)).split("\t")


class CsvSource:
    """A CSV file, read into memory because its fields may hold line ends."""

    def __init__(self, path: str | Path, columns: Sequence[str] = ()):
        with contextlib.closing(_open(path)) as stream:
            self._rows = list(_csv_rows(stream, str(path), columns))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Fields:
        return dict(self._rows[index][0])

    def where(self, index: int) -> str:
        """`file:line`, the line where the row ends."""
        return self._rows[index][1]


def read_stream(path: str | Path, text_field: str = "text") -> Iterator[tuple[Fields, str]]:
    """Rows of a file, or of standard input for `-`, one at a time, each with where it stands.

    Files ending in .jsonl, .csv and .tsv (and their .gz and .xz) are read as such; of any other, a
    line that begins with `{` is a JSON object and any other line a text in `text_field`. Blank
    lines are passed over.

    Raises: UserError for a missing file and, when it is reached, for a malformed line.
    """
    name = "standard input" if str(path) == "-" else str(path)
    kind = "" if str(path) == "-" else FILE_KINDS.get(file_suffix(path), "")
    with contextlib.closing(sys.stdin.buffer if str(path) == "-" else _open(path)) as stream:
        if kind == "csv":
            yield from _csv_rows(stream, name, ())
            return
        columns: list[str] = []
        for number, line in enumerate(stream, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            where = f"{name}:{number}"
            if not line.strip():
                continue
            if kind == "tsv":
                cells = _decode(line, where).split("\t")
                if columns:
                    yield _named(cells, columns, where), where
                columns = columns or cells
            elif kind == "jsonl" or line.lstrip().startswith(b"{"):
                yield _json_row(line, where), where
            else:
                yield {text_field: _decode(line, where)}, where


def file_suffix(path: str | Path) -> str:
    """The ending that says what a file holds, in lower case, compression left aside."""
    path = Path(path)
    return (path.with_suffix("") if path.suffix in OPENERS else path).suffix.lower()


class _Lines:
    """A file's lines that are not blank, by offset."""

    def __init__(self, path: str | Path):
        self._path = str(path)
        self._text = _file_bytes(Path(path))
        starts, numbers = array.array("q"), array.array("q")
        at = len(codecs.BOM_UTF8) if self._text[:3] == codecs.BOM_UTF8 else 0
        number = 0
        while at < len(self._text):
            number += 1
            end = self._end(at)
            if self._text[at:end].strip():
                starts.append(at)
                numbers.append(number)
            at = end + 1
        self._starts = np.frombuffer(starts, np.int64)
        self._numbers = np.frombuffer(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        start = int(self._starts[index])
        return self._text[start : self._end(start)]

    def where(self, index: int) -> str:
        return f"{self._path}:{self._numbers[index]}"

    def _end(self, start: int) -> int:
        end = self._text.find(b"\n", start)
        return len(self._text) if end < 0 else end


def _open(path: str | Path) -> BinaryIO:
    path = Path(path)
    try:
        return OPENERS.get(path.suffix, open)(path, "rb")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _file_bytes(path: Path) -> mmap.mmap | bytes:
    """A file's bytes: mapped, or read into memory when it is compressed or empty."""
    try:
        with _open(path) as stream:
            if path.suffix in OPENERS or path.stat().st_size == 0:
                return stream.read()
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: {error.reason}") from error


def _json_row(line: bytes, where: str) -> Fields:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not a JSON object: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object but {type(row).__name__}")
    return row


def _named(cells: Sequence[str], columns: Sequence[str], where: str) -> Fields:
    if len(cells) != len(columns):
        raise UserError(f"{where} has {len(cells)} columns, the header has {len(columns)}")
    return dict(zip(columns, cells, strict=True))


def _csv_rows(stream: BinaryIO, name: str, columns: Sequence[str]) -> Iterator[tuple[Fields, str]]:
    csv.field_size_limit(_FIELD_LIMIT)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    lines = csv.reader(text, strict=True)
    try:
        for cells in lines:
            where = f"{name}:{lines.line_num}"
            if cells and columns:
                yield _named(cells, columns, where), where
            columns = columns or cells
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{name}:{lines.line_num + 1} is not CSV: {error}") from error
    finally:
        text.detach()  # the caller closes the stream
