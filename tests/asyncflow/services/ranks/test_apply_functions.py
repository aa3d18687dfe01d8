"""A batch function's state: passed to the next call, saved, restored, and unchanged by a call that fails."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from asyncflow.dataflow.graph import Filter, Stage
from asyncflow.services.ranks.apply_functions import ApplyFunctions
from protocols.control.code import CodeSource
from protocols.data.messages import Experience, Metrics, Scores
from protocols.stage import Stateful
from tests.asyncflow.services import rows


class Seen(msgspec.Struct, frozen=True):
    """A state: the number of rows so far."""

    count: int


class Other(msgspec.Struct, frozen=True):
    """The state of another function."""

    name: str


def add_up(batch: Any, *, state: Seen | None = None, step: int = 1) -> Stateful[Any, Any]:
    """Counts rows; fails for a batch of one row."""
    if len(batch) == 1:
        raise ValueError("one row")
    before = state.count if state is not None else 0
    return Stateful(batch, Metrics(), Seen(before + step * len(batch)))


def forgets(batch: Any, *, state: Seen | None = None) -> Any:
    return batch


def worker(
    function: Any = add_up,
    kind: type[msgspec.Struct] | None = Seen,
    filter: Filter | None = None,
    kwargs: dict[str, int] | None = None,
) -> Any:
    return ApplyFunctions(stage_of(function, kind, filter), kwargs=kwargs)


def stage_of(function: Any, kind: type[msgspec.Struct] | None, filter: Filter | None = None) -> Stage:
    return Stage(
        name=f"{function.__name__}#1",
        service="advantage",
        method=function.__name__,
        consumes=(Scores,),
        produces=Experience,
        inputs=("reward.score#1",),
        grain="batch",
        protocol="RANK_ZERO",
        function=function,
        filter=filter,
        state=kind,
    )


TWO = rows.scores([1, 2])


def test_what_a_batch_returned_the_next_one_gets():
    carrying = worker(kwargs={"step": 10})
    assert carrying.add_up(TWO).state == Seen(20)
    assert carrying.add_up(TWO).state == Seen(40)


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_restored_state_goes_on_where_it_was_saved(tmp_path: Path, batches: int):
    whole, restored = worker(), worker()
    for _ in range(batches):
        whole.add_up(TWO)
    whole.save(str(tmp_path))
    restored.add_up(TWO)  # of an abandoned lineage
    restored.load(str(tmp_path))
    assert restored.add_up(TWO).state == whole.add_up(TWO).state == Seen(2 * batches + 2)


@pytest.mark.parametrize("committed", [1, 2])
def test_a_checkpoint_leaves_out_the_batch_of_a_step_that_is_given_up(tmp_path: Path, committed: int):
    carrying, restored = worker(), worker()
    carrying.add_up(TWO)
    carrying.add_up(TWO)
    carrying.keep_committed(committed)
    carrying.save(str(tmp_path))
    restored.load(str(tmp_path))
    assert restored.add_up(TWO).state == Seen(2 * committed + 2)


def test_a_call_that_fails_leaves_the_state():
    carrying = worker()
    carrying.add_up(TWO)
    with pytest.raises(ValueError, match="one row"):
        carrying.add_up(rows.scores([1]))
    assert carrying.add_up(TWO).state == Seen(4)


def test_a_function_that_returns_no_state_is_named():
    with pytest.raises(TypeError, match=r"forgets#1: returned Scores.*want Stateful with a Seen"):
        worker(forgets).forgets(TWO)


def test_the_state_of_another_function_is_refused(tmp_path: Path):
    (tmp_path / "state.json").write_bytes(msgspec.json.encode(Other("x")))
    with pytest.raises(msgspec.ValidationError, match="count"):
        worker().load(str(tmp_path))


def test_without_a_state_the_functions_are_called_as_they_are():
    plain = worker(forgets, None, Filter(len, (0,)))
    assert plain.forgets(TWO) is TWO
    assert plain.len(TWO) == 2


ANEW = """
import msgspec
from protocols.data.messages import Metrics
from protocols.stage import Stateful

class Seen(msgspec.Struct, frozen=True):
    {field}: int

def add_up(batch, *, state: Seen | None = None, step: int = 1):
    return Stateful(batch, Metrics(), Seen((state.{field} if state else 0) + 100))
"""


def remade(module: ModuleType) -> Stage:
    return stage_of(module.add_up, module.Seen)


def source(field: str = "count") -> CodeSource:
    return CodeSource("users", "users.py", ANEW.format(field=field))


def test_a_new_function_goes_on_with_the_state_from_the_switch_on():
    carrying: Any = ApplyFunctions(stage_of(add_up, Seen), "users", remade)
    carrying.add_up(TWO)
    carrying.prepare_code([source()])
    assert carrying.add_up(TWO).state == Seen(4)
    carrying.switch_code(take=False)
    assert carrying.add_up(TWO).state == Seen(6)
    carrying.prepare_code([source()])
    carrying.switch_code(take=True)
    assert carrying.add_up(TWO).state.count == 106


def test_a_new_function_that_cant_read_the_state_is_refused():
    carrying: Any = ApplyFunctions(stage_of(add_up, Seen), "users", remade)
    carrying.add_up(TWO)
    with pytest.raises(msgspec.ValidationError, match="number"):
        carrying.prepare_code([source(field="number")])
    carrying.switch_code(take=True)
    assert carrying.add_up(TWO).state == Seen(4)
