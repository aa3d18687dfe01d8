"""The run folder: one controller at a time, a term that only rises, and a resume from the newest valid checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from asyncflow.control.store import checkpoint
from asyncflow.control.store.ledger import Ledger
from asyncflow.observe.journal import read_lines
from asyncflow.recipe.config import BadInput, Recipe, recipe_text
from asyncflow.run import run_folder
from asyncflow.run.terms import LINEAGE_KEPT
from tests.asyncflow.conftest import MakeRecipe

ROOT = Path(__file__).parents[3]

HOLD = """
import sys
from pathlib import Path
from asyncflow.run import run_folder

with run_folder.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def begin(folder: Path, recipe: Recipe) -> run_folder.Start:
    with run_folder.locked(folder):
        return run_folder.begin_fresh(folder, recipe)


def write_checkpoint(folder: Path, step: int, trained: list[int], recipe: Recipe) -> Path:
    """Write a checkpoint whose ledger has one committed step for each sample in `trained`."""
    root = folder / "checkpoints"
    partial = checkpoint.begin(root, step)
    ledger = Ledger(folder / "ledger.db")
    for sample in trained:
        ledger.admit([sample], 0, 0, sample + 1)
        ledger.move([sample], "scored")
        ledger.move([sample], "batched")
        ledger.commit_step(ledger.version, 0, [sample])
    ledger.backup(partial / "ledger.db")
    ledger.close()
    return checkpoint.finish(partial, root, step, 0, step, run_folder.digest_of(recipe))[0]


# --- one controller


def test_a_second_process_is_refused_until_the_first_is_dead(folder: Path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match=f"run {folder}: another process is running it"), run_folder.locked(folder):
            pytest.fail("two controllers hold one run")
        holder.kill()
        holder.wait()
        with run_folder.locked(folder):
            pass


def test_the_lock_ends_with_its_block_also_where_it_raises(folder: Path):
    with pytest.raises(RuntimeError), run_folder.locked(folder):
        raise RuntimeError
    with run_folder.locked(folder):
        pass


def test_a_folder_that_can_not_be_is_bad_input(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(BadInput, match=r"file can't be written: File exists: choose another folder"),
        run_folder.locked(tmp_path / "file"),
    ):
        pytest.fail("a file is no run folder")


# --- a fresh start


def test_a_new_run_holds_its_resolved_recipe(folder: Path, recipe: Recipe):
    start = begin(folder, recipe)
    assert (start.term, start.restore, start.warnings) == (0, "", [])
    assert run_folder.recipe_of(folder) == recipe
    assert (folder / "logs").is_dir()


@pytest.mark.parametrize("file", ["recipe.toml", "ledger.db"])
def test_a_run_is_not_started_over_another(folder: Path, recipe: Recipe, file: str):
    folder.mkdir()
    (folder / file).write_text("of another run")
    with pytest.raises(BadInput, match="already holds a run: resume it, or choose another folder"):
        begin(folder, recipe)
    assert (folder / file).read_text() == "of another run"


def test_a_new_folder_is_not_there_yet(recipe: Recipe):
    first = run_folder.new_folder(recipe)
    first.mkdir(parents=True)
    second = run_folder.new_folder(recipe)
    assert second != first
    assert first.parent == second.parent == Path(recipe.folder)
    assert first.name.startswith("test-")


def test_no_run_folder_no_recipe(tmp_path: Path):
    with pytest.raises(BadInput, match=r"is no run folder: it has no recipe\.toml"):
        run_folder.recipe_of(tmp_path)


@pytest.mark.parametrize(("found", "age"), [(None, "an older"), ("3", "another")])
def test_a_run_folder_of_another_format_is_refused_by_name_before_its_recipe_is_read(
    folder: Path, recipe: Recipe, found: str | None, age: str
):
    begin(folder, recipe)
    (folder / "recipe.toml").write_text("a_key_of_another_time = 1")
    (folder / "format").unlink() if found is None else (folder / "format").write_text(found)
    message = (
        rf"run folder {folder} was written by {age} asyncflow \(format {found or 1}, this one reads 2\): finish the run"
    )
    with pytest.raises(BadInput, match=message):
        run_folder.recipe_of(folder)


