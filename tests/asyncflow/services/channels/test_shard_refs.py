"""Planning a firing's calls: each rank reads exactly its own rows of every input, whatever shards hold them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncflow.services.channels.shard_refs import (
    Partitioning,
    RankCallPlan,
    RowRef,
    ShardRef,
    arrivals,
    pack,
    pack_apart,
    parts_of,
    plan_calls,
    row_refs,
    unpack,
)
from asyncflow.services.ranks.rank import RowReader
from asyncflow.services.runtime.local_store import LocalStore
from protocols.control.delivery import Shard
from protocols.data import codec
from protocols.data.columns import Batch
from protocols.data.ids import prompt_of, sample_id
from protocols.data.messages import LogProbs, Scores, Values
from protocols.layout.topology import GenerationGrouping, Topology
from protocols.layout.transfer import protocol
from protocols.stage import Failure
from tests.asyncflow.services import rows
from tests.protocols.strategies import topologies

CUTTING = ["3D_PROTO", "3D_ALL_MICRO_DP", "DP_PROTO", "METRIC"]
READING = [*CUTTING, "ONE_TO_ALL", "3D_PP_ONLY", "RANK_ZERO"]
KINDS = {LogProbs.schema_id: rows.log_probs, Values.schema_id: rows.values}
SCHEMAS = list(KINDS)


def refs_to(samples: Sequence[int], schema: int, cuts: Sequence[Sequence[int]]) -> list[RowRef]:
    """References to the rows of `samples`, in that order, in shards that hold the ids given by `cuts`."""
    found = dict(place for shard in cuts if shard for place in row_refs([rows.part(KINDS[schema](shard))]))
    return [found[sample] for sample in samples]


def planned(
    samples: Sequence[int],
    inputs: Sequence[Sequence[RowRef]],
    cut: Partitioning,
    topology: Topology,
    generation: GenerationGrouping | None = None,
) -> list[RankCallPlan]:
    schemas = SCHEMAS[: len(inputs)]
    return plan_calls("reward.score#1", "score", cut, samples, inputs, schemas, topology, generation=generation)


def by_rank(calls: Sequence[RankCallPlan]) -> dict[int, list[int]]:
    """Rank -> the samples in its call."""
    return {call.rank: call.call.sample_ids for call in calls}


def read(call: RankCallPlan) -> list[Batch]:
    """The inputs that a rank reads for its call."""
    reader = RowReader(call.call, call.payloads)
    assert (reader.damaged, reader.lost) == ([], [])
    return reader.inputs


@st.composite
def shards(draw: st.DrawFn, samples: list[int]) -> list[list[int]]:
    """The ids in random order, cut into a random number of shards."""
    order = draw(st.permutations(samples))
    cuts = sorted(draw(st.lists(st.integers(0, len(order)), max_size=3)))
    return [order[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(order)], strict=True)]


@settings(max_examples=150)
@given(st.data(), topologies(2, 2, 2), st.sampled_from(READING))
def test_each_rank_reads_its_rows_of_every_input_and_nothing_else(data: st.DataObject, topology: Topology, name: str):
    samples = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=12, unique=True), label="samples")
    cuts = [data.draw(shards(samples), label=f"input {schema}") for schema in SCHEMAS]
    inputs = [refs_to(samples, schema, cut) for schema, cut in zip(SCHEMAS, cuts, strict=True)]
    generation = GenerationGrouping(topology)
    calls = planned(samples, inputs, Partitioning(name), topology, generation)
    shares = protocol(name).distribute(len(samples), topology, generation=generation)
    assert by_rank(calls) == {rank: [samples[row] for row in share] for rank, share in enumerate(shares) if len(share)}
    for call in calls:
        mine = call.call.sample_ids
        assert read(call) == [kind(mine) for kind in KINDS.values()]
        needed = {id(part.payload) for refs in inputs for s in mine for part in [refs[samples.index(s)][0]]}
        assert {id(payload) for payload in call.payloads} == needed, "no frame travels to a rank that needs none of it"
        assert len(call.payloads) == len(needed), "and none twice"


@given(st.data(), topologies(1, 2, 3), st.sampled_from(CUTTING), st.booleans())
def test_a_group_is_never_cut_where_the_stage_wants_it_whole(
    data: st.DataObject, topology: Topology, name: str, by_tokens: bool
):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5), label="samples of each prompt")
    samples = [sample_id(prompt, index) for prompt, size in enumerate(sizes) for index in range(size)]
    inputs = [refs_to(samples, LogProbs.schema_id, data.draw(shards(samples), label="shards"))]
    generation = GenerationGrouping(topology)
    cut = Partitioning(name, whole_groups=True, by_tokens=by_tokens)
    calls = planned(samples, inputs, cut, topology, generation)
    worked_on = by_rank(calls)
    for rank in protocol(name).collect(topology, generation=generation):
        mine = worked_on.pop(rank, [])
        for other in worked_on.values():
            shared = set(map(prompt_of, mine)) & set(map(prompt_of, other))
            assert not shared or mine == other, "ranks that share a prompt are replicas of one another"


def test_without_whole_groups_a_prompt_is_cut():
    samples = [sample_id(0, index) for index in range(4)]
    inputs = [refs_to(samples, LogProbs.schema_id, [samples])]
    assert by_rank(planned(samples, inputs, Partitioning("DP_PROTO"), Topology(dp=2))) == {
        0: samples[:2],
        1: samples[2:],
    }


def four_rows(tokens: list[int]) -> list[RowRef]:
    """Rows 0 to 3 in one shard, which states their token counts if there are any."""
    part = ShardRef(Shard([0, 1, 2, 3], 0, tokens), None)
    return [(part, row) for row in range(4)]


@pytest.mark.parametrize(("by_tokens", "shares"), [(True, [[0], [1, 2, 3]]), (False, [[0, 1], [2, 3]])])
def test_shares_have_equal_tokens_where_the_stage_balances_by_them(by_tokens: bool, shares: list[list[int]]):
    cut = Partitioning("DP_PROTO", by_tokens=by_tokens)
    calls = planned(range(4), [four_rows([30, 10, 10, 10])], cut, Topology(dp=2))
    assert list(by_rank(calls).values()) == shares


def test_token_counts_come_from_the_first_input_that_states_them():
    without, with_tokens = four_rows([]), four_rows([30, 10, 10, 10])
    for inputs, shares in (([without, with_tokens], [[0], [1, 2, 3]]), ([without], [[0, 1], [2, 3]])):
        calls = planned(range(4), inputs, Partitioning("DP_PROTO", by_tokens=True), Topology(dp=2))
        assert list(by_rank(calls).values()) == shares


def test_a_rank_without_rows_is_not_called():
    calls = planned([7], [refs_to([7], LogProbs.schema_id, [[7]])], Partitioning("DP_PROTO"), Topology(dp=4))
    assert [call.rank for call in calls] == [0]


def test_the_call_says_what_is_asked_and_which_message_each_input_is():
    inputs = [refs_to([7], schema, [[7]]) for schema in SCHEMAS]
    (call,) = plan_calls("reward.score#2", "score", Partitioning("DP_PROTO"), [7], inputs, SCHEMAS, Topology(), step=3)
    assert (call.call.stage, call.call.method, call.call.step) == ("reward.score#2", "score", 3)
    assert [reading.schema for reading in call.call.readings] == SCHEMAS


# --- packing


def test_a_shard_states_the_ids_the_bytes_and_the_token_counts_of_its_rows():
    packed = pack(LocalStore(), rows.rollouts([3, 1], versions=[[0], [0, 0]]), term=2, attempt=1)
    frame = packed.payload
    assert packed.shard == Shard([3, 1], frame.nbytes, [2, 3])
    header = codec.open_frame(frame).header
    assert (header.term, header.attempt) == (2, 1)


class Passing(LocalStore):
    """A store whose coordinators forward frames of up to 2048 bytes inline."""

    def piece_bytes(self, nbytes: int, direct: bool) -> int:
        return 0 if direct or nbytes > 20_000 else 2048


def test_a_small_batch_for_several_ranks_is_packed_in_pieces_that_their_coordinator_may_forward():
    store, batch = Passing(), rows.log_probs(range(8), 100)
    apart = pack_apart(store, batch, term=0)
    assert [part.shard.sample_ids for part in apart] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(part.shard.nbytes <= 2048 for part in apart)
    assert unpack([part.payload for part in apart], LogProbs) == batch
    assert len(pack_apart(store, batch, term=0, direct=True)) == 1, "whoever reads all of it gets it whole"


@pytest.mark.parametrize(("samples", "tokens"), [(8, 1000), (2, 600)], ids=["of many bytes", "of long rows"])
def test_a_batch_that_fits_no_pieces_is_packed_whole(samples: int, tokens: int):
    assert len(pack_apart(Passing(), rows.log_probs(range(samples), tokens), term=0)) == 1


def test_rows_without_tokens_state_no_token_counts():
    assert rows.part(rows.scores([1, 2])).shard.lengths == []


def test_unpacked_parts_are_one_batch():
    parts = [rows.part(rows.scores([3, 1])), rows.part(rows.scores([2]))]
    assert unpack([part.payload for part in parts], Scores) == rows.scores([3, 1, 2])


def test_unpacking_accepts_the_one_message_that_is_expected():
    with pytest.raises(codec.BadFrame, match="unknown schema 5"):
        unpack([rows.part(rows.scores([1])).payload], LogProbs)


def test_each_shard_has_its_payload():
    shards = [Shard([1], 8), Shard([2], 8)]
    assert [(p.shard, p.payload) for p in parts_of(shards, ["a", "b"])] == [(shards[0], "a"), (shards[1], "b")]
    with pytest.raises(ValueError, match="2 shards came with 1 payloads"):
        parts_of(shards, ["a"])


def test_rows_arrive_with_their_places_and_tombstones_after_them():
    first, second = rows.part(rows.scores([3, 1])), rows.part(rows.scores([2]))
    assert arrivals([first, second], [Failure(9, "timeout")]) == [
        (3, (first, 0)),
        (1, (first, 1)),
        (2, (second, 0)),
        (9, Failure(9, "timeout")),
    ]
