"""The one table of metric names: what is not listed here can't be exported, drawn or alerted on.

Names are given without their prefix and follow Prometheus: base units (seconds, bytes, ratio), `_total` for
counters, histograms for durations. Every series also carries `role` and `rank`. Labels take few values, known
beforehand: never a sample id, never a prompt.
"""

from __future__ import annotations

import difflib
from typing import Literal

import msgspec

PREFIX = "asyncflow_"

Kind = Literal["counter", "gauge", "histogram"]

IDENTITY = ("role", "rank")  # on every series: which actor says so

QUICK = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)  # commits, loop lag
SLOW = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0)  # steps, syncs, checkpoints
VERSIONS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


class Metric(msgspec.Struct, frozen=True):
    """One row of the table."""

    name: str  # without the prefix
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()  # its own, besides IDENTITY; a metric that lists "role" speaks of other services
    buckets: tuple[float, ...] = ()  # upper bounds, histograms only
    group: str = ""

    @property
    def full_name(self) -> str:
        """The name a Prometheus server knows."""
        return PREFIX + self.name


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, "counter", help, labels)


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, "gauge", help, labels)


def _histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(name, "histogram", help, labels, buckets)


GROUPS: dict[str, tuple[Metric, ...]] = {
    "health": (
        _gauge("up", "1 while the actor answers."),
        _gauge("build_info", "1; the labels say which program runs.", "version", "python"),
        _gauge("start_time_seconds", "Unix time at which the actor started; uptime is time() minus this."),
        _gauge("last_step_timestamp_seconds", "Unix time of the last committed step."),
        _counter("restarts_total", "Services whose process died and was replaced.", "role"),
        _gauge("controller_term", "Lineage of the run: rises with every restart, resume and fork."),
        _histogram("event_loop_lag_seconds", "How late the event loop wakes what asked to be woken.", QUICK),
    ),
    "ledger": (
        _counter("samples_total", "Samples that reached a final state, and why.", "state", "reason"),
        _gauge("ledger_imbalance", "Samples created less trained, dropped, failed and live. Anything but 0 is a bug."),
    ),
    "flow": (
        _gauge("channel_depth", "Rows that wait in a channel.", "channel"),
        _gauge("channel_capacity", "Rows that a channel may hold.", "channel"),
        _histogram("channel_wait_seconds", "Time a side of a channel waited for the other.", SLOW, "channel", "side"),
        _counter("channel_bytes_total", "Bytes that a channel's consumer read: of its own rows' blocks.", "channel"),
        _counter("channel_inline_bytes_total", "Bytes of small frames that travelled inside a delivery.", "channel"),
        _counter("duplicates_rejected_total", "Rows refused because they were here before, or came late.", "channel"),
        _counter("rows_quarantined_total", "Rows whose frame was refused; they leave as failed.", "channel"),
    ),
    "staleness": (
        _histogram(
            "trained_staleness_versions", "Versions between a trained sample's oldest token and its step.", VERSIONS
        ),
        _gauge("staleness_bound_versions", "Largest staleness that the recipe admits."),
        _gauge("weights_version", "Step of the weights that a replica holds.", "replica"),
        _counter("straggler_wait_seconds_total", "Time from a commit until the next batch was formed."),
    ),
    "bubbles": (_counter("busy_seconds_total", "Time spent working; idle is 1 minus its rate.", "role", "activity"),),
    "weight sync": (
        _histogram("weight_sync_seconds", "Time of one phase of a publication.", SLOW, "phase"),
        _counter("weight_sync_bytes_total", "Bytes of published weights."),
        _histogram("transition_seconds", "Time of a switch from the training layout to that of generation.", SLOW),
        _counter("transition_bytes_total", "Bytes of weights that rank 0 received in switches of layout."),
        _gauge("transition_peak_bytes", "Most bytes of weights that rank 0 held in the last switch of layout."),
        _gauge("transition_copied_bytes", "Bytes of weights that vLLM has a second time, of those rank 0 handed over."),
    ),
    "throughput": (
        _counter("steps_total", "Committed steps."),
        _histogram("step_seconds", "Time between two commits.", SLOW),
        _counter("tokens_generated_total", "Response tokens that left the engine."),
        _counter("tokens_trained_total", "Response tokens of committed steps."),
        _counter("samples_trained_total", "Samples of committed steps."),
    ),
    "learning": (
        _gauge("reward_mean", "Mean reward of the last step's samples."),
        _gauge("reward_part_mean", "Mean of one part of a mixed reward, before its weight.", "part"),
        _gauge("cost_mean", "Mean cost of the last step's samples; above the limit is unsafe."),
        _gauge("cost_multiplier", "What a unit of cost weighs against one of reward: Safe-RLHF's lambda."),
        _gauge("kl_coefficient", "What a nat of KL costs in reward, where it is adaptive."),
        _gauge("evaluation", "Last evaluation on held-out prompts.", "metric"),
        _gauge("kl_reference_nats", "Mean per token of the behaviour policy's KL to the reference."),
        _gauge(
            "mismatch_kl_nats",
            "Mean per token KL of the policy that drew to the one that trains; at staleness 0 the engine's error.",
        ),
        _gauge("clip_fraction", "Share of tokens whose ratio was clipped."),
        _gauge("gradient_norm", "Global norm before clipping.", "role"),
        _gauge("loss", "Loss of the last step.", "role"),
    ),
    "durability": (
        _histogram("checkpoint_seconds", "Time to write a checkpoint.", SLOW),
        _gauge(
            "last_checkpoint_timestamp_seconds", "Unix time of the last valid checkpoint; its age is time() minus this."
        ),
        _gauge("checkpoint_bytes", "Size of the last checkpoint."),
        _histogram("ledger_commit_seconds", "Time of one durable ledger transaction.", QUICK),
    ),
    "resources": (_gauge("resident_memory_bytes", "Memory of the actor's process."),),
}

METRICS: dict[str, Metric] = {
    metric.name: msgspec.structs.replace(metric, group=group) for group, metrics in GROUPS.items() for metric in metrics
}


def metric(name: str) -> Metric:
    """The row of the table with that name. Raises KeyError with the nearest name."""
    try:
        return METRICS[name]
    except KeyError:
        near = difflib.get_close_matches(name.removeprefix(PREFIX), METRICS, n=1, cutoff=0.0)
        raise KeyError(f"{name!r} is no metric of asyncflow.observe.metrics; the nearest is {near[0]!r}") from None
