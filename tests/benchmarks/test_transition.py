"""The transition benchmark moves the bytes that it says and tells them; how fast it was is for people to read."""

from __future__ import annotations

from functools import cache

import msgspec
import pytest

from asyncflow.bench.transition import QUICK, STYLES, StyleFigures, TransitionFigures, lines, measure
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
    assert one.multiple == multiple
    assert one.received_matrices_bytes == one.formula_bytes
    norms = seen.model_bytes - seen.matrices_bytes  # tensor ranks have them whole; only ZeRO had cut them, in two
    assert one.received_bytes - one.received_matrices_bytes == (norms // 2 if style == "deepspeed" else 0)


def test_with_stages_the_formula_speaks_of_the_layers_and_the_ends_stand_beside():
    one = of("hybridflow", figures("2-2-1", "1-1"))
    assert one.multiple == "3/4"
    assert one.received_matrices_bytes == one.formula_bytes < one.received_bytes


def test_only_ours_generates_with_the_training_shard_in_place():
    redundant = {one.style: one.redundant_bytes for one in figures("1-4-2", "1-2").styles}
    assert redundant["hybridflow"] == 0
    assert min(redundant["deepspeed"], redundant["vanilla"]) > 0


def test_every_figure_is_told_beside_its_bound():
    seen = figures("1-4-2", "1-2")
    assert msgspec.json.decode(msgspec.json.encode(seen), type=TransitionFigures) == seen
    assert [one.style for one in seen.styles] == list(STYLES)
    assert of("deepspeed", seen).speedup == 1.0
    assert all(one.seconds > 0 and one.bandwidth_share > 0 for one in seen.styles)
    told = "\n".join(lines(seen))
    assert all(f"{one.multiple} M" in told for one in seen.styles)


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
