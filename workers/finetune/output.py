"""The folder that a training writes: a transformers folder, with what the training said on its way.

    metrics.jsonl     one line per step: loss, gradient norm, learning rate; held-out values where they were computed
    samples.jsonl     SFT: the answers to a few prompts before and after, each beside the demonstrated one
    training.log      the same in words, with the time
    training.json     the results

It has another name until it is complete (`.NAME.partial`), so a folder that exists is whole. A training that dies
leaves the other one behind, with its metrics and its log; the next start replaces it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from workers.data.hf_folder import add_end_token
from workers.training.trainable import TrainableModel

RESULTS = "training.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
LOG = "training.log"


class Output:
    """The output of one training, from the check of its folder to the end."""

    def __init__(self, folder: str | Path) -> None:
        """Raises FileExistsError if the folder exists: a finished model is never overwritten."""
        self.folder = Path(folder)
        if self.folder.exists():
            raise FileExistsError(f"{folder} exists already: remove it, or name another output")
        self.partial = self.folder.with_name(f".{self.folder.name}.partial")

    def begin(self) -> None:
        """Create the partial folder, in the place of one that an earlier training left."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write what was measured after `step` optimizer steps."""
        self._append(METRICS, {"step": step, **values})
        self.log(f"step {step}: " + ", ".join(f"{name} {value:.6g}" for name, value in values.items()))

    def sample(self, row: Mapping[str, str]) -> None:
        """Write a prompt with its answers."""
        self._append(SAMPLES, row)

    def log(self, text: str) -> None:
        """Write a line into the log."""
        with (self.partial / LOG).open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def finish(self, trained: TrainableModel, results: Mapping[str, float], end_token: int | None = None) -> None:
        """Write the model and the results, then give the folder its name.

        The tokenizer's files are copies of the ones that it started from. `end_token` is one that the model has learned
        to end a response with: its generation_config.json names it from now on.
        """
        trained.export(str(self.partial))
        if end_token is not None:
            add_end_token(self.partial, end_token)
        (self.partial / RESULTS).write_text(json.dumps(results, indent=2))
        self.partial.rename(self.folder)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with (self.partial / name).open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")
