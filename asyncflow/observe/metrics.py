"""The table of all metrics; a metric that is not listed here can't be exported.

Names are written without their prefix and follow Prometheus: base units (seconds, bytes, ratio), `_total` for counters,
histograms for durations. Every series also has the labels `role` and `rank`. Labels have few values that are known
beforehand: never a sample id or a prompt.
"""

from __future__ import annotations

import difflib
from typing import Literal

import msgspec

PREFIX = "asyncflow_"

Kind = Literal["counter", "gauge", "histogram"]

IDENTITY = ("role", "rank")  # labels of every series: the actor that reports it

QUICK = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)  # commits, loop lag
SLOW = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0)  # steps, syncs, checkpoints
VERSIONS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


class Metric(msgspec.Struct, frozen=True):
    """One row of the table."""

    name: str  # without the prefix
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()  # its own, beside IDENTITY; a metric that lists "role" is about another service
    buckets: tuple[float, ...] = ()  # upper bounds, histograms only
    group: str = ""

    @property
    def full_name(self) -> str:
        """The name with its prefix, as Prometheus sees it."""
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
        _gauge(
            "build_info", "Always 1; the labels are the versions of the program and of Python.", "version", "python"
        ),
        _gauge("start_time_seconds", "Unix time at which the actor started; uptime is time() minus this."),
        _gauge("last_step_timestamp_seconds", "Unix time of the last committed step."),
        _counter("restarts_total", "Services whose process died and was replaced.", "role"),
        _counter("rollbacks_total", "Returns to a checkpoint after the death of a service with trained state."),
        _counter("steps_lost_total", "Committed steps that a rollback gave up, to be made again."),
        _gauge("controller_term", "Lineage of the run: increases with every restart, resume and fork."),
        _histogram("event_loop_lag_seconds", "Delay between the time a task asked to wake and its waking.", QUICK),
    ),
    "ledger": (
        _counter("samples_total", "Samples that reached a final state, by state and reason.", "state", "reason"),
        _gauge("ledger_imbalance", "Samples created less trained, dropped, failed and live. Any value but 0 is a bug."),
    ),
    "flow": (
        _gauge("channel_depth", "Rows waiting in a channel.", "channel"),
        _gauge("channel_capacity", "Most rows that a channel may hold.", "channel"),
        _histogram("channel_wait_seconds", "Time one side of a channel waited for the other.", SLOW, "channel", "side"),
        _counter("channel_bytes_total", "Bytes that a channel's consumer read, in blocks of its own rows.", "channel"),
        _counter("channel_inline_bytes_total", "Bytes of small frames sent inside a delivery.", "channel"),
        _counter("duplicates_rejected_total", "Rows refused as duplicates or as late.", "channel"),
        _counter("rows_quarantined_total", "Rows whose frame was refused; they end as failed.", "channel"),
    ),
    "staleness": (
        _histogram(
            "trained_staleness_versions", "Versions between a trained sample's oldest token and its step.", VERSIONS
        ),
        _gauge("staleness_bound_versions", "Largest staleness that the recipe allows."),
        _gauge("weights_version", "Version of the weights that a replica has loaded.", "replica"),
        _counter("straggler_wait_seconds_total", "Time from a commit until the next batch was complete."),
    ),
    "bubbles": (_counter("busy_seconds_total", "Time spent working; idle is 1 minus its rate.", "role", "activity"),),
    "weight sync": (
        _histogram("weight_sync_seconds", "Duration of one phase of publishing weights.", SLOW, "phase"),
        _counter("weight_sync_bytes_total", "Bytes of published weights."),
        _histogram("transition_seconds", "Duration of a transition from the training to the generation layout.", SLOW),
        _counter("transition_bytes_total", "Bytes of weights that rank 0 received in transitions."),
        _gauge("transition_peak_bytes", "Most bytes of weights that rank 0 held during the last transition."),
        _gauge("transition_copied_bytes", "Bytes of rank 0's weights that vLLM copied instead of sharing them."),
    ),
    "throughput": (
        _counter("steps_total", "Committed steps."),
        _histogram("step_seconds", "Time between two commits.", SLOW),
        _counter("tokens_generated_total", "Response tokens generated by the engine."),
        _counter("tokens_trained_total", "Response tokens of committed steps."),
        _counter("samples_trained_total", "Samples of committed steps."),
        _gauge("tokens_so_far", "Response tokens of all committed steps, over all starts of the run."),
    ),
    "learning": (
        _gauge("reward_mean", "Mean reward of the last step's samples."),
        _gauge("reward_std", "Standard deviation of the rewards of the last step's samples."),
        _gauge("reward_part_mean", "Mean of one part of a mixed reward, before its weight.", "part"),
        _gauge("cost_mean", "Mean cost of the last step's samples; above the limit is unsafe."),
        _gauge("cost_multiplier", "Safe-RLHF's lambda: the weight of a unit of cost against a unit of reward."),
        _gauge("kl_coefficient", "Reward per nat of KL, if the coefficient is adaptive."),
        _gauge("evaluation", "Last evaluation on held-out prompts.", "metric"),
        _gauge("kl_reference_nats", "Mean KL per token of the rollout policy to the reference."),
        _gauge(
            "mismatch_kl_nats",
            "Mean KL per token of the rollout policy to the trained one; at staleness 0 the engine's numerical error.",
        ),
        _gauge("mismatch_mean_nats", "Mean absolute difference of a token's log-prob, as sampled and as trained."),
        _gauge("mismatch_max_nats", "The largest such difference in the last step."),
        _gauge("clip_fraction", "Share of tokens whose ratio was clipped."),
        _gauge(
            "negative_log_likelihood_nats",
            "Mean over the sampled tokens: an estimate of the policy's entropy from one sample of each.",
        ),
        _gauge("entropy_nats", "Mean entropy of the distribution that the last step's tokens were sampled from."),
        _gauge(
            "response_length_tokens",
            "Length of the last step's responses; p95 is the one that 95 % of them do not exceed.",
            "statistic",
        ),
        _gauge("response_cut_ratio", "Share of the last step's responses that max_tokens cut short."),
        _gauge("learning_rate", "Mean learning rate of the last step's optimizer steps.", "role"),
        _gauge("gradient_norm", "Global gradient norm before clipping.", "role"),
        _gauge("loss", "Loss of the last step.", "role"),
    ),
    "durability": (
        _histogram("checkpoint_seconds", "Time to write a checkpoint.", SLOW),
        _gauge(
            "last_checkpoint_timestamp_seconds", "Unix time of the last valid checkpoint; its age is time() minus this."
        ),
        _gauge("checkpoint_bytes", "Size of the last checkpoint."),
        _histogram("ledger_commit_seconds", "Duration of one durable ledger transaction.", QUICK),
    ),
    "trackers": (_counter("tracker_records_dropped_total", "Records that a tracker had no room for.", "tracker"),),
    "resources": (
        _gauge("resident_memory_bytes", "Memory of the actor's process."),
        _gauge("service_resident_bytes", "Memory of all processes of a service, as of the last step.", "role"),
        _gauge("service_device_bytes", "Accelerator memory that a service's processes hold, as of that step.", "role"),
    ),
}

METRICS: dict[str, Metric] = {
    metric.name: msgspec.structs.replace(metric, group=group) for group, metrics in GROUPS.items() for metric in metrics
}


def metric(name: str) -> Metric:
    """The row of the table with this name. Raises KeyError with the nearest name."""
    try:
        return METRICS[name]
    except KeyError:
        near = difflib.get_close_matches(name.removeprefix(PREFIX), METRICS, n=1, cutoff=0.0)
        raise KeyError(f"{name!r} is no metric of asyncflow.observe.metrics; the nearest is {near[0]!r}") from None
