"""Every event and measurement of a run: to the log file, the journals, the exported metrics and the followers."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import msgspec

from asyncflow.control.events import EventLog
from asyncflow.control.store.storage import storing
from asyncflow.observe.curves import MEMORY, PART
from asyncflow.observe.event_file import EventFile
from asyncflow.observe.exporter import Exporter
from asyncflow.observe.journal import MetricsJournal, read_lines
from asyncflow.observe.memory import DEVICE, RESIDENT
from asyncflow.observe.sentences import one_line, sentence
from asyncflow.observe.timeline import Timeline
from asyncflow.services.ranks.role_specs import ROLE_SPECS
from protocols.control.events import (
    CheckpointWritten,
    Evaluated,
    Event,
    Published,
    RolledBack,
    RunEnded,
    RunStarted,
    SamplesEnded,
    SamplesShown,
    ServiceReplaced,
    ServiceSilent,
    Stalled,
    StepCommitted,
    Warned,
)
from protocols.control.notices import Span
from protocols.control.samples import SampleLine, ShownSample

_GAUGES = {  # exported name -> metric of the last step
    "clip_fraction": "policy.clip_fraction",
    "mismatch_kl_nats": "policy.mismatch_kl",
    "mismatch_mean_nats": "policy.mismatch_mean",
    "mismatch_max_nats": "policy.mismatch_max",
    "negative_log_likelihood_nats": "policy.negative_log_likelihood",
    "entropy_nats": "policy.entropy",
    "tokens_so_far": "tokens_total",
    "reward_std": "reward_std",
    "response_cut_ratio": "response_cut",
    "cost_mean": "cost_mean",
    "cost_multiplier": "multiplier",
    "kl_coefficient": "kl_coefficient",
}
_MEMORY = {f"_{RESIDENT}": "service_resident_bytes", f"_{DEVICE}": "service_device_bytes"}  # end of a metric -> name
_LENGTH = "response_length_"  # prefix of a statistic of the responses' lengths

SAMPLES_BYTES = 32 << 20  # of samples.jsonl; beyond, every second table is removed

ENDED = "ended.json"  # in the run folder: how its last process ended the run; a killed one leaves none
LOUD = Stalled | ServiceReplaced | RolledBack | ServiceSilent | Warned  # events that are logged as warnings


def read_end(folder: Path) -> RunEnded | None:
    """How the last process of the run in a folder ended it; None if it runs or was killed."""
    try:
        return msgspec.json.decode((folder / ENDED).read_bytes(), type=RunEnded)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


class RunLog:
    """What one run reports while it is open."""

    def __init__(self, folder: Path, exporter: Exporter, file: logging.Logger) -> None:
        """`file`: the log file, which outlives this object."""
        self.events = EventLog(EventFile(folder))
        self.exporter = exporter
        self.file = file
        self._folder, self._steps = folder, 0
        self._metrics = MetricsJournal(folder / "metrics.jsonl")
        self._evaluations = MetricsJournal(folder / "evaluations.jsonl")
        self._samples = MetricsJournal(folder / "samples.jsonl")
        self._evaluated: set[tuple[int, str]] = set()
        self.tokens = 0  # response tokens of the committed steps, over all starts of the run
        self._timeline = Timeline(folder / "timeline.jsonl")
        self._busy_seconds: defaultdict[str, float] = defaultdict(float)

    def rewind(self, step: int) -> None:
        """A term begins with `step` committed steps: the journals forget what is beyond it."""
        for journal in (self._metrics, self._evaluations, self._samples):
            journal.rewind(step)
        lines = read_lines(self._folder / "evaluations.jsonl")
        self._evaluated = {(line["step"], line["metric"]) for line in lines}
        self.tokens = sum(line["tokens_generated"] for line in read_lines(self._folder / "metrics.jsonl"))
        self.take_busy_seconds()

    def emit(self, event: Event) -> None:  # noqa: PLR0912 - one case per event
        """Journal, export and log one event, then show it to the followers. Raises StorageFailed."""
        export = self.exporter
        match event:
            case RunStarted():
                self._steps = event.steps
                for warning in event.warnings:
                    self.file.warning(one_line(warning))
            case StepCommitted():
                with storing("metrics", self._folder):
                    self._metrics.append(event)
                self.tokens += event.tokens_generated
                self._export_step(event)
            case Evaluated():
                self._evaluated.add((event.step, event.metric))
                with storing("evaluations", self._folder):
                    self._evaluations.append(event)
                export.set("evaluation", event.value, metric=event.metric)
            case Published():
                export.observe("weight_sync_seconds", event.seconds, phase="total")
                export.inc("weight_sync_bytes_total", event.nbytes * max(len(event.receipts), 1))
            case SamplesEnded():
                export.inc("samples_total", event.count, state=event.state, reason=_bounded(event.reason))
            case ServiceReplaced():
                export.inc("restarts_total", role=event.service)
            case RolledBack():
                for service in event.services:
                    export.inc("restarts_total", role=service)
                export.inc("rollbacks_total")
                export.inc("steps_lost_total", event.lost_steps)
            case CheckpointWritten():
                export.observe("checkpoint_seconds", event.seconds)
                export.set("checkpoint_bytes", event.nbytes)
                export.set("last_checkpoint_timestamp_seconds", time.time())
            case RunEnded():
                self._record_end(event)
            case _:
                pass
        if line := sentence(event, self._steps):
            (self.file.warning if isinstance(event, LOUD) else self.file.info)("%s", line)
        self.events.add(event)

    def add_samples(self, step: int, rows: list[ShownSample]) -> None:
        """Keep a few samples of a committed step as text. Raises StorageFailed."""
        with storing("samples", self._folder):
            self._samples.append(SampleLine(step=step, rows=rows))
            self._samples.thin_out(SAMPLES_BYTES)
        self.emit(SamplesShown(step=step, samples=len(rows)))

    def _record_end(self, ended: RunEnded) -> None:
        """For `read_end`. Where the disk refuses it, the run reads as killed: its end must not fail."""
        try:
            (self._folder / ENDED).write_bytes(msgspec.json.encode(ended))
        except OSError as error:
            self.file.warning("%s can't be written: %s", self._folder / ENDED, error.strerror)

    def was_evaluated(self, step: int, curve: str) -> bool:
        """Whether the journal holds this step's point of a curve, e.g. from before a restart."""
        return (step, curve) in self._evaluated

    def add_spans(self, spans: Iterable[Span]) -> None:
        """Record the time that services were busy. Raises StorageFailed."""
        spans = list(spans)
        with storing("timeline", self._folder):
            self._timeline.add(spans)
        for span in spans:
            self._busy_seconds[span.service] += span.end - span.start

    def take_busy_seconds(self) -> dict[str, float]:
        """Busy seconds of each service since the last call."""
        busy, self._busy_seconds = dict(self._busy_seconds), defaultdict(float)
        return busy

    def observe_staleness(self, ages: Iterable[int], samples: Iterable[int]) -> None:
        """Export the ages, in versions, of the prompts of a trained batch, each for its number of samples."""
        for age, count in zip(ages, samples, strict=True):
            for _ in range(count):
                self.exporter.observe("trained_staleness_versions", age)

    def write_timeline(self) -> None:
        """Write timeline.json."""
        self._timeline.write(self._folder / "timeline.json")

    def close(self) -> None:
        """Close the journals."""
        for journal in (self._metrics, self._evaluations, self._samples, self._timeline):
            journal.close()

    def _export_step(self, event: StepCommitted) -> None:
        export, metrics = self.exporter, event.metrics
        export.inc("steps_total")
        export.inc("samples_trained_total", event.samples)
        export.inc("tokens_trained_total", event.tokens_generated)
        export.inc("samples_total", event.samples, state="trained", reason="")
        export.observe("step_seconds", event.seconds)
        export.set("last_step_timestamp_seconds", time.time())
        export.set("reward_mean", event.reward_mean)
        export.set("kl_reference_nats", event.kl)
        export.set("weights_version", event.step, replica="committed")
        for gauge, key in _GAUGES.items():
            if key in metrics:
                export.set(gauge, metrics[key])
        for name, value in metrics.items():
            if name.startswith(_LENGTH):
                export.set("response_length_tokens", value, statistic=name.removeprefix(_LENGTH))
            for kind, gauge in _MEMORY.items():
                if name.startswith(MEMORY) and name.endswith(kind):
                    export.set(gauge, value, role=name.removeprefix(MEMORY).removesuffix(kind))
            if name.startswith(PART):
                export.set("reward_part_mean", value, part=name.removeprefix(PART))
        for role in (role for role, spec in ROLE_SPECS.items() if spec.trains):
            for name in ("loss", "gradient_norm", "learning_rate"):
                if f"{role}.{name}" in metrics:
                    export.set(name, metrics[f"{role}.{name}"], role=role)
        export.inc("straggler_wait_seconds_total", metrics.get("wait.batch_seconds", 0.0))


def _bounded(reason: str) -> str:
    """A label value: the kind of a cause, not its text."""
    return reason.split(":", maxsplit=1)[0].split(" ", maxsplit=1)[0][:32] or "unknown"
