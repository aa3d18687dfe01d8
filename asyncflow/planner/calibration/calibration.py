"""Calibrations: a measured device with the efficiency of real code, and a recipe's response lengths and rule times.

`asyncflow calibrate RECIPE --output here.json` writes one, `asyncflow plan RECIPE --device here.json` uses it. This
module fits measurements by least squares; `measuring` takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from asyncflow.planner.costs.costs import STATE_BYTES
from asyncflow.planner.costs.devices import CATALOGUE, Device, Efficiency, Refused
from asyncflow.planner.costs.shapes import WEIGHT_BYTES, Shape
from asyncflow.planner.costs.workload import Lengths


class Calibration(msgspec.Struct, frozen=True):
    """A device, and what was measured of a recipe on it."""

    device: Device
    responses: Lengths | None = None  # response lengths of the recipe's policy; None: not known
    limit: int = 0  # maximum tokens of a response; 0: not known, none was truncated
    row_s: dict[str, float] = {}  # service without a model -> seconds a row
    measured: str = ""  # the recipe, machine and runtime

    def responses_under(self, limit: int) -> Lengths | None:
        """The predicted response lengths under a limit of `limit` tokens."""
        return self.responses and self.responses.under(limit, self.limit or self.responses.maximum + 1)


class LinearFit(msgspec.Struct, frozen=True):
    """seconds = fixed_s + slope_s x amount"""

    fixed_s: float
    slope_s: float

    def at(self, amount: float) -> float:
        """Seconds for an amount."""
        return self.fixed_s + self.slope_s * amount


def fit(amounts: Sequence[float], seconds: Sequence[float]) -> LinearFit:
    """Least squares of the relative errors, with both coefficients >= 0.

    The errors are relative because a small call matters as much to its step as a large call to another.
    """
    x, y = np.asarray(amounts, np.float64), np.asarray(seconds, np.float64)
    if len(x) != len(y) or not len(x) or not (y > 0).all():
        raise ValueError(f"a fit needs a time above 0 for each amount, got {len(x)} amounts and times {y.tolist()}")
    candidates = [
        np.array([0.0, np.dot(x / y, 1 / np.ones_like(y)) / np.dot(x / y, x / y)]),
        np.array([(1 / y).sum() / (1 / y**2).sum(), 0.0]),
    ]
    if len(set(x.tolist())) > 1:
        both, *_ = np.linalg.lstsq(np.column_stack([1 / y, x / y]), np.ones_like(y), rcond=None)
        if (both >= 0).all():
            candidates = [both]
    errors = [float(((c[0] + c[1] * x - y) ** 2 / y**2).sum()) for c in candidates]
    fixed, slope = candidates[int(np.argmin(errors))]
    return LinearFit(float(fixed), float(slope))


class Timed(msgspec.Struct, frozen=True):
    """The padded tokens of a call, and its seconds."""

    tokens: int
    seconds: float


class ModelTimings(msgspec.Struct, frozen=True, kw_only=True):
    """The measured times of a recipe's policy on one slot."""

    shape: Shape
    sample_tokens: float  # of the measured rows
    steps: int  # optimizer steps of an update
    peak_flops: float
    bandwidth: float
    forward: list[Timed]  # calls with one micro-batch
    update: list[Timed]  # calls with `steps` optimizer steps of one micro-batch
    decode: LinearFit  # seconds of a decoding step over the number of running sequences
    publish_s: float


def efficiency_of(timings: ModelTimings) -> Efficiency:
    """The efficiency with which the cost model reproduces the measured times."""
    shape, steps = timings.shape, timings.steps
    token_flops = shape.forward_flops(timings.sample_tokens / 2)
    forward = fit([t.tokens for t in timings.forward], [t.seconds for t in timings.forward])
    # Before several optimizer steps the policy makes an extra forward pass over the batch.
    again = [forward.at(t.tokens) if steps > 1 else 0.0 for t in timings.update]
    once = [max(t.seconds - a, t.seconds / 2) / steps for t, a in zip(timings.update, again, strict=True)]
    update = fit([t.tokens / steps for t in timings.update], once)
    state_s = shape.parameters * STATE_BYTES / timings.bandwidth
    compute = _share(token_flops, forward.slope_s, timings.peak_flops)
    read_s = shape.parameters * WEIGHT_BYTES / timings.bandwidth
    product_s = token_flops / (timings.peak_flops * compute)
    return Efficiency(
        compute=compute,
        training=_share(3 * token_flops, update.slope_s, timings.peak_flops),
        bandwidth=1.0,
        link=1.0,
        layer_s=forward.fixed_s / (shape.layers + 1),
        optimizer_s=max(0.0, update.fixed_s - 3 * forward.fixed_s - state_s),
        host_step_s=max(0.0, timings.decode.fixed_s - read_s),
        host_sequence_s=max(0.0, timings.decode.slope_s - product_s),
        publish_s=timings.publish_s,
    )


def _share(flops: float, seconds: float, peak: float) -> float:
    """The share of the peak flops, at most 1; 1 also for a time that is too short to measure."""
    return min(1.0, flops / (seconds * peak)) if seconds else 1.0


def read_calibration(given: str) -> Calibration:
    """Read a calibration file, or take a device of the catalogue by name. Raises Refused."""
    if given in CATALOGUE:
        return Calibration(CATALOGUE[given])
    try:
        return msgspec.json.decode(Path(given).read_bytes(), type=Calibration)
    except OSError as error:
        known = ", ".join(CATALOGUE)
        raise Refused(f"device {given!r}: no file ({error.strerror}), and no device of {known}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Refused(f"device {given!r}: no calibration of `asyncflow calibrate`: {error}") from error