def test_the_digest_tells_recipes_apart(make_recipe: MakeRecipe):
    assert run_folder.digest_of(make_recipe()) == run_folder.digest_of(make_recipe())
    assert run_folder.digest_of(make_recipe()) != run_folder.digest_of(make_recipe(seed=8))


# --- a resume


def test_a_resume_starts_from_the_newest_checkpoint_with_its_ledger(folder: Path, recipe: Recipe):
    begin(folder, recipe)
    write_checkpoint(folder, 1, trained=[0], recipe=recipe)
    newest = write_checkpoint(folder, 2, trained=[1], recipe=recipe)
    live = Ledger(folder / "ledger.db")
    live.admit([2], 2, 0, 3)  # after the checkpoint: trained again
    live.close()
    start = run_folder.begin_resumed(folder, recipe)
    assert (start.term, start.restore, start.warnings) == (1, str(newest), [])
    ledger = Ledger(folder / "ledger.db")
    assert (ledger.version, ledger.totals().created) == (2, 2)
    ledger.close()


def test_the_ledger_of_the_abandoned_lineage_is_kept_aside(folder: Path, recipe: Recipe):
    begin(folder, recipe)
    write_checkpoint(folder, 1, trained=[0], recipe=recipe)
    live = Ledger(folder / "ledger.db")
    live.admit([1], 1, 0, 2)
    live.close()
    (folder / "ledger.db-journal").touch()  # of a process that was killed as it made the file
    run_folder.begin_resumed(folder, recipe)
    assert [path.name for path in folder.glob("ledger.db*")] == ["ledger.db"]
    aside = Ledger(folder / "lineage" / "before_term_1.ledger.db")
    assert aside.totals().created == 2
    aside.close()


def test_a_run_that_is_started_again_and_again_keeps_its_last_ledgers(folder: Path, recipe: Recipe):
    begin(folder, recipe)
    write_checkpoint(folder, 1, trained=[0], recipe=recipe)
    terms = [run_folder.begin_resumed(folder, recipe).term for _ in range(LINEAGE_KEPT + 3)]
    kept = {f"before_term_{term}.ledger.db" for term in terms[3:]}
    assert {path.name for path in (folder / "lineage").iterdir()} == kept


def test_terms_rise_with_every_start_also_of_those_that_died_at_once(folder: Path, recipe: Recipe):
    begin(folder, recipe)
    write_checkpoint(folder, 1, trained=[0], recipe=recipe)
    assert [run_folder.begin_resumed(folder, recipe).term for _ in range(3)] == [1, 2, 3]


def test_a_rollback_takes_a_term_and_leaves_the_open_ledger_until_it_is_switched(folder: Path, recipe: Recipe):
    begin(folder, recipe)
    kept = write_checkpoint(folder, 1, trained=[0], recipe=recipe)
    live = Ledger(folder / "ledger.db")
    live.admit([1], 1, 0, 2)
    start = run_folder.begin_rollback(folder)
    assert (start.term, start.restore, live.totals().created) == (1, str(kept), 2)
    live.close()
    run_folder.switch_ledger(folder, start)
    ledger = Ledger(folder / "ledger.db")
    assert (ledger.version, ledger.totals().created) == (1, 1)
    ledger.close()
    assert (folder / "lineage" / "before_term_1.ledger.db").exists()


def test_a_rollback_before_the_first_checkpoint_goes_to_step_0(folder: Path, recipe: Recipe):
    begin(folder, recipe)
    Ledger(folder / "ledger.db").close()
    start = run_folder.begin_rollback(folder)
    assert (start.term, start.restore) == (1, "")
    run_folder.switch_ledger(folder, start)
    assert not (folder / "ledger.db").exists()


def test_a_rollback_whose_checkpoints_are_all_damaged_is_refused(folder: Path, recipe: Recipe):
    begin(folder, recipe)
    (write_checkpoint(folder, 1, trained=[0], recipe=recipe) / "manifest.json").write_text("{}")
    with pytest.raises(BadInput, match="--allow-fresh starts it from the beginning"):
        run_folder.begin_rollback(folder)


