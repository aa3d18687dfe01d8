"""What was measured here: a device with the reach that real code has on it, and what no data sheet says of a recipe.

A calibration is a file: `asyncflow calibrate RECIPE --output here.json`, and then `asyncflow plan RECIPE --device
here.json`. The fits are least squares over a few sizes; they are pure, measuring is in `measuring`.
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
    """A device, and what calls of services without a model take on it."""

    device: Device
    responses: Lengths | None = None  # tokens that the recipe's policy answered with; None: not known
    limit: int = 0  # tokens that a response could have; 0: not known, none was cut
    row_s: dict[str, float] = {}  # service without a model -> seconds a row
    measured: str = ""  # where and with what recipe

    def responses_under(self, limit: int) -> Lengths | None:
        """What the policy answers with where it may use up to `limit` tokens."""
        return self.responses and self.responses.under(limit, self.limit or self.responses.maximum + 1)


class LinearFit(msgspec.Struct, frozen=True):
    """seconds = fixed_s + slope_s x amount"""

    fixed_s: float
    slope_s: float


def fit(amounts: Sequence[float], seconds: Sequence[float]) -> LinearFit:
    """The line of least squares of relative errors, neither part below 0.

    Relative, since a small call matters as much to its own step as a large one to another.
    """
    x, y = np.asarray(amounts, np.float64), np.asarray(seconds, np.float64)
    if len(x) != len(y) or not len(x) or not (y > 0).all():
        raise ValueError(f"want a time above 0 for each amount, got {len(x)} amounts and times {y.tolist()}")
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
    """Padded tokens of some work, and its seconds."""

    tokens: int
    seconds: float


class ModelTimings(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of a recipe's model on one slot."""

    shape: Shape
    sample_tokens: float  # of the rows that were measured
    steps: int  # optimizer steps of an update
    peak_flops: float
    bandwidth: float
    forward: list[Timed]  # one micro-batch each
    update: list[Timed]  # `steps` optimizer steps of one micro-batch each
    decode: LinearFit  # seconds of a token for each of so many running sequences
    publish_s: float


def fit_decode(steps: Sequence[tuple[float, float]]) -> LinearFit:
    """Of (mean running sequences, seconds of a decoding step)."""
    return fit([running for running, _ in steps], [seconds for _, seconds in steps])


def efficiency_of(figures: ModelTimings) -> Efficiency:
    """The reach with which the cost models give back what was measured."""
    shape, steps = figures.shape, figures.steps
    token_flops = shape.forward_flops(figures.sample_tokens / 2)
    forward = fit([t.tokens for t in figures.forward], [t.seconds for t in figures.forward])
    # With several optimizer steps the policy reads the batch once more before the first.
    again = [forward.fixed_s + forward.slope_s * t.tokens if steps > 1 else 0.0 for t in figures.update]
    once = [max(t.seconds - a, t.seconds / 2) / steps for t, a in zip(figures.update, again, strict=True)]
    update = fit([t.tokens / steps for t in figures.update], once)
    state_s = shape.parameters * STATE_BYTES / figures.bandwidth
    compute = _share(token_flops, forward.slope_s, figures.peak_flops)
    read_s = shape.parameters * WEIGHT_BYTES / figures.bandwidth
    product_s = token_flops / (figures.peak_flops * compute)
    return Efficiency(
        compute=compute,
        training=_share(3 * token_flops, update.slope_s, figures.peak_flops),
        bandwidth=1.0,
        link=1.0,
        layer_s=forward.fixed_s / (shape.layers + 1),
        optimizer_s=max(0.0, update.fixed_s - 3 * forward.fixed_s - state_s),
        host_step_s=max(0.0, figures.decode.fixed_s - read_s),
        host_sequence_s=max(0.0, figures.decode.slope_s - product_s),
        publish_s=figures.publish_s,
    )


def _share(flops: float, seconds: float, peak: float) -> float:
    """Of the peak, at most all of it; a time that was too short to see reads as all."""
    return min(1.0, flops / (seconds * peak)) if seconds else 1.0


def read_calibration(given: str) -> Calibration:
    """A calibration's file, or the name of a device of the catalogue. Raises Refused."""
    if given in CATALOGUE:
        return Calibration(CATALOGUE[given])
    try:
        return msgspec.json.decode(Path(given).read_bytes(), type=Calibration)
    except OSError as error:
        known = ", ".join(CATALOGUE)
        raise Refused(f"device {given!r}: no file ({error.strerror}), and no device of {known}") from error
    except msgspec.MsgspecError as error:
        raise Refused(f"device {given!r}: no calibration of `asyncflow calibrate`: {error}") from error
