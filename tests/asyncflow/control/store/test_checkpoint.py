"""A checkpoint is valid only if every byte is intact; the newest valid one is used, and damaged ones are reported."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from asyncflow.control.store import checkpoint
from asyncflow.control.store.checkpoint import CheckpointError


def write(root: Path, step: int, content: str = "weights", term: int = 0) -> Path:
    """Write a checkpoint of three files in two folders."""
    partial = checkpoint.begin(root, step)
    for role in ("policy", "critic"):
        (partial / role).mkdir()
        (partial / role / "model.safetensors").write_text(f"{role} {content} {step}")
    (partial / "ledger.db").write_bytes(bytes(range(64)))
    folder, _ = checkpoint.finish(partial, root, step, term=term, cursor=10 * step, recipe_digest="abc")
    return folder


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_what_was_written_is_read(tmp_path: Path):
    folder = write(tmp_path, 20, term=3)
    manifest = checkpoint.read(folder)
    assert folder == checkpoint.folder_of(tmp_path, 20)
    assert (manifest.step, manifest.term, manifest.cursor, manifest.recipe_digest) == (20, 3, 200, "abc")
    assert sorted(manifest.files) == ["critic/model.safetensors", "ledger.db", "policy/model.safetensors"]
    assert names(tmp_path) == ["step_000020"], "nothing partial is left"


def test_the_size_is_that_of_the_files(tmp_path: Path):
    partial = checkpoint.begin(tmp_path, 1)
    (partial / "a").write_bytes(bytes(10))
    (partial / "b").write_bytes(bytes(5))
    assert checkpoint.finish(partial, tmp_path, 1, 0, 0, "")[1] == 15


def test_the_newest_is_found_without_a_pointer(tmp_path: Path):
    for step in (5, 10, 100):
        write(tmp_path, step)
    path, manifest, damaged = checkpoint.newest(tmp_path)
    assert (path.name, manifest.step, damaged) == ("step_000100", 100, [])


def test_a_checkpoint_of_an_older_format_is_refused_and_says_so(tmp_path: Path):
    folder = write(tmp_path, 5)
    older = checkpoint._sealed(replace(checkpoint.read(folder), format=1))
    (folder / checkpoint.MANIFEST).write_bytes(msgspec.json.encode(older))
    with pytest.raises(CheckpointError, match="step_000005: was written in format 1, this asyncflow reads 2"):
        checkpoint.newest(tmp_path)


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def flip_first(path: Path) -> None:
    flip(path, 0)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def put_garbage(path: Path) -> None:
    path.write_bytes(b"\xff\x00 no such thing")


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip_first, truncate, append, put_garbage, remove])
@pytest.mark.parametrize("name", ["ledger.db", "policy/model.safetensors", checkpoint.MANIFEST])
def test_any_damage_is_reported_and_the_checkpoint_before_is_used(tmp_path: Path, damage: object, name: str):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    assert callable(damage)
    damage(newest / name)
    path, manifest, damaged = checkpoint.newest(tmp_path)
    assert (path.name, manifest.step) == ("step_000001", 1)
    assert len(damaged) == 1
    assert "step_000002" in damaged[0]
    assert name in damaged[0], damaged


def test_every_flipped_bit_of_a_manifest_is_detected(tmp_path: Path):
    """For example in the cursor: the files are intact, but the data would continue at another place."""
    folder = write(tmp_path, 7)
    manifest = folder / checkpoint.MANIFEST
    sound = manifest.read_bytes()
    for position in range(len(sound)):
        flip(manifest, position, bit=position % 7 if position % 2 else 7)  # the highest makes bytes that are no UTF-8
        with pytest.raises(CheckpointError):
            checkpoint.read(folder)
        manifest.write_bytes(sound)
    assert checkpoint.read(folder).step == 7


def test_a_file_that_a_loader_would_read_but_no_manifest_lists_is_damage(tmp_path: Path):
    folder = write(tmp_path, 1)
    (folder / "policy" / "0.safetensors").write_text("from elsewhere")
    with pytest.raises(CheckpointError, match=r"move them away: \['policy/0\.safetensors'\]"):
        checkpoint.read(folder)


FOREIGN = (".DS_Store", ".nfs0001", "._model.safetensors", "notes.txt", "model.safetensors~", "policy/.DS_Store")


def test_files_of_other_programs_neither_break_a_checkpoint_nor_are_removed(tmp_path: Path):
    for step in (2, 4):
        folder = write(tmp_path, step)
        for name in FOREIGN:
            (folder / name).write_text("mine")
    for name in ("lost+found", "step_000004.bak", "step_000009 copy", "step_12"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    (tmp_path / ".DS_Store").touch()
    assert checkpoint.newest(tmp_path)[0].name == "step_000004"
    before = {path for path in tmp_path.rglob("*") if "step_000002" not in str(path)}
    checkpoint.prune(tmp_path, keep=1)
    assert {path for path in tmp_path.rglob("*") if "step_000002" not in str(path)} == before
    left = [path for path in (tmp_path / "step_000002").rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(tmp_path / "step_000002")) for path in left) == sorted(FOREIGN)
    write(tmp_path, 4, term=1)
    path, manifest, damaged = checkpoint.newest(tmp_path)
    assert (path.name, manifest.term, damaged) == ("step_000004", 1, [])


def test_a_hidden_file_that_appears_while_a_checkpoint_is_written_is_no_part_of_it(tmp_path: Path):
    partial = checkpoint.begin(tmp_path, 1)
    (partial / "ledger.db").touch()
    (partial / ".DS_Store").write_text("a file manager's, which rewrites it when it likes")
    folder, _ = checkpoint.finish(partial, tmp_path, 1, 0, 0, "")
    (folder / ".DS_Store").write_text("rewritten")
    assert list(checkpoint.read(folder).files) == ["ledger.db"]


def test_the_folder_of_a_step_of_seven_digits_is_newer_than_those_of_six(tmp_path: Path):
    for step in (999_999, 1_000_000):
        write(tmp_path, step)
    assert checkpoint.newest(tmp_path)[1].step == 1_000_000
    checkpoint.prune(tmp_path, keep=1)
    assert names(tmp_path) == ["step_1000000"]


@pytest.fixture
def unprivileged(tmp_path: Path) -> Iterator[None]:
    """Another user than root, whom no permission stops."""
    if os.geteuid():
        yield
        return
    for folder in [tmp_path, *tmp_path.parents[:-2]]:  # pytest's own folders are root's alone
        folder.chmod(0o755)
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_a_checkpoint_that_may_not_be_read_is_reported_and_the_one_before_is_used(tmp_path: Path, request: Any):
    write(tmp_path, 1)
    (write(tmp_path, 2) / "ledger.db").chmod(0)
    (write(tmp_path, 3) / "policy").chmod(0)
    (write(tmp_path, 4) / checkpoint.MANIFEST).chmod(0)
    request.getfixturevalue("unprivileged")
    path, _, damaged = checkpoint.newest(tmp_path)
    assert path.name == "step_000001"
    assert [line.split(": ", maxsplit=1)[1] for line in damaged] == ["can't be read: Permission denied"] * 3
    assert "step_000004/manifest.json: " in damaged[0]
    assert "step_000003/policy: " in damaged[1]
    assert "step_000002/ledger.db: " in damaged[2]


def test_a_folder_of_checkpoints_that_may_not_be_read_is_not_empty(tmp_path: Path, request: Any):
    root = tmp_path / "checkpoints"
    write(root, 1)
    root.chmod(0)
    request.getfixturevalue("unprivileged")
    with pytest.raises(CheckpointError, match="checkpoints: can't be read: Permission denied"):
        checkpoint.newest(root)


def test_two_files_that_changed_places_are_damage(tmp_path: Path):
    folder = write(tmp_path, 1)
    policy, critic = folder / "policy" / "model.safetensors", folder / "critic" / "model.safetensors"
    policy.rename(folder / "x")
    critic.rename(policy)
    (folder / "x").rename(critic)
    with pytest.raises(CheckpointError, match="sha256"):
        checkpoint.read(folder)


def test_a_checkpoint_under_the_name_of_another_step_is_none(tmp_path: Path):
    write(tmp_path, 1).rename(tmp_path / "step_000009")
    with pytest.raises(CheckpointError, match="holds step 1, its name says another"):
        checkpoint.read(tmp_path / "step_000009")


def test_all_that_is_damaged_is_reported_where_nothing_is_valid(tmp_path: Path):
    for step in (1, 2):
        truncate(write(tmp_path, step) / "ledger.db")
    with pytest.raises(CheckpointError, match="no valid checkpoint") as refused:
        checkpoint.newest(tmp_path)
    assert "step_000001" in str(refused.value)
    assert "step_000002" in str(refused.value)


@pytest.mark.parametrize("folder", [".", "not there"])
def test_no_checkpoint_at_all_is_an_error_and_not_a_fresh_start(tmp_path: Path, folder: str):
    with pytest.raises(CheckpointError, match="holds no valid checkpoint: it is empty"):
        checkpoint.newest(tmp_path / folder)


def test_a_partial_checkpoint_does_not_count(tmp_path: Path):
    """After a kill while it was written, or just before its rename, when it is complete but not published."""
    write(tmp_path, 1)
    partial = checkpoint.begin(tmp_path, 2)
    shutil.copytree(checkpoint.folder_of(tmp_path, 1), partial, dirs_exist_ok=True)
    path, _, damaged = checkpoint.newest(tmp_path)
    assert (path.name, damaged) == ("step_000001", [])


def test_an_attempt_starts_without_what_an_earlier_one_left(tmp_path: Path):
    (checkpoint.begin(tmp_path, 2) / "half").write_text("written")
    assert list(checkpoint.begin(tmp_path, 2).iterdir()) == []
    checkpoint.begin(tmp_path, 3)
    assert names(tmp_path) == [".step_000003.partial"]


def test_prune_keeps_the_newest(tmp_path: Path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep=0)
    assert len(names(tmp_path)) == 3
    checkpoint.prune(tmp_path, keep=2)
    assert names(tmp_path) == ["step_000002", "step_000003"]


def test_a_step_that_is_written_again_replaces_the_old_one(tmp_path: Path):
    write(tmp_path, 4, content="old")
    folder = write(tmp_path, 4, content="new", term=1)
    assert checkpoint.read(folder).term == 1
    assert (folder / "policy" / "model.safetensors").read_text() == "policy new 4"
    assert names(tmp_path) == ["step_000004"]


def test_a_new_lineage_does_not_leave_the_later_steps_of_an_abandoned_one(tmp_path: Path):
    """A damaged step 30 made the run continue from 10. If 30 were kept, `prune` would keep it instead of 20."""
    write(tmp_path, 10)
    truncate(write(tmp_path, 30) / "ledger.db")
    write(tmp_path, 20, term=1)
    checkpoint.prune(tmp_path, keep=1)
    path, manifest, damaged = checkpoint.newest(tmp_path)
    assert (path.name, manifest.term, damaged) == ("step_000020", 1, [])
    assert names(tmp_path) == ["step_000020"]
