"""Every supported file format yields the same rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from asyncflow.recipe.checks import check
from asyncflow.recipe.config import Recipe
from asyncflow.run import run_folder
from tests.asyncflow.conftest import data, make_recipe, models, table  # noqa: F401 - fixtures
from workers.data.dataset_files import DataError, digest_of_rows, places_of, records

Rows = list[dict[str, Any]]
ROWS: Rows = [
    {"prompt": "1+1=", "reference": "2"},
    {"prompt": "2+2="},
    {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "4", "name": "a"}]},
    {"prompt": "ü", "score": 0.5, "tags": []},
]


def lines(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def parquet(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: None for row in rows for name in row}
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), path, row_group_size=3)
    return path


def saved(folder: Path, rows: Rows, shard: int = 3) -> Path:
    """A folder as `datasets.save_to_disk` writes it: Arrow streams, whose order the state file gives."""
    folder.mkdir(parents=True)
    whole = pa.Table.from_pylist([{name: row.get(name) for r in rows for name in r} for row in rows])
    names = []
    for start in range(0, len(rows), shard):
        names.append(f"data-{9 - start}.arrow")  # sorted by name the order would be reversed
        with pa.OSFile(str(folder / names[-1]), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as writer:
            writer.write_table(whole.slice(start, shard))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def zipped(path: Path, rows: Rows) -> Path:
    path.write_bytes(gzip.compress(lines(path.with_name("plain"), rows).read_bytes()))
    return path


def array(path: Path, rows: Rows) -> Path:
    path.write_text(json.dumps(rows, indent=1))
    return path


def zstandard(path: Path, rows: Rows) -> Path:
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write(lines(path.with_name("plain"), rows).read_bytes())
    return path


def held(path: Path, rows: Rows) -> Path:
    """As SQuAD and many exports have it."""
    path.write_text(json.dumps({"version": "1.1", "data": rows}, indent=2))
    return path


def held_on_one_line(path: Path, rows: Rows) -> Path:
    path.write_text(json.dumps({"rows": rows}))
    return path


def folder_of_files(folder: Path, rows: Rows) -> Path:
    parquet(folder / "data" / "train-00000-of-00002.parquet", rows[:3])
    lines(folder / "data" / "train-00001-of-00002.jsonl", rows[3:])
    (folder / "README.md").write_text("a card")
    (folder / "dataset_infos.json").write_text("{}")
    lines(folder / ".cache" / "x.jsonl", [{"no": "row"}])
    return folder


def ipc_file(path: Path, rows: Rows) -> Path:
    whole = pa.Table.from_pylist([{name: row.get(name) for r in rows for name in r} for row in rows])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, whole.schema) as writer:
        writer.write_table(whole)
    return path


CONTAINERS: dict[str, Callable[[Path, Rows], Path]] = {
    "x.jsonl": lines,
    "x.jsonl.gz": zipped,
    "x.jsonl.zst": zstandard,
    "x.json": array,
    "held.json": held,
    "line.json": held_on_one_line,
    "x.parquet": parquet,
    "x.arrow": ipc_file,
    "saved": saved,
    "files": folder_of_files,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_rows_in_the_same_order(tmp_path: Path, name: str):
    path = CONTAINERS[name](tmp_path / name, ROWS)
    assert [record.values for record in records(path)] == ROWS
    assert digest_of_rows(path) == digest_of_rows(lines(tmp_path / "reference" / "x.jsonl", ROWS))


@pytest.mark.parametrize("changed", [ROWS[::-1], ROWS[:3], [{**ROWS[0], "reference": "3"}, *ROWS[1:]]])
def test_other_rows_or_another_order_have_another_digest(tmp_path: Path, changed: Rows):
    assert digest_of_rows(lines(tmp_path / "a.jsonl", changed)) != digest_of_rows(lines(tmp_path / "b.jsonl", ROWS))


@pytest.mark.parametrize("name", ["x.parquet", "saved"])
def test_a_run_has_the_same_samples_and_resumes_from_the_other_container(
    tmp_path: Path,
    data: Path,  # noqa: F811
    make_recipe: Callable[..., Recipe],  # noqa: F811
    name: str,
):
    rows = [record.values for record in records(data / "train.jsonl")]
    other = make_recipe(data={"train": str(CONTAINERS[name](tmp_path / name, rows))})
    assert run_folder.digest_of(other) == run_folder.digest_of(make_recipe())
    one, two = check(make_recipe()).train, check(other).train
    prompts = [one.at(cursor) for cursor in range(40)]
    assert [two.at(cursor) for cursor in range(40)] == prompts
    assert two.requests(prompts[:8], 2, min_version=0).prompts == one.requests(prompts[:8], 2, min_version=0).prompts


def test_a_split_is_named_behind_its_folder(tmp_path: Path):
    for split, rows in (("train", ROWS[:3]), ("test", ROWS[3:])):
        saved(tmp_path / "saved" / split, rows)
        parquet(tmp_path / "files" / "data" / f"{split}-00000-of-00001.parquet", rows)
        lines(tmp_path / "lines" / f"{split}.jsonl", rows)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for folder in ("saved", "files", "lines"):
        assert [r.values for r in records(tmp_path / folder / "test")] == ROWS[3:]
        with pytest.raises(DataError, match=rf"{folder}: has several splits, name one of them: .*test, .*train"):
            list(records(tmp_path / folder))


def test_a_place_is_a_line_or_a_row_of_its_file(tmp_path: Path):
    assert [r.place for r in records(lines(tmp_path / "x.jsonl", ROWS))][2] == f"{tmp_path}/x.jsonl:3"
    assert [r.place for r in records(parquet(tmp_path / "x.parquet", ROWS))][3] == f"{tmp_path}/x.parquet: row 4"


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.jsonl.gz", "x.jsonl.zst", "x.json"])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"[neither")
    with pytest.raises(DataError, match=name):
        list(records(tmp_path / name))


def test_a_file_cut_short_is_refused_where_it_ends(tmp_path: Path):
    rows: Rows = [{"prompt": f"{number}" * 50} for number in range(5_000)]
    whole = zipped(tmp_path / "x.jsonl.gz", rows).read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    reading = records(tmp_path / "x.jsonl.gz")
    assert next(reading).values == rows[0]
    with pytest.raises(DataError, match=r"x\.jsonl\.gz: can't be read: Compressed file ended"):
        list(reading)


def test_only_a_splits_name_is_looked_for_below_its_folder(tmp_path: Path):
    lines(tmp_path / "deep" / "train.jsonl", ROWS)
    assert len(list(records(tmp_path / "train"))) == len(ROWS)
    for name in ("trian", "test", "x.jsonl"):
        with pytest.raises(DataError, match=rf"{name}: can't be read: No such file"):
            list(records(tmp_path / name))


def test_configurations_of_a_data_set_are_never_mixed(tmp_path: Path):
    """A clone of a Hub data set may hold several, each with a split of the same name."""
    for configuration in ("main", "socratic"):
        parquet(tmp_path / configuration / "train-00000-of-00001.parquet", ROWS)
    for path in (tmp_path, tmp_path / "train"):
        with pytest.raises(DataError, match=r"several folders, name one of them: .*/main/train, .*/socratic/train"):
            list(records(path))
    assert [record.values for record in records(tmp_path / "socratic" / "train")] == ROWS


SAVED = Path(__file__).parent / "saved_by_datasets"  # DatasetDict.save_to_disk of datasets 5.2.0, in three shards


def test_folders_that_the_datasets_library_saved_are_read_split_by_split():
    train, test = ([record.values for record in records(SAVED / split)] for split in ("train", "test"))
    assert [row["prompt"] for row in train] == ["5+1=", "0+1=", "1+1=", "2+1="]
    messages = [{"role": "user", "content": "3"}]
    assert test[0] == {"prompt": "3+1=", "reference": "4", "messages": messages}
    assert test[1]["score"] == 2.0
    with pytest.raises(DataError, match=r"has several splits, name one of them: .*/test, .*/train$"):
        list(records(SAVED))


def test_splits_with_names_of_their_own_are_refused_by_names_that_can_be_read(tmp_path: Path):
    """As preference data sets have them: train_sft and train_prefs."""
    for name, rows in (("train_sft", ROWS), ("train_prefs", ROWS[:1])):
        saved(tmp_path / name, rows)
    for path in (tmp_path, tmp_path / "train"):
        with pytest.raises(DataError, match=r"in several folders, name one of them: ") as refused:
            list(records(path))
        names = str(refused.value).partition("them: ")[2].split(", ")
        assert [len(list(records(name))) for name in names] == [1, len(ROWS)]


def test_the_places_of_rows_are_found_by_their_number(tmp_path: Path):
    folder_of_files(tmp_path / "files", ROWS)
    places = [place.rpartition("/")[2] for place in places_of(tmp_path / "files", [0, 2, 3])]
    first, second = "train-00000-of-00002.parquet", "train-00001-of-00002.jsonl"
    assert places == [f"{first}: row 1", f"{first}: row 3", f"{second}:1"]


def test_a_folder_without_data_is_refused(tmp_path: Path):
    (tmp_path / "README.md").write_text("nothing here")
    with pytest.raises(DataError, match=r"a folder without data; it may hold \.jsonl"):
        list(records(tmp_path))
    for content in (b"{}", b'{"_data_files": [{"filename": "\xff"}]}'):
        (tmp_path / "state.json").write_bytes(content)
        with pytest.raises(DataError, match=r"state\.json: can't be read"):
            list(records(tmp_path))
