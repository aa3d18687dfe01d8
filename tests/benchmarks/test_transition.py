"""The transition benchmark moves the bytes that the formula gives. How fast it was is for people to read."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import pytest

from asyncflow.bench.transition import NAMES, QUICK, StyleFigures, TransitionFigures, measure, measured
from protocols.layout.topology import Style


@cache
def figures(train: str, generate: str) -> TransitionFigures:
    return measure(train, generate, QUICK)


def of(style: Style, seen: TransitionFigures) -> StyleFigures:
    return next(one for one in seen.styles if one.style == style)


@pytest.mark.parametrize(("style", "multiple"), [("deepspeed", "7/8"), ("vanilla", "3/4"), ("hybridflow", "1/4")])
def test_the_papers_example_receives_exactly_its_multiple_of_the_matrices(style: Style, multiple: str):
    seen = figures("1-4-2", "1-2")
    one = of(style, seen)
    assert Fraction(one.received_matrices_bytes, seen.matrices_bytes) == Fraction(multiple)
    assert one.received_matrices_bytes == one.formula_bytes
    norms = seen.model_bytes - seen.matrices_bytes  # tensor ranks have them whole; only ZeRO had cut them, in two
    assert one.received_bytes - one.received_matrices_bytes == (norms // 2 if style == "deepspeed" else 0)


def test_with_stages_the_formula_speaks_of_the_layers_and_the_ends_stand_beside():
    seen = figures("2-2-1", "1-1")
    one = of("hybridflow", seen)
    assert Fraction(one.received_matrices_bytes, seen.matrices_bytes) == Fraction(3, 4)
    assert one.received_matrices_bytes == one.formula_bytes < one.received_bytes


def test_only_ours_generates_with_the_training_shard_in_place():
    redundant = {one.style: one.redundant_bytes for one in figures("1-4-2", "1-2").styles}
    assert redundant["hybridflow"] == 0
    assert min(redundant["deepspeed"], redundant["vanilla"]) > 0


def test_every_figure_is_reported_beside_its_bound():
    seen = figures("1-4-2", "1-2")
    assert [one.style for one in seen.styles] == list(NAMES)
    assert all(one.seconds > 0 and one.bandwidth_share > 0 for one in seen.styles)
    rows, lines = measured("1-4-2 -> 1-2", seen)
    ratios = {row.name: row.ratio for row in rows if row.ratio is not None}
    assert ratios["full gather: to generation"] == ratios["full gather: there and back"] == 1.0
    assert all(
        f" a rank: {multiple} M (" in text for multiple, text in zip(("7/8", "3/4", "1/4"), lines[2::2], strict=True)
    )


@pytest.mark.parametrize(
    ("train", "generate", "reason"),
    [
        ("1-4-2", "1-3", "generation tp 3 does not divide training tp 4"),
        ("1-16-1", "1-1", "attention heads 8 can't be divided over 16"),
        ("1-4-2", "1-2-2", "write p_g-t_g"),
        ("four", "1-2", "'four': write p-t-d"),
    ],
)
def test_layouts_that_mean_nothing_are_refused_before_a_process_starts(train: str, generate: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        measure(train, generate, QUICK)
