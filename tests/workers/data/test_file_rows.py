"""One file's rows are read whatever its encoding's details and whatever stands in columns that nobody reads."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workers.data.dataset_files import digest_of_rows
from workers.data.datasets import DataError, Problem, read_rows
from workers.data.file_rows import rows_of

TWO = [{"prompt": "1+1=", "reference": "2"}, {"prompt": "ü", "reference": "3"}]
LINES = '{"prompt": "1+1=", "reference": "2"}\n{"prompt": "ü", "reference": "3"}\n'
ARRAY = f"[{LINES.replace(chr(10), ',', 1)}]"
CELLS = "prompt,reference\n1+1=,2\nü,3\n"


def values(path: Path) -> list[dict[str, Any]]:
    return [record.values for record in rows_of(path)]


@pytest.mark.parametrize("before", ["", "\ufeff", "\n \n", "\ufeff\n"], ids=["plain", "mark", "lines", "both"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("name", "text"),
    [("x.jsonl", LINES), ("x.json", LINES), ("x.json", ARRAY), ("x.jsonl", ARRAY), ("x.csv", CELLS),
     ("x.csv", CELLS.replace(",", ";")), ("x.tsv", CELLS.replace(",", "\t"))],
)  # fmt: skip
def test_marks_line_ends_and_empty_lines_change_nothing(
    tmp_path: Path, name: str, text: str, line_end: str, before: str
):
    if name[-3:] in ("csv", "tsv"):
        before = before.strip("\n ")  # a table starts with its header
    content = (before + text).replace("\n", line_end).encode()
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    assert values(tmp_path / name) == values(tmp_path / f"{name}.gz") == TWO


def test_files_with_a_mark_that_were_joined_are_read(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text("\ufeff" + LINES + "\ufeff" + LINES)
    assert values(tmp_path / "x.jsonl") == [*TWO, *TWO]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(("name", "text"), [("x.jsonl", LINES), ("x.json", ARRAY), ("x.csv", CELLS)])
def test_another_encoding_is_refused_by_name(tmp_path: Path, name: str, text: str, encoding: str):
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=rf"{name}: is UTF-16 or UTF-32 text: want UTF-8, e\.g\. `iconv"):
        values(tmp_path / name)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_of_python_are_numbers(tmp_path: Path, constant: str):
    for name, text in (("x.jsonl", '{"prompt": "p", "x": %s}'), ("x.json", '[{"prompt": "p", "x": %s}]')):
        (tmp_path / name).write_text(text % constant)
        (row,) = values(tmp_path / name)
        assert str(row["x"]) == str(float(constant))
        assert read_rows(tmp_path / name, Problem) == [Problem("p")]


def test_rows_of_any_value_have_a_digest_that_does_not_depend_on_the_file(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('{"a": NaN, "b": 123456789012345678901234567890}')
    (tmp_path / "y.jsonl").write_text('{"b": 123456789012345678901234567890, "a": NaN}')
    (tmp_path / "z.jsonl").write_text('{"b": 123456789012345678901234567891, "a": NaN}')
    x, y, z = (digest_of_rows(tmp_path / f"{name}.jsonl") for name in "xyz")
    assert x == y != z
    pq.write_table(pa.table({"a": [math.nan]}), tmp_path / "x.parquet")
    (tmp_path / "w.jsonl").write_text('{"a": NaN}')
    assert digest_of_rows(tmp_path / "x.parquet") == digest_of_rows(tmp_path / "w.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("x.jsonl", LINES + '{"prompt": "4+', r"x\.jsonl:3: not a JSON object: .*: the last line is cut off, so"),
        ("x.jsonl", '{\n "prompt": "p"\n}\n', r"x\.jsonl:1: .*: want each object on one line, or one array of objects"),
        ("x.json", "[{]", r"x\.json: not a JSON array of objects"),
        ("x.json", "[NaN]", r"x\.json: row 1: not a JSON object"),
        ("x.jsonl", r'{"prompt": "\ud83d"}', r"x\.jsonl:1: not a JSON object"),
        ("x.csv", 'prompt\n"cut', r"x\.csv:2: can't be read: unexpected end of data"),
        ("x.csv", "prompt,reference\na,b\na\n", r"x\.csv:3: has 1 cells, the header has 2"),
        ("x.csv", "a,a\n", r"x\.csv:1: two columns have one name: a, a"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path: Path, name: str, text: str, complaint: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=complaint):
        values(tmp_path / name)


def test_cells_stay_texts_and_empty_ones_are_absent(tmp_path: Path):
    (tmp_path / "x.csv").write_text(f'prompt,reference,note\n007,"a ""b"",\nc",\n\n{"y" * 200_000},1,n\n')
    assert values(tmp_path / "x.csv") == [
        {"prompt": "007", "reference": 'a "b",\nc'},
        {"prompt": "y" * 200_000, "reference": "1", "note": "n"},
    ]
    assert [record.place.rpartition("/")[2] for record in rows_of(tmp_path / "x.csv")] == ["x.csv:2", "x.csv:5"]


NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 2, [pa.py_buffer(b"\3"), pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
)


@pytest.mark.parametrize(
    ("cells", "value"),
    [
        (pa.array([None, 1_234_567], pa.timestamp("ns")), "1970-01-01 00:00:00.001234567"),  # finer than Python's
        (pa.array([None, 2**62], pa.timestamp("us")), "value out of range"),  # later than Python's
        (NOT_UTF8, "can't decode byte 0xff"),
    ],
    ids=["nanoseconds", "year", "not utf-8"],
)
def test_a_cell_that_python_has_no_value_for_refuses_only_who_reads_it(tmp_path: Path, cells: pa.Array, value: str):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "extra": cells}), path)
    assert read_rows(path, Problem) == [Problem("a"), Problem("b")]
    assert value in str(values(path)[1]["extra"])
    digest_of_rows(path)
    if cells is NOT_UTF8:
        with pytest.raises(DataError, match=r"x\.parquet: row 2: column 'extra' can't be read: 'utf-8'"):
            read_rows(path, Problem, {"reference": "extra"})
