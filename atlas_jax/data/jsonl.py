"""Rows of a JSON-lines file, streamed or by index. Every error names the file, the line and the remedy."""

import codecs
import json
import operator
import os
import re
import weakref
from array import array
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NoReturn, overload

import numpy as np

from atlas_jax.errors import UserError

MAX_LINE_BYTES = 16 * 2**20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # an escaped UTF-16 surrogate, which is text only in a pair


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict]]:
    """Yields (1-based line number, JSON object) of every line that is not blank; holds one line in memory.

    Accepts a byte order mark and CRLF line ends. UserError if the file has no rows.
    """
    for line, _, row in read_lines(path):
        yield line, row


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes, dict]]:
    """Yields (line number, JSON text with the line end, JSON object) of every line, otherwise like `read_rows`."""
    for line, _, raw in _lines(path):
        yield line, raw, _parse(path, line, raw)


class JsonlRows(Sequence[dict]):
    """The rows of a JSON-lines file by index: one scan finds the line offsets, each row is parsed on access.

    Reads are positional (`pread`), so threads can share one `JsonlRows`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        lines, starts, ends = array("q"), array("q"), array("q")
        for line, start, raw in _lines(path):
            lines.append(line)
            starts.append(start)
            ends.append(start + len(raw))
        self._lines, self._starts, self._ends = (np.frombuffer(column, np.int64) for column in (lines, starts, ends))
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, i: int) -> dict: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict]: ...
    def __getitem__(self, i: int | slice) -> dict | list[dict]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        start, end = int(self._starts[operator.index(i)]), int(self._ends[i])
        return _parse(self.path, self.line_number(i), os.pread(self._fd, end - start, start))

    def line_number(self, i: int) -> int:
        """Returns the 1-based line number of row `i`; blank lines count."""
        return int(self._lines[i])

    def error(self, i: int, message: str) -> UserError:
        """Returns a `UserError` about row `i` (file, line, message) for the caller to raise."""
        return UserError(f"{self.path}:{self.line_number(i)}: {message}")


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, int, bytes]]:
    """Yields (line number, byte offset, bytes with the line end) of every line that is not blank."""
    with _open(path) as file:
        start, line, rows = 0, 0, 0
        try:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                line += 1
                if len(raw) > MAX_LINE_BYTES:
                    limit = f"longer than {MAX_LINE_BYTES} bytes"
                    raise UserError(f"{path}:{line}: {limit}; write one JSON object a line, or split this one")
                text = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
                if text.strip():
                    rows += 1
                    yield line, start + len(raw) - len(text), text
                start += len(raw)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the disk and try again") from None
    if not rows:
        raise UserError(f"{path}: no rows, the file is empty; write one JSON object a line")


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a .jsonl file in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); check its permissions") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _parse(path: str | os.PathLike[str], line: int, raw: bytes) -> dict:
    where = f"{path}:{line}"
    try:
        row = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        byte = error.start + 1
        raise UserError(f"{where}: invalid UTF-8 at byte {byte} of the line; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        if not raw.endswith(b"\n"):
            raise UserError(f"{where}: the last line looks truncated ({error}); fetch the file again") from None
        raise UserError(f"{where}: not valid JSON ({error}); write one JSON object a line") from None
    if not isinstance(row, dict):
        found = type(row).__name__
        raise UserError(f'{where}: a row must be a JSON object, found a {found}; write {{"field": value, ..}}')
    if _SURROGATE.search(raw):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: half of a \\ud8.. surrogate pair, which is no text; repair the line") from None
    return row
