"""W&B: the folder of an offline run has the curves and the texts, and no key is ever asked for on a terminal."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from asyncflow.observe.trackers.tables import COLUMNS, rows_of
from asyncflow.observe.trackers.wandb import Wandb
from tests.asyncflow.observe.trackers import tracked

BLOCK, FILE_HEADER, RECORD_HEADER, FULL, LAST = 32768, 7, 7, 1, 4


def records(path: Path) -> Iterator[Any]:
    """The records of a W&B file: a LevelDB log of protobuf messages."""
    data, at, message = path.read_bytes(), FILE_HEADER, b""
    while at + RECORD_HEADER <= len(data):
        if BLOCK - at % BLOCK < RECORD_HEADER:  # the rest of a block that no header fits into
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + RECORD_HEADER : at + RECORD_HEADER + length]
        at += RECORD_HEADER + length
        if kind in (FULL, LAST):
            record = vars(wandb_internal_pb2)["Record"]()
            record.ParseFromString(message)
            yield record
            message = b""


def history(offline: Path) -> list[dict[str, Any]]:
    rows = [record.history.item for record in records(next(offline.glob("*.wandb"))) if record.HasField("history")]
    return [{"/".join([i.key] if i.key else i.nested_key): json.loads(i.value_json) for i in items} for items in rows]


def test_an_offline_folder_has_curves_texts_and_the_recipe(tmp_path: Path):
    assert tracked.show(Wandb(mode="offline"), tracked.run(tmp_path / "run"), range(1, 4)) is None
    [offline] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert offline.name.endswith("-0123456789abcdef"), "a resumed run has the same id: `wandb sync --append` joins them"
    wandb.teardown()  # its process writes the file's end when it ends
    rows = history(offline)
    assert [(row["step"], row["policy/loss"]) for row in rows if "policy/loss" in row] == [(1, -1), (2, -2), (3, -3)]
    assert [(r["step"], r[name]) for r in rows if (name := "evaluation/exact_match.pass@8") in r] == [(3, 0.5)]
    [path] = (offline / "files" / "media" / "table").glob("samples_*.table.json")
    table = json.loads(path.read_text())
    assert (table["columns"], table["data"]) == (COLUMNS, rows_of(3, tracked.SAMPLES))
    [config] = [record.run.config for record in records(next(offline.glob("*.wandb"))) if record.HasField("run")]
    values = {update.key: json.loads(update.value_json) for update in config.update}
    assert values["models"] == tracked.RECIPE["models"]


def test_without_a_key_nobody_is_asked_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(RuntimeError, match="WANDB_API_KEY, or choose mode = 'offline'"):
        Wandb().start(tracked.run(tmp_path / "run"))


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="mode = 'offlin': want 'online' or 'offline'"):
        Wandb(mode="offlin")
