"""The files that training data comes in: JSONL, a JSON array, CSV and TSV, Parquet; told by what they begin with.  No jax.

A file is read in pieces: one record at a time is in memory, and of one larger than may be, only its beginning.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from jaxlora.core.errors import DataInvalid
from train.data.examples import KINDS
from train.data.parquet import rows
from train.data.records import ExampleTooLong
from train.data.shapes import Record, Shape, check_columns, json_kind, shape_of, shown, some_of

ACCEPTED = "JSONL (a JSON object a line), a JSON array of objects, CSV or TSV with a header of named columns, or Parquet, in UTF-8"
PART_BYTES = 2**16  # read at once
BOM = b"\xef\xbb\xbf"
PARQUET = b"PAR1"
FOREIGN = {  # what a file begins with → what it is, and what to do
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first",
    b"BZh": "a bzip2 file; unpack it first",
    b"\xfd7zXZ": "an xz file; unpack it first",
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack it, or save it as CSV",
    b"ARROW1": "an Arrow file; save it as Parquet or JSONL",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
}
DELIMITERS = {",": "CSV", "\t": "TSV", ";": "CSV with semicolons"}

type Read = Callable[[], Record]  # raises DataInvalid


@dataclass(frozen=True, kw_only=True, slots=True)
class Records:
    """The records of an open file, in its order."""

    format: str  # such as "JSONL"
    unit: str  # what is counted: "line", "element" or "row"
    records: Iterator[tuple[int, Read]]  # the number of each, from 1, and how to read it


@contextlib.contextmanager
def open_records(path: Path, most_bytes: int) -> Generator[Records]:
    """Opens a file of training data; inside, its records can be read.  most_bytes: of one record.

    Raises DataInvalid for a file that is none, OSError.
    """
    with path.open("rb") as file:
        if file.peek(len(BOM)).startswith(BOM):
            file.read(len(BOM))
        head = file.peek(PART_BYTES)
        for start, what in FOREIGN.items():
            if head.startswith(start):
                raise DataInvalid(f"the file is {what}; accepted are {ACCEPTED}")
        if head.startswith(PARQUET):
            yield Records(format="Parquet", unit="row", records=rows(file))
        elif head.lstrip()[:1] in (b"{", b""):
            yield Records(format="JSONL", unit="line", records=_lines(file, most_bytes))
        elif head.lstrip()[:1] == b"[":
            yield Records(format="a JSON array", unit="element", records=_elements(file, most_bytes))
        else:
            yield _table(file, most_bytes)


def is_parquet(path: str | Path) -> bool:
    """Returns whether a file, not a pipe, begins as Parquet does."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(len(PARQUET)) == PARQUET


def _too_large(size: int, most: int) -> NoReturn:
    raise ExampleTooLong(
        f"{size} bytes, more than the {most} that the longest example may take; shorten it",
        param=None,
        predictions=0,
        exact=False,
    )


def _json_read(raw: bytes, size: int, most: int) -> Record:
    if size > most:
        _too_large(size, most)
    return parse_object(raw)


def _lines(file: io.BufferedReader, most: int) -> Iterator[tuple[int, Read]]:
    """Yields each line that is not blank; of one larger than `most` only the beginning is kept."""
    for number in itertools.count(1):
        part = file.readline(most + 1)
        if not part:
            return
        raw, size = part.removesuffix(b"\n"), len(part)
        while not part.endswith(b"\n") and (part := file.readline(PART_BYTES)):
            size += len(part)
        size -= part.endswith(b"\n")
        if size > most or raw.strip():
            yield number, functools.partial(_json_read, raw, size, most)


# A JSON array.

_OUTSIDE = re.compile(rb'[][{}",]')
_INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