@pytest.mark.parametrize(("damage", "words"), [(Path.unlink, "is gone"), (lambda p: p.write_text(""), "is damaged")])
def test_a_term_that_its_file_has_forgotten_is_not_used_again(
    folder: Path, recipe: Recipe, damage: Callable[[Path], object], words: str
):
    begin(folder, recipe)
    write_checkpoint(folder, 1, trained=[0], recipe=recipe)
    assert [run_folder.begin_resumed(folder, recipe).term for _ in range(2)] == [1, 2]
    damage(folder / "term")
    start = run_folder.begin_resumed(folder, recipe)
    assert start.term == 3
    assert [words in warning for warning in start.warnings] == [True]
    shutil.rmtree(folder / "lineage")
    (folder / "term").unlink()
    assert run_folder.begin_resumed(folder, recipe).term == 1, "after that of the checkpoint"


def killed_at(number: int, folder: Path, function: Callable[[], object]) -> bool:
    """Call a function in a process that is killed before the function's nth change of the folder; whether it was."""
    changes = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal changes
        changing = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile")
        changing = changing or (event == "open" and isinstance(arguments[1], str) and arguments[1] not in ("r", "rb"))
        if changing and str(folder) in str(arguments[0]):
            changes += 1
            if changes == number:
                os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        sys.addaudithook(count)
        try:
            function()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def go_on(folder: Path, recipe: Recipe) -> run_folder.Start:
    """What `run --folder` does."""
    with run_folder.locked(folder):
        begin = run_folder.begin_resumed if run_folder.holds_run(folder) else run_folder.begin_fresh
        return begin(folder, recipe)


def test_a_start_that_was_killed_anywhere_can_be_made_again(tmp_path: Path, recipe: Recipe):
    number = 1
    while killed_at(number, folder := tmp_path / str(number), partial(go_on, folder, recipe)):
        assert go_on(folder, recipe).term <= 1
        assert run_folder.recipe_of(folder) == recipe
        number += 1
    assert number > 5, "recipe, term and their partial files are changes"


def test_a_resume_that_was_killed_anywhere_can_be_made_again(tmp_path: Path, folder: Path, recipe: Recipe):
    begin(folder, recipe)
    write_checkpoint(folder, 1, trained=[0], recipe=recipe)
    write_checkpoint(folder, 2, trained=[1], recipe=recipe)
    number = 1
    while killed_at(number, copy := tmp_path / str(number), partial(go_on, shutil.copytree(folder, copy), recipe)):
        assert go_on(copy, recipe).restore == str(copy / "checkpoints" / "step_000002")
        ledger = Ledger(copy / "ledger.db")
        assert ledger.version == 2
        ledger.close()
        number += 1
    assert number > 5, "the copy of the ledger, the one set aside, the term"


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(folder: Path, recipe: Recipe):
    begin(folder, recipe)
    sound = write_checkpoint(folder, 1, trained=[0], recipe=recipe)
    damaged = write_checkpoint(folder, 2, trained=[1], recipe=recipe)
    with (damaged / "ledger.db").open("ab") as file:
        file.write(b"x")
    start = run_folder.begin_resumed(folder, recipe)
    assert start.restore == str(sound)
    assert len(start.warnings) == 1
    assert "step_000002" in start.warnings[0]


def test_without_a_valid_checkpoint_a_run_starts_anew_only_when_told_to(folder: Path, recipe: Recipe):
    begin(folder, recipe)
    damaged = write_checkpoint(folder, 1, trained=[0], recipe=recipe)
    (damaged / "manifest.json").unlink()
    with pytest.raises(
        BadInput, match=r"no valid checkpoint: .*step_000001.*--allow-fresh starts it from the beginning"
    ):
        run_folder.begin_resumed(folder, recipe)
    assert (folder / "ledger.db").exists(), "a refusal changes nothing"
    start = run_folder.begin_resumed(folder, recipe, allow_fresh=True)
    assert (start.term, start.restore, len(start.warnings)) == (1, "", 1)
    assert not (folder / "ledger.db").exists()


