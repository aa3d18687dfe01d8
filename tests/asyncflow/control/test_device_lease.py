"""The lease of a pool has one holder at a time, and serves all claims in calling order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncflow.control.device_lease import Claim, PoolLease, shared_leases


def claim(ticket: int, service: str = "policy") -> Claim:
    return Claim(service, ticket, f"{service}.stage#1")


def test_a_free_pool_is_granted_at_once():
    lease = PoolLease("main")
    assert lease.ask(claim(0)) == claim(0)
    assert lease.holder == claim(0)


def test_one_firing_a_grant():
    """A holder that claims the devices again queues behind the claims made in between."""
    lease = PoolLease("main")
    lease.ask(claim(0))
    assert lease.ask(claim(7, "critic")) is None
    assert lease.ask(claim(1)) is None
    assert lease.give_back("policy", 0) == claim(7, "critic")
    assert lease.waiting == [claim(1)]


def test_tickets_count_for_their_service_only():
    lease = PoolLease("main")
    lease.ask(claim(0, "policy"))
    lease.ask(claim(0, "critic"))
    assert lease.give_back("critic", 0) is None, "the critic's claim is withdrawn, not the policy's lease"
    assert lease.holder == claim(0, "policy")
    assert lease.waiting == []


def test_a_claim_that_was_never_made_ends_nothing():
    lease = PoolLease("main")
    lease.ask(claim(0))
    assert lease.give_back("policy", 5) is None
    assert lease.holder == claim(0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30))))
def test_grants_follow_the_order_of_asking_and_skip_who_withdrew(moves: list[tuple[bool, int]]):
    """Moves: claim with the next ticket, or end the open claim at a position. The model is the list of open claims."""
    lease, opened, tickets = PoolLease("main"), list[Claim](), 0
    for asks, place in moves:
        if asks or not opened:
            asked = claim(tickets, f"service{tickets % 3}")
            tickets += 1
            opened.append(asked)
            granted = lease.ask(asked)
            assert granted == (asked if len(opened) == 1 else None)
        else:
            ended = place % len(opened)
            gone = opened.pop(ended)
            granted = lease.give_back(gone.service, gone.ticket)
            assert granted == (opened[0] if ended == 0 and opened else None), (
                "a grant is returned once, for the next claim"
            )
        assert lease.holder == (opened[0] if opened else None)
        assert lease.waiting == opened[1:]


def test_a_service_that_is_gone_holds_nothing_and_waits_for_nothing():
    lease = PoolLease("main")
    first, second, third = claim(0, "reward"), claim(1, "critic"), claim(2, "reward")
    for asked in (first, second, third):
        lease.ask(asked)
    assert lease.forget("reward") == second
    assert (lease.holder, lease.waiting) == (second, [])
    assert lease.forget("reward") is None
    assert lease.holder == second


def test_services_share_the_lease_of_their_pool_and_one_that_is_alone_needs_none():
    leases = shared_leases({"policy": "main", "critic": "main", "reference": "frozen", "reward": "b", "cost": "b"})
    assert leases.keys() == {"policy", "critic", "reward", "cost"}
    assert leases["policy"] is leases["critic"]
    assert leases["reward"] is leases["cost"]
    assert (leases["policy"].pool, leases["reward"].pool) == ("main", "b")
