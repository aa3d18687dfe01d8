"""A data file is read as typed rows, or refused with one error that says where it is wrong."""

from __future__ import annotations

import math
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workers.data.datasets import ALL, DataError, Demonstration, Preference, Problem, read_rows


def write(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_rows_come_in_the_order_of_the_file(tmp_path: Path):
    path = write(tmp_path, '{"prompt": "1+1=", "response": "2"}', '{"prompt": "2+2=", "response": "4"}')
    assert read_rows(path, Demonstration) == [Demonstration("1+1=", "2"), Demonstration("2+2=", "4")]


def test_columns_rename_and_the_rest_of_a_row_is_ignored(tmp_path: Path):
    path = write(tmp_path, '{"question": "1+1=", "answer": "2", "source": {"page": 7}, "prompt": "not this"}')
    assert read_rows(path, Problem, {"prompt": "question", "reference": "answer"}) == [Problem("1+1=", "2")]


class Kept(msgspec.Struct):
    prompt: str
    columns: dict[str, Any] = {}


def test_a_row_keeps_the_columns_that_are_asked_for(tmp_path: Path):
    pq.write_table(
        pa.table({"prompt": ["p"], "day": [date(2026, 1, 2)], "level": [3], "rate": [math.nan], "gone": [None]}),
        tmp_path / "x.parquet",
    )
    whole = {"prompt": "p", "day": "2026-01-02", "level": 3}
    assert [row.columns for row in read_rows(tmp_path / "x.parquet", Kept, keep=[ALL])] == [whole]
    assert [row.columns for row in read_rows(tmp_path / "x.parquet", Kept, keep=["level", "gone"])] == [{"level": 3}]
    assert [row.columns for row in read_rows(tmp_path / "x.parquet", Kept)] == [{}]


def test_optional_fields_may_be_absent(tmp_path: Path):
    path = write(tmp_path, '{"prompt": "p", "chosen": "c", "rejected": "r"}')
    assert read_rows(path, Preference) == [Preference("p", "c", "r", False, False)]


def test_empty_lines_are_skipped_and_counted(tmp_path: Path):
    path = write(tmp_path, "", '{"prompt": "p"}', "  ", '{"prompt": 3}', "")
    with pytest.raises(DataError, match=r"rows\.jsonl:4: .*`str`.*`int`.*prompt"):
        read_rows(path, Problem)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "p", "answer": "r"}', r"rows\.jsonl:2: no field 'response'; the row has 'prompt', 'answer'"),
        ("{}", r"rows\.jsonl:2: no field 'prompt'; the row has none"),
        ('{"prompt": "p", "response": null}', r"rows\.jsonl:2: no field 'response'; the row has 'prompt'"),
        ('{"prompt": 7, "response": "r"}', r"rows\.jsonl:2: Expected `str`, got `int` - at `\$\.prompt`"),
        ('["prompt", "response"]', r"rows\.jsonl:2: not a JSON object"),
        ('{"prompt": "p", ', r"rows\.jsonl:2: not a JSON object"),
        ("[" * 100_000, r"rows\.jsonl:2: not a JSON object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, complaint: str):
    path = write(tmp_path, '{"prompt": "p", "response": "r"}', line)
    with pytest.raises(DataError, match=complaint):
        read_rows(path, Demonstration)


def test_a_renamed_column_is_missed_under_its_name_in_the_file(tmp_path: Path):
    with pytest.raises(DataError, match="no field 'question'"):
        read_rows(write(tmp_path, '{"prompt": "p"}'), Problem, {"prompt": "question"})


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not a JSON object"):
        read_rows(tmp_path / "rows.jsonl", Problem)


def test_a_file_that_is_absent_or_empty_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"absent\.jsonl: can't be read"):
        read_rows(tmp_path / "absent.jsonl", Problem)
    with pytest.raises(DataError, match="holds no row"):
        read_rows(write(tmp_path, "", ""), Problem)


def test_a_column_for_an_unknown_field_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="'respons' is no field of Demonstration; it has prompt, response"):
        read_rows(write(tmp_path, "{}"), Demonstration, {"respons": "answer"})


def test_reading_needs_no_torch():
    program = "import sys, workers.data.datasets, workers.finetune.settings; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60, check=False).returncode == 0
