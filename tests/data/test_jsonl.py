"""Rows of a JSON-lines file: accepted and refused content, errors that name file and line, memory, threads."""

import concurrent.futures
import json
import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas_jax.data import jsonl
from atlas_jax.data.jsonl import MAX_LINE_BYTES, JsonlRows, read_rows
from atlas_jax.errors import UserError

MESSY = b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xc3\xa9\xe2\x80\xa8"}\n\t\n{"a": 3}'
BAD_FILES = {  # content, number of the bad line (None: the whole file), part of the message
    "malformed": (b'{"a": 1}\n\n{"a": }\n{"a": 2}\n', 3, "not valid JSON"),
    "truncated": (b'{"a": 1}\n{"a": "he', 2, "looks truncated"),
    "invalid_utf8": (b'{"a": 1}\n{"a": "\xff"}\n', 2, "invalid UTF-8 at byte 8 of the line; save the file as UTF-8"),
    "utf16": ('{"a": 1}\n'.encode("utf-16"), 1, "invalid UTF-8 at byte 1"),
    "array": (b'[{"a": 1}]\n', 1, "must be a JSON object, found a list"),
    "nested": (b'{"a": ' + b"[" * 200_000 + b"\n", 1, "not valid JSON"),
    "huge_number": (b'{"a": ' + b"1" * 5000 + b"}\n", 1, "not valid JSON"),
    "surrogate": (rb'{"a": "\ud83d"}' + b"\n", 1, "surrogate"),
    "empty": (b"", None, "no rows"),
    "blank": (b"\xef\xbb\xbf\n \r\n", None, "no rows"),
}


def write(folder, content):
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    return path


def test_bom_crlf_blank_lines_and_a_missing_last_newline_are_accepted(tmp_path):
    """U+2028 inside a string is accepted too; line numbers count the blank lines."""
    path = write(tmp_path, MESSY)
    assert list(read_rows(path)) == [(1, {"a": 1}), (4, {"a": "é\u2028"}), (6, {"a": 3})]


@pytest.mark.parametrize("case", BAD_FILES)
def test_errors_of_bad_files_name_file_and_line(tmp_path, case):
    """The message is one line: file, line number, what is wrong and a remedy."""
    content, line, message = BAD_FILES[case]
    path = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        list(read_rows(path))
    where = f"{path}:{line}: " if line else f"{path}: "
    assert str(error.value).startswith(where)
    assert message in str(error.value)
    assert ";" in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_before_a_bad_line_are_yielded(tmp_path):
    """The file is streamed; the row before the bad line holds a complete surrogate pair, which is accepted."""
    rows = read_rows(write(tmp_path, rb'{"a": "\ud83d\udc4d"}' + b"\n{"))
    assert next(rows) == (1, {"a": "👍"})
    with pytest.raises(UserError, match="looks truncated"):
        next(rows)


def test_a_missing_file_or_a_folder_is_an_error(tmp_path):
    """`read_rows` and `JsonlRows` name the path and the remedy."""
    for read in (lambda path: list(read_rows(path)), JsonlRows):
        with pytest.raises(UserError, match=r"nothing\.jsonl: no such file; check the path"):
            read(tmp_path / "nothing.jsonl")
        with pytest.raises(UserError, match=r"is a folder; name a \.jsonl file"):
            read(tmp_path)


def test_a_line_over_16_mib_is_refused_without_reading_it(tmp_path):
    """A line of 1 GiB is refused within 48 MiB of memory; a line of exactly 16 MiB is read."""
    path = tmp_path / "endless.jsonl"
    with open(path, "wb") as file:
        file.truncate(2**30)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"endless\.jsonl:1: longer than 16777216 bytes"):
        list(read_rows(path))
    assert tracemalloc.get_traced_memory()[1] < 3 * MAX_LINE_BYTES
    tracemalloc.stop()
    path.write_text('{"a": "' + "x" * (MAX_LINE_BYTES - 10) + '"}\n')
    assert path.stat().st_size == MAX_LINE_BYTES
    assert len(list(read_rows(path))) == 1


def test_streaming_holds_one_line_in_memory(tmp_path):
    """Streaming 8 MB of rows takes less than 1 MiB of memory."""
    path = write(tmp_path, (b'{"a": "' + b"x" * 1000 + b'"}\n') * 8000)
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 8000
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_rows_by_index_equal_the_streamed_rows(tmp_path):
    """Rows are equal in any order, with negative indices and slices; `line_number` and `error` give the file's line."""
    path = write(tmp_path, MESSY)
    rows, streamed = JsonlRows(path), list(read_rows(path))
    assert len(rows) == 3
    assert [(rows.line_number(i), rows[i]) for i in (2, 0, 1)] == [streamed[i] for i in (2, 0, 1)]
    assert rows[-1] == {"a": 3}
    assert rows[1:] == [row for _, row in streamed[1:]]
    assert str(rows.error(1, "no answers; add some")) == f"{path}:4: no answers; add some"
    with pytest.raises(IndexError):
        rows[3]


def test_rows_are_parsed_on_demand(tmp_path):
    """A malformed row is an error only when it is accessed; a file without rows is one at once."""
    rows = JsonlRows(write(tmp_path, b'{"a": 1}\n\n{"a": \n'))
    assert rows[0] == {"a": 1}
    with pytest.raises(UserError, match=r"rows\.jsonl:3: not valid JSON"):
        rows[1]
    with pytest.raises(UserError, match="no rows"):
        JsonlRows(write(tmp_path, b"\n"))


def test_threads_can_share_jsonl_rows(tmp_path):
    """Eight threads reading 4000 random rows get the right ones, since reads are positional."""
    rows = JsonlRows(write(tmp_path, b"".join(b'{"a": "%s"}\n' % (b"%d" % i * (i % 50)) for i in range(2000))))
    numbers = random.Random(0).choices(range(2000), k=4000)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = list(pool.map(rows.__getitem__, numbers))
    assert read == [{"a": str(i) * (i % 50)} for i in numbers]


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), min_size=1), st.booleans())
def test_any_json_objects_are_read_back(tmp_path_factory, objects, ascii_only):
    """Any texts and numbers, with escaped or raw non-ASCII characters, streamed and by index."""
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in objects)
    path = write(tmp_path_factory.getbasetemp(), text.encode())
    assert [row for _, row in jsonl.read_rows(path)] == objects == list(JsonlRows(path))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_refused(tmp_path, number):
    """Python reads and writes them; other programs do not, and scores of them are none."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{{"a": {number}}}\n')
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: not valid JSON \({number} is no number of JSON\)"):
        list(read_rows(path))