class _Elements:
    """Finds where the elements of an array begin and end, in pieces of any size, without parsing them."""

    def __init__(self, most: int):
        self._most = most
        self._raw, self._size = bytearray(), 0  # of the element so far
        self._depth, self._quoted, self._escaped = 0, False, False
        self.ended = False  # the array is over

    def feed(self, piece: bytes) -> Iterator[tuple[bytes, int]]:
        """Yields (beginning, size) of each element that ends in this piece; afterwards nothing but white space may come."""
        at = start = 0
        while at < len(piece):
            if self._quoted:
                at = self._string_end(piece, at)
                continue
            found = _OUTSIDE.search(piece, at)
            if found is None:
                break
            at = found.end()
            match found[0]:
                case b'"':
                    self._quoted = True
                case b"[" | b"{":
                    self._depth += 1
                case b"," if self._depth == 0:
                    yield self._taken(piece[start : at - 1])
                    start = at
                case b"]" if self._depth == 0:
                    last = self._taken(piece[start : at - 1])
                    self.ended = True
                    if last[0].strip():
                        yield last
                    self._keep(piece[at:])
                    return
                case b"]" | b"}":
                    self._depth -= 1
        self._keep(piece[start:])

    def _string_end(self, piece: bytes, at: int) -> int:
        """Returns where the string that this place is in ends, or the piece does."""
        if self._escaped:
            at, self._escaped = at + 1, False
        found = _INSIDE.match(piece, at)
        at = at if found is None else found.end()
        if at < len(piece):
            if piece[at : at + 1] == b'"':
                self._quoted = False
            else:  # a backslash is the last byte
                self._escaped = True
            at += 1
        return at

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        self._raw += part[: max(self._most + 1 - len(self._raw), 0)]

    def _taken(self, part: bytes) -> tuple[bytes, int]:
        self._keep(part)
        taken = bytes(self._raw), self._size
        self._raw, self._size = bytearray(), 0
        return taken

    @property
    def rest(self) -> bytes:
        """Returns the beginning of what has come after the last element."""
        return bytes(self._raw)


def _elements(file: io.BufferedReader, most: int) -> Iterator[tuple[int, Read]]:
    while file.read(1) != b"[":  # after white space
        pass
    elements, number = _Elements(most), 0
    while not elements.ended and (piece := file.read(PART_BYTES)):
        for raw, size in elements.feed(piece):
            number += 1
            yield number, functools.partial(_json_read, raw, size, most)
    if not elements.ended:
        yield number + 1, _refuse("the array does not end with ]; the file may be cut off")
    elif elements.rest.strip() or any(piece.strip() for piece in iter(lambda: file.read(PART_BYTES), b"")):
        yield number + 1, _refuse("something follows the end of the array; a file holds one array, or an object a line")


def _refuse(message: str) -> Read:
    return _raise(DataInvalid(message))


def _raise(error: DataInvalid) -> Read:
    def read() -> NoReturn:
        raise error

    return read


def parse_object(raw: bytes) -> Record:
    """Returns the JSON object of a line or element.  Raises DataInvalid."""
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise DataInvalid(f"must be an object, got {json_kind(value)}")
    return value


def parse_json(raw: bytes | str) -> object:
    """Returns the value of a JSON text.  Raises DataInvalid, also for a key given twice and a number that is not finite."""
    try:
        text = raw if isinstance(raw, str) else raw.decode()
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise DataInvalid(f"not UTF-8: byte {error.start + 1} of it; save the file as UTF-8") from error
    except RecursionError as error:
        raise DataInvalid("nested too deeply to be an example") from error
    except DataInvalid:
        raise
    except ValueError as error:  # also a number of too many digits
        raise DataInvalid(f"not JSON: {error}") from error


def _no_duplicates(pairs: list[tuple[str, object]]) -> Record:
    got = dict(pairs)
    if len(got) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise DataInvalid("the key is given twice", param=shown(next(k for k, n in counts.items() if n > 1)))
    return got


def _no_constant(name: str) -> object:
    raise DataInvalid(f"{name} is not JSON; give a finite number")