def test_a_recipe_may_change_but_not_what_the_sample_ids_mean(folder: Path, make_recipe: MakeRecipe):
    begin(folder, make_recipe())
    write_checkpoint(folder, 1, trained=[0], recipe=make_recipe())
    assert run_folder.begin_resumed(folder, make_recipe(steps=50)).restore.endswith("step_000001")
    with pytest.raises(BadInput, match=r"step 1 does not allow samples_per_prompt: 2 -> 3: the sample ids in the"):
        run_folder.begin_resumed(folder, make_recipe(samples_per_prompt=3))


def test_an_edit_of_the_folders_own_recipe_is_no_way_around(folder: Path, make_recipe: MakeRecipe):
    begin(folder, make_recipe())
    write_checkpoint(folder, 1, trained=[0], recipe=make_recipe())
    (folder / "recipe.toml").write_text(recipe_text(make_recipe(seed=8)))
    with pytest.raises(BadInput, match=r"seed, .* are not those of the checkpoint of step 1"):
        run_folder.begin_resumed(folder, make_recipe(seed=8))


def test_changes_are_reported_recorded_and_become_the_folders_recipe(folder: Path, make_recipe: MakeRecipe):
    begin(folder, make_recipe())
    write_checkpoint(folder, 1, trained=[0], recipe=make_recipe())
    start = run_folder.begin_resumed(folder, make_recipe(steps=50))
    assert start.warnings == ["changed at step 1: steps: 5 -> 50"]
    assert run_folder.recipe_of(folder) == make_recipe(steps=50)
    (line,) = read_lines(folder / "changes.jsonl")
    assert line == {"term": 1, "step": 1, "key": "steps", "before": 5, "after": 50}


def test_a_refused_change_changes_nothing(folder: Path, make_recipe: MakeRecipe):
    begin(folder, make_recipe())
    write_checkpoint(folder, 1, trained=[0], recipe=make_recipe())
    before = sorted(folder.rglob("*"))
    with pytest.raises(BadInput, match=r"does not allow prompts_per_step: 4 -> 5: .*; seed: 7 -> 8: "):
        run_folder.begin_resumed(folder, make_recipe(seed=8, prompts_per_step=5))
    assert sorted(folder.rglob("*")) == before
    assert run_folder.recipe_of(folder) == make_recipe()


# --- a run that ended before its first checkpoint


def test_it_starts_from_step_0_with_any_recipe(folder: Path, make_recipe: MakeRecipe):
    begin(folder, make_recipe())
    start = run_folder.begin_resumed(folder, make_recipe(seed=8))
    assert (start.term, start.restore) == (1, "")
    assert start.warnings[0].startswith("starts from the beginning: ")
    assert run_folder.recipe_of(folder).seed == 8


def test_it_says_how_many_steps_are_trained_again(folder: Path, recipe: Recipe):
    begin(folder, recipe)
    write_checkpoint(folder, 3, trained=[0, 1, 2], recipe=recipe).rename(folder / "checkpoints" / ".step_3.partial")
    start = run_folder.begin_resumed(folder, recipe)
    assert start.restore == ""
    assert start.warnings[0].startswith("starts from the beginning, 3 steps are trained again: ")
    assert (folder / "lineage" / "before_term_1.ledger.db").exists()


def test_checkpoints_that_should_be_there_and_are_not_are_no_reason_to_start_again(
    folder: Path, make_recipe: MakeRecipe
):
    recipe = make_recipe(checkpoints={"every": 2})
    begin(folder, recipe)
    shutil.rmtree(write_checkpoint(folder, 3, trained=[0, 1, 2], recipe=recipe))
    with pytest.raises(BadInput, match=r"holds no valid checkpoint: it is empty; --allow-fresh starts it"):
        run_folder.begin_resumed(folder, recipe)


# --- finished


def test_a_run_is_finished_with_all_its_steps_and_its_policy(folder: Path, make_recipe: MakeRecipe):
    begin(folder, make_recipe(steps=1))
    write_checkpoint(folder, 1, trained=[0], recipe=make_recipe(steps=1))
    assert not run_folder.is_finished(folder, make_recipe(steps=1)), "the policy is not exported"
    (folder / "policy").mkdir()
    assert run_folder.is_finished(folder, make_recipe(steps=1))
    assert not run_folder.is_finished(folder, make_recipe(steps=2))
