"""Settings of what a run shows of itself: generated texts, and the trackers that follow it."""

from __future__ import annotations

import msgspec

from workers.settings import NonNegativeInt, PositiveInt, Settings

Option = bool | int | float | str


class SampleTable(Settings, frozen=True):
    """A table of generated texts with their rewards, in samples.jsonl, in the report and in the trackers."""

    every: NonNegativeInt = 10  # steps from one table to the next, the first of step 1; 0: none
    rows: PositiveInt = 8  # samples of that step, from the worst to the best at equal distances
    characters: PositiveInt = 4000  # most of a prompt, response or reference that are kept: its beginning and its end

    def due(self, step: int) -> bool:
        """Whether a table is made of this step; 1 is the first."""
        return bool(self.every) and (step == 1 or step % self.every == 0)


class Observe(Settings, frozen=True):
    """What a run shows of itself."""

    samples: SampleTable = SampleTable()
    # Programs that show the run: "tensorboard", "wandb", "mlflow", "trackio", or a class of your own, as
    # "package.module:Class" or "file.py:Class". None of them can stop or slow the run.
    trackers: list[str] = msgspec.field(default_factory=list)
    project: str = "asyncflow"  # groups runs in W&B, MLflow (an experiment) and trackio
    # tracker -> its options: tensorboard.folder; wandb.entity, mode ("online" or "offline") and group; mlflow.uri;
    # trackio.space_id and server_url; of your class the keyword arguments. Keys and passwords belong into the
    # environment.
    options: dict[str, dict[str, Option]] = msgspec.field(default_factory=dict)