# Tables.


class _TableLines:
    """The lines of a table as text, for `csv.reader`, which asks for more of them while a cell in quotes goes on.

    Raises ExampleTooLong for a row of more than `most` bytes, when it has passed it over.
    """

    def __init__(self, file: io.BufferedReader, most: int):
        self._file, self.most = file, most  # bytes of a row
        self.number = 0  # of the line that was read last
        self._size, self._quotes = 0, 0  # of the row so far

    def begin_row(self) -> None:
        """The next line begins a row."""
        self._size = self._quotes = 0

    def __iter__(self) -> _TableLines:
        return self

    def __next__(self) -> str:
        raw = part = self._read(self.most + 1 - self._size)
        if not raw:
            raise StopIteration
        if self._size > self.most:
            while part and not (part.endswith(b"\n") and self._quotes % 2 == 0):
                part = self._read(PART_BYTES)
            _too_large(self._size, self.most)
        return raw.decode(errors="surrogateescape")  # bytes that are no UTF-8 are told of their own row

    def _read(self, most: int) -> bytes:
        part = self._file.readline(most)
        self._size += len(part)
        self._quotes += part.count(b'"')
        self.number += part.endswith(b"\n")
        return part


def _table(file: io.BufferedReader, most: int) -> Records:
    """Returns the rows of a table whose first line names its columns.  Raises DataInvalid for a file of no known format."""
    lines = _TableLines(file, most)
    try:
        header = next((line for line in lines if line.strip()), "")
    except ExampleTooLong:
        header = ""
    for delimiter, name in DELIMITERS.items():
        columns = _header(header, delimiter)
        shape = shape_of(columns)
        if shape is not None:
            check_columns(shape, columns)
            return Records(format=name, unit="line", records=_rows(lines, columns, shape, delimiter))
    widest = max((_header(header, delimiter) for delimiter in DELIMITERS), key=len)
    if len(widest) > 1:
        raise DataInvalid(
            f"the file begins with the columns {some_of(widest)}, which are of no known kind; give "
            f"{'; or '.join(KINDS.values())}"
        )
    raise DataInvalid(f"the file begins with {header.strip()[:40]!a}, which is none of what is read; give {ACCEPTED}")


def _header(line: str, delimiter: str) -> list[str]:
    try:
        return [cell.strip().lower() for cell in next(csv.reader([line], delimiter=delimiter, strict=True), [])]
    except csv.Error:
        return []


def _rows(lines: _TableLines, columns: Sequence[str], shape: Shape, delimiter: str) -> Iterator[tuple[int, Read]]:
    csv.field_size_limit(max(csv.field_size_limit(), lines.most + 1))  # `lines` has the limit
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin_row()
        number = lines.number + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except ExampleTooLong as error:
            yield number, _raise(error)
        except csv.Error as error:
            yield (
                number,
                _refuse(f"not {DELIMITERS[delimiter]}: {error}; quote a cell that holds quotes, and double them"),
            )
        else:
            if cells:
                yield number, functools.partial(_row, cells, columns, shape)


def _row(cells: Sequence[str], columns: Sequence[str], shape: Shape) -> Record:
    if len(cells) != len(columns):
        raise DataInvalid(
            f"{len(cells)} cells, but the header names {len(columns)} columns; quote a cell that holds the delimiter"
        )
    record: Record = {}
    for column, cell in zip(columns, cells, strict=True):
        if not cell and column in shape.optional:
            continue
        if not cell.isascii() and any("\udc80" <= c <= "\udcff" for c in cell):
            raise DataInvalid("not UTF-8; save the file as UTF-8", param=column)
        record[column] = _structured(cell, column) if column in shape.structured else cell
    return record


def _structured(cell: str, column: str) -> object:
    try:
        return parse_json(cell)
    except DataInvalid as error:
        raise DataInvalid(f"must be JSON: {error.message}", param=column) from error
