"""What Ray says about an actor's end becomes one line that names the service and the cause."""

from __future__ import annotations

import pytest
from ray.exceptions import RayActorError

from asyncflow.services.channels.endpoint import ServiceGone
from asyncflow.services.runtime.ray_peers import answered

DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: ServiceActor
\tactor_id: c5c22964ed9e80703fee76e401000000
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: \
Worker unexpectedly exits with a connection error code 2. End of file. {list} (1) the process was killed by ..."""


@pytest.mark.parametrize("begins", ["Some common causes include:", "There are some potential root causes."])
async def test_the_cause_of_a_death_is_one_line_without_ids_and_guesses(begins: str):
    async def call() -> None:
        raise RayActorError(error_msg=DIED.format(list=begins))

    with pytest.raises(ServiceGone) as gone:
        await answered("reward", "notices", call())
    assert str(gone.value) == (
        "reward: notices: its process is gone (its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit "
        "detail: Worker unexpectedly exits with a connection error code 2. End of file.)"
    )
