"""The outbox holds a delivery until the last of its prompts has finished, and no longer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncflow.services.channels.outbox import Outbox
from protocols.data.ids import BASELINE_INDEX, sample_id

EDGES = ("reward.score#1.0", "critic.values#1.0")
Step = tuple[str, str, list[int]]  # "keep", edge and prompts; or "end", no edge and prompts

steps = st.lists(
    st.one_of(
        st.tuples(st.just("keep"), st.sampled_from(EDGES), st.lists(st.integers(0, 6), min_size=1, max_size=3)),
        st.tuples(st.just("end"), st.just(""), st.lists(st.integers(0, 6), max_size=2)),
    )
)


def outbox(*sent: tuple[str, list[int], str]) -> Outbox[str]:
    """An outbox with these deliveries: edge, prompts (the first sample of each), and the delivery's content."""
    made: Outbox[str] = Outbox()
    for edge, prompts, what in sent:
        made.keep(edge, [sample_id(p, 0) for p in prompts], what)
    return made


@given(steps)
def test_an_edge_can_have_again_whatever_an_open_prompt_needs_in_the_order_of_sending(history: list[Step]):
    box: Outbox[int] = Outbox()
    sent: list[tuple[str, set[int]]] = []  # edge, prompts that are open
    finished: set[int] = set()
    for number, (what, edge, prompts) in enumerate(history):
        if what == "keep":
            box.keep(edge, [sample_id(p, 0) for p in prompts], number)
        else:
            box.end(prompts)
            finished |= set(prompts)
        sent.append((edge, set(prompts) if what == "keep" else set()))
        for edge_asked in EDGES:
            assert box.kept(edge_asked) == [n for n, (e, ps) in enumerate(sent) if e == edge_asked and ps - finished]
        assert len(box) == sum(bool(ps - finished) for _, ps in sent)


def test_edges_keep_apart():
    box = outbox((EDGES[0], [1], "scores"), (EDGES[1], [1], "values"))
    assert box.kept(EDGES[0]) == ["scores"]
    assert box.kept(EDGES[1]) == ["values"]


def test_an_edge_that_was_sent_nothing_has_nothing_again():
    assert outbox().kept("nobody.here#1.0") == []


def test_a_prompt_ends_for_all_of_its_rows_its_baseline_included():
    box: Outbox[str] = Outbox()
    box.keep(EDGES[0], [sample_id(1, 0), sample_id(1, 1)], "samples")
    box.keep(EDGES[0], [sample_id(1, BASELINE_INDEX)], "baseline")
    box.end([1])
    assert len(box) == 0


def test_a_late_row_of_an_ended_prompt_is_not_kept():
    box = outbox()
    box.end([1])
    box.keep(EDGES[0], [sample_id(1, 0)], "late")
    assert len(box) == 0


def test_its_memory_is_that_of_the_prompts_in_flight():
    box: Outbox[int] = Outbox()
    window = 8
    for prompt in range(1000):
        for edge in EDGES:
            box.keep(edge, [sample_id(prompt, 0), sample_id(prompt, 1)], prompt)
        box.end([prompt - window])
        assert len(box) <= (window + 1) * len(EDGES)
