"""What a stage gives back: every row that it took, once."""

from __future__ import annotations

import numpy as np
import pytest

from asyncflow.services.stages import check_complete
from protocols.messages import Scores
from protocols.stage import Failure


def scores(*samples: int) -> Scores:
    return Scores(sample_ids=np.array(samples, np.int64), scores=np.zeros(len(samples), np.float32))


def test_values_and_tombstones_together_are_the_rows_that_were_taken():
    check_complete("reward.score#1", scores(1, 2, 3), scores(3, 1), [Failure(2, "timeout")])


@pytest.mark.parametrize(
    ("given", "failures", "wrong"),
    [
        (scores(1), [], r"\[2\]"),
        (scores(1, 2), [Failure(2, "x")], r"\[2\]"),
        (scores(1, 2, 9), [], r"\[9\]"),
    ],
    ids=["vanished", "value and tombstone", "of nobody"],
)
def test_a_row_that_does_not_leave_exactly_once_is_an_error_that_names_it(
    given: Scores, failures: list[Failure], wrong: str
):
    with pytest.raises(ValueError, match=rf"reward\.score#1: took 2 rows .*{wrong}"):
        check_complete("reward.score#1", scores(1, 2), given, failures)
