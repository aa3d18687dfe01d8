"""A .json file's rows are found where tools put them: in lines, an array, or arrays that an object holds by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workers.data.dataset_files import DataError, records
from workers.data.datasets import Problem, read_rows

ROWS: list[dict[str, Any]] = [{"prompt": "1+1=", "reference": "2"}, {"prompt": "2+2=", "reference": "4"}]
SPLITS = {"train": ROWS, "test": ROWS[:1]}


def written(path: Path, value: Any, indent: int | None = None) -> Path:
    path.write_text(json.dumps(value, indent=indent))
    return path


def values(path: Path) -> list[dict[str, Any]]:
    return [record.values for record in records(path)]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "held",
    [
        {"data": ROWS},
        {"version": "1.1", "rows": ROWS, "notes": ["a text"]},
        {"train": ROWS},
        {"questions": ROWS},
        {"data": [{**row, "score": float("nan")} for row in ROWS]},
    ],
)
def test_an_object_that_holds_one_array_of_rows_is_those_rows(tmp_path: Path, held: Any, indent: int | None):
    path = written(tmp_path / "x.json", held, indent)
    assert read_rows(path, Problem) == [Problem("1+1=", "2"), Problem("2+2=", "4")]
    assert [record.place for record in records(path)] == [f"{path}: row 1", f"{path}: row 2"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("held", [SPLITS, {"version": 1, **SPLITS}, {"easy": ROWS, "hard": ROWS[:1]}])
def test_of_several_arrays_one_is_named_behind_the_file(tmp_path: Path, held: dict[str, Any], indent: int | None):
    path = written(tmp_path / "x.json", held, indent)
    first, second = (name for name in held if name != "version")
    for whole in (path, path / "absent"):
        with pytest.raises(DataError, match=rf"x\.json.* holds rows under {first} and {second}: name one: "):
            values(whole)
    assert values(path / first) == ROWS
    assert [record.place for record in records(path / second)] == [f"{path}/{second}: row 1"]


@pytest.mark.parametrize("content", [{"data": []}, {"train": []}, {"questions": []}, []])
def test_an_empty_array_is_an_empty_data_set(tmp_path: Path, content: Any):
    path = written(tmp_path / "x.json", content)
    assert values(path) == []
    with pytest.raises(DataError, match=r"x\.json: holds no row$"):
        read_rows(path, Problem)


def test_an_empty_one_of_several_arrays_is_empty(tmp_path: Path):
    path = written(tmp_path / "x.json", {"train": ROWS, "test": []})
    with pytest.raises(DataError, match=r"x\.json/test: holds no row$"):
        read_rows(path / "test", Problem)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1+1=", "data": ["a text"]},
        {"prompt": "write a sum", "test": [{"input": "1 1", "output": "2"}]},
        {"messages": [{"role": "user", "content": "?"}]},
        {"conversations": [{"from": "human", "value": "?"}], "tools": [{"type": "function"}]},
        {"dialogue": [{"role": "user", "content": "?"}]},
        {"chosen": [{"role": "user", "content": "?"}], "rejected": [{"role": "user", "content": "?"}]},
        {"id": 3, "hints": [{"text": "x"}]},
    ],
)
def test_one_object_in_a_file_is_one_row_whatever_lists_it_has(tmp_path: Path, row: dict[str, Any], indent: int | None):
    assert values(written(tmp_path / "x.json", row, indent)) == [row]


@pytest.mark.parametrize("name", ["data", "train", "hints"])
def test_lines_of_objects_with_such_lists_stay_rows(tmp_path: Path, name: str):
    rows = [{name: [{"x": 1}]}, {name: []}]
    (tmp_path / "x.json").write_text("\n".join(map(json.dumps, rows)))
    assert values(tmp_path / "x.json") == rows


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (json.dumps(ROWS), r"x\.json/train: the file is one array of rows: name it alone"),
        ("\n".join(map(json.dumps, ROWS)), r"x\.json/train: the file holds no arrays of rows by name: name it alone"),
        (json.dumps(ROWS[0], indent=1), r"x\.json/train: the file holds no arrays of rows by name"),
    ],
)
def test_an_array_is_named_only_where_there_are_some(tmp_path: Path, text: str, complaint: str):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=complaint):
        values(tmp_path / "x.json" / "train")
