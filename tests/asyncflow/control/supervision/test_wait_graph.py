"""The wait graph holds the newest wait of each stage."""

from __future__ import annotations

from asyncflow.control.supervision.wait_graph import WaitBoard
from protocols.control.notices import Waiting


def board(*reports: Waiting) -> WaitBoard:
    made = WaitBoard()
    for report in reports:
        made.note(report)
    return made


def test_a_wait_is_shown_until_it_ends():
    waits = board(Waiting("b", "rows", "a", 1.0))
    assert waits.current() == {"b": "rows on a"}
    waits.note(Waiting("b"))
    assert waits.current() == {}


def test_the_last_word_of_a_stage_counts():
    waits = board(Waiting("b", "rows", "a", 1.0), Waiting("b", "lease", "main", 2.0))
    assert waits.current() == {"b": "lease on main"}


def test_a_wait_may_have_no_name_for_its_waker():
    waits = board(Waiting("b", "rows"))
    assert waits.current() == {"b": "rows"}
    assert waits.graph(now=3.0) == ["b waits for rows since 3 s"]


def test_an_end_without_a_wait_is_nothing():
    assert board(Waiting("b")).current() == {}


def test_the_graph_names_the_longest_wait_first():
    waits = board(Waiting("late", "rows", "a", 90.0), Waiting("early", "credit", "c", 40.0))
    assert waits.graph(now=100.0) == ["early waits for credit on c since 60 s", "late waits for rows on a since 10 s"]


def test_the_graph_names_who_holds_what_others_wait_for():
    waits = board(Waiting("reward.score#1", "lease", "main", 40.0))
    assert waits.graph(now=50.0, holders={"main": "critic.update#1"}) == [
        "reward.score#1 waits for lease on main, held by critic.update#1, since 10 s"
    ]


def test_clocks_that_disagree_give_no_negative_wait():
    assert board(Waiting("b", "rows", "a", 9.0)).graph(now=8.0) == ["b waits for rows on a since 0 s"]
