"""A service that begins a new term keeps what it has loaded, and nothing of the rows of the term before."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from asyncflow.services.channels.endpoint import ServiceError, ask
from protocols.control.replies import Rows, Subscribed
from protocols.control.requests import BeginTerm, CloseBatch, NextRows, Subscribe
from tests.asyncflow.services import rows
from tests.asyncflow.services.chain import A_EDGE, B_EDGE, C_EDGE, local_chain, samples_of


async def test_the_rows_of_the_old_term_are_gone_and_the_same_ids_are_taken_again(tmp_path: Path):
    samples = samples_of(*range(8))
    held = {"options": {"folder": str(tmp_path), "gate": "open"}, "mailbox_rows": 2, "firing_rows": 2}
    async with local_chain(a={"firing_rows": 2}, b=held) as c:
        for start in range(0, 8, 2):
            await c.send(c.put(rows.log_probs(samples[start : start + 2])))
        await c.until("a", f"credit on {B_EDGE}", depth=2)  # rows everywhere: mailboxes, ranks, a sender that waits
        beginning = asyncio.create_task(c.begin_term(1))
        (tmp_path / "open").touch()  # b computes its rows to their end
        await beginning
        assert [(await c.edge(edge)).depth for edge in (A_EDGE, B_EDGE, C_EDGE)] == [0, 0, 0]
        assert [(await c.statistics(name)).kept for name in "abc"] == [0, 0, 0]
        await c.send(c.put(rows.log_probs(samples)))
        await c.until_settled(8)
        assert Counter(s for settled in c.settled for s in settled.alive) == Counter(samples)
        assert await c.values(samples) == {sample: -4.0 * sample for sample in samples}


async def test_what_still_comes_of_the_old_term_is_refused():
    old, new = samples_of(1, 2), samples_of(3)
    async with local_chain() as c:
        late = c.put(rows.log_probs(old))
        await c.begin_term(1)
        for edge in (A_EDGE, B_EDGE, C_EDGE):
            await c.send(late, to=edge, term=0)
        await c.send(c.put(rows.log_probs(new)))
        await c.until_settled(1)
        assert [settled.alive for settled in c.settled] == [new]


async def test_a_request_that_waits_for_rows_of_the_old_term_is_refused():
    async with local_chain() as c:
        waiting = asyncio.create_task(ask(c.endpoints["c"], CloseBatch(0, samples_of(1))))
        await c.until_waits("c", "rows again on b.double#1")
        await c.begin_term(1)
        with pytest.raises(ServiceError, match="CloseBatch: a new term has begun"):
            await waiting


async def test_a_term_that_is_not_newer_is_refused():
    async with local_chain() as c:
        await c.begin_term(2)
        with pytest.raises(ServiceError, match="term 1 is not newer than 2"):
            await ask(c.endpoints["a"], BeginTerm(1))


async def test_the_notices_of_the_old_term_are_not_read_in_the_new_one():
    async with local_chain() as c:
        await c.send(c.put(rows.log_probs(samples_of(*range(4)))))
        await c.until_settled(4)
        reading = asyncio.create_task(c.endpoints["c"].notices())  # of a controller that has left
        await c.begin_term(1)
        await reading  # else it would take the first notices of the new term
        await c.send(c.put(rows.log_probs(samples_of(7))))
        assert [settled.alive for settled in await c.until_settled(1)] == [samples_of(7)]


async def test_two_terms_that_begin_at_once_leave_one_set_of_stages(tmp_path: Path):
    """A try to roll back that failed may still wait for a rank when the next one comes."""
    samples = samples_of(*range(4))
    held = {"options": {"folder": str(tmp_path), "gate": "open"}}
    async with local_chain(b=held) as c:
        await c.send(c.put(rows.log_probs(samples)))
        first = asyncio.create_task(ask(c.endpoints["b"], BeginTerm(1)))
        second = asyncio.create_task(ask(c.endpoints["b"], BeginTerm(2)))
        (tmp_path / "open").touch()
        await asyncio.gather(first, second)
        for name in "ac":
            await ask(c.endpoints[name], BeginTerm(2))
        c.term = 2
        await c.send(c.put(rows.log_probs(samples)))
        await c.until_settled(4)
        assert Counter(s for settled in c.settled for s in settled.alive) == Counter(samples)


async def test_who_reads_a_channel_from_outside_goes_on_reading_in_the_new_term():
    samples = samples_of(1, 2)
    async with local_chain() as c:
        reply, _ = await ask(c.endpoints["a"], Subscribe("a.double#1"))
        assert isinstance(reply, Subscribed)
        reading = asyncio.create_task(ask(c.endpoints["a"], NextRows(reply.number, 30.0)))
        await c.begin_term(1)
        await c.send(c.put(rows.log_probs(samples)))
        read, _ = await reading
        assert isinstance(read, Rows)
        assert sorted(s for shard in read.shards for s in shard.sample_ids) == samples
