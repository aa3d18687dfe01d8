"""The curves of the report: what the journals say of each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asyncflow.observe.charts import ChartLine, smoothed
from asyncflow.observe.markup import Markup, tag
from asyncflow.observe.memory import DEVICE, RESIDENT
from asyncflow.observe.page import figure

Row = Mapping[str, Any]

PART = "reward."  # prefix of the mean of a mixed reward's part in the journal
NORM, MEMORY = ".gradient_norm", "memory."  # the end of a trained model's metric, the beginning of a service's


def learning_curves(steps: Sequence[Row], evaluations: Sequence[Row]) -> list[Markup]:
    """One figure for each metric that the steps have."""
    figures = [
        _trend("Reward", "mean of the step's samples", points_of(steps, "reward_mean")),
        *(
            _trend(f"Reward: {name.removeprefix(PART)}", "this part's mean, before its weight", points_of(steps, name))
            for name in parts_of(steps)
        ),
        _bounded("Cost", "mean of the step's samples", steps, "cost_mean", "cost_limit"),
        _trend("Multiplier", "weight of a unit of cost against one of reward", points_of(steps, "multiplier")),
        *(
            figure(f"Held-out {m}", "prompts that are never trained", [ChartLine(m, points)], zero=True)
            for m in sorted({str(row["metric"]) for row in evaluations})
            if (points := points_of([row for row in evaluations if row["metric"] == m], "value"))
        ),
        _bounded("KL to the reference", "nats per token", steps, "kl", "kl_target"),
        _trend("KL coefficient", "follows the KL towards its target", points_of(steps, "kl_coefficient")),
        _trend("Policy loss", "mean of the step", points_of(steps, "loss")),
        _trend("Entropy", "nats per token, of the distribution that is sampled", points_of(steps, "policy.entropy")),
        _trend("Learning rate", "of the policy", points_of(steps, "policy.learning_rate")),
        *(
            _trend(f"Gradient norm: {name.removesuffix(NORM)}", "before clipping", points_of(steps, name))
            for name in _named(steps, "", NORM)
        ),
        _largest_and_mean("Response length", "tokens, the longest of the step's responses", steps, "response_length"),
        _trend("Responses cut short", "share that reached max_tokens", points_of(steps, "response_cut"), zero=True),
        _trend("Pretraining loss", "nats per token of the text", points_of(steps, "policy.ptx_loss")),
        _trend("Critic loss", "mean of the step", points_of(steps, "critic.loss")),
        _trend("Cost critic loss", "mean of the step", points_of(steps, "cost_critic.loss")),
        _largest_and_mean(
            "Engine against trainer",
            "nats, the difference of a token's log-prob; at staleness 0 numerical error",
            steps,
            "policy.mismatch",
        ),
        _largest_and_mean("Staleness", "versions, the largest of the step's samples", steps, "staleness"),
        _trend("Seconds per step", "between two commits", points_of(steps, "seconds"), zero=True),
        _trend("Throughput", "response tokens trained per second", _tokens_per_second(steps), zero=True),
        *(
            _memory(name.removeprefix(MEMORY).removesuffix(f"_{RESIDENT}"), steps)
            for name in _named(steps, MEMORY, RESIDENT)
        ),
    ]
    shown = [figure for figure in figures if figure]
    if not shown:
        return [tag("p", "No step was committed, so there is no curve.", class_="muted")]
    return [tag("div", *shown, class_="figures")]


def _tokens_per_second(steps: Sequence[Row]) -> list[tuple[float, float]]:
    return [(float(row["step"]), row["tokens_generated"] / row["seconds"]) for row in steps if row["seconds"]]


def _trend(title: str, note: str, points: list[tuple[float, float]], zero: bool = False) -> Markup:
    """A noisy curve: faint values and their moving mean."""
    if len(points) < 20:
        return figure(title, note, [ChartLine("value", points)], zero)
    return figure(
        title, note, [ChartLine("value", points, style="faint"), ChartLine("moving mean", smoothed(points))], zero
    )


def _bounded(title: str, note: str, steps: Sequence[Row], name: str, bound: str) -> Markup:
    """A curve and its limit or target, if the run has one."""
    points, bounds = points_of(steps, name), points_of(steps, bound)
    if not points or not bounds:
        return _trend(title, note, points)
    label = bound.rpartition("_")[2]  # "cost_limit" is a limit
    return figure(title, note, [ChartLine("value", points), ChartLine(label, bounds, style="second")])


def _largest_and_mean(title: str, note: str, steps: Sequence[Row], name: str) -> Markup:
    largest, mean = points_of(steps, f"{name}_max"), points_of(steps, f"{name}_mean")
    return figure(
        title, note, [ChartLine("largest", largest), ChartLine("their mean", mean, style="second")], zero=True
    )


def _memory(service: str, steps: Sequence[Row]) -> Markup:
    resident, device = (
        [(step, nbytes / 1e9) for step, nbytes in points_of(steps, f"{MEMORY}{service}_{kind}")]
        for kind in (RESIDENT, DEVICE)
    )
    lines = [ChartLine("resident", resident), ChartLine("on accelerators", device, style="second")]
    return figure(f"Memory: {service}", "GB of its processes, when the step ended", lines, zero=True)


def parts_of(steps: Sequence[Row]) -> list[str]:
    """Names of the metrics of a mixed reward's parts, in the order of the recipe."""
    return _named(steps, PART, "")


def _named(steps: Sequence[Row], start: str, end: str) -> list[str]:
    names = dict.fromkeys(name for row in steps for name in row)
    return [name for name in names if name.startswith(start) and name.endswith(end)]


def points_of(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """(step, value) of the rows in which `name` is a number; a journal writes values that are not finite as null."""
    values = ((row["step"], row.get(name)) for row in rows)
    return [(float(step), float(v)) for step, v in values if isinstance(v, (int, float))]
