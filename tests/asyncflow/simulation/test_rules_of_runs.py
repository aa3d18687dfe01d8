"""Scheduling rules 16 to 20: log-probs, seeds, determinism, rollback, and the report of a stall.

As in `test_rules`, each run fails without its rule. Rollback is tested with the real ledger, publication check and
join, the wait-for graph with the real board.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncflow.control.store.ledger import Ledger, LedgerError
from asyncflow.control.supervision.wait_graph import WaitBoard
from asyncflow.services.channels.prompt_join import PromptJoin
from protocols.control.notices import Waiting
from protocols.data.ids import sample_id, sampling_seed
from protocols.data.messages import Rollouts, Scores
from protocols.weights import BadWeights, Version
from tests.asyncflow.simulation import broken
from tests.asyncflow.simulation.configuration import Config, Faults
from tests.asyncflow.simulation.rows import Row, contents, message
from tests.asyncflow.simulation.rules import Rules
from tests.asyncflow.simulation.schedulers import in_any_order
from tests.asyncflow.simulation.test_rules import dies, on_purpose, shows
from tests.asyncflow.simulation.watch import Deadlock
from tests.asyncflow.simulation.world import World
from workers.generation.publication import verify_newer

# --- 16, 17, 18: log-probs, seeds, determinism


def test_16_a_ratio_to_the_weights_that_generated_a_row_is_not_one_at_the_first_optimizer_step():
    """At staleness 0 both weights are the same; at 1 the trust region would be centred on those of a step before."""
    of_generation = Rules(prox="of the generation")
    late_load = on_purpose(late=lambda world, action: action.verb == "load")
    shows(Config("grpo", staleness=1), of_generation, "its ratios divide by those of", late_load)
    in_any_order(World(Config("grpo", staleness=0), of_generation), seed=0)


def test_17_a_row_that_is_generated_again_after_a_crash_has_the_same_seed():
    config = Config("grpo", faults=Faults(restarts=1))
    after_some_rows = on_purpose(strike=dies("generator", lambda world: bool(world.watch.seeds)))
    shows(config, Rules(seed=broken.SeedsOfAGenerator()), "seeds: sample", after_some_rows)


def test_17_a_retry_of_the_failure_policy_has_another_seed():
    assert sampling_seed(7, sample_id(3, 0), retry=0) != sampling_seed(7, sample_id(3, 0), retry=1)


PPO_WAVES = Config("ppo", prompts=2, samples=2, capacity=4)


def firings(rules: Rules) -> set[str]:
    """The distinct sequences of firings, each with its rows, under a number of schedules."""
    worlds = [in_any_order(World(PPO_WAVES, rules), seed) for seed in range(10)]
    return {str({s: w.watch.firings[s] for s in sorted(w.watch.firings)}) for w in worlds}


def test_18_whole_waves_in_the_order_of_their_ids_are_computed_alike_whatever_comes_first():
    wave = PPO_WAVES.prompts * PPO_WAVES.samples
    assert len(firings(Rules(fires_on=wave, in_id_order=True))) == 1
    assert len(firings(Rules(fires_on=wave))) > 1, "rows in the order of their arrival"
    assert len(firings(Rules(in_id_order=True))) > 1, "whatever is there, in order"


# --- 19: rollback


def test_19_a_receiver_that_went_further_takes_the_weights_of_a_later_term():
    """Compared by step alone they would be refused, and generators would use abandoned weights forever."""
    abandoned, restored = Version(term=1, step=3), Version(term=2, step=2)
    verify_newer(restored, abandoned)
    assert not restored.step > abandoned.step


def test_19_weights_of_an_abandoned_lineage_come_too_late():
    """Compared by step alone they would be accepted."""
    restored, late = Version(term=2, step=2), Version(term=1, step=4)
    with pytest.raises(BadWeights, match=r"version 1\.4 is not newer than 2\.2"):
        verify_newer(late, restored)
    assert late.step > restored.step


@pytest.mark.parametrize("terms", [(1, 2), (1, 1)], ids=["a new term", "the same term again"])
def test_19_rows_of_an_abandoned_lineage_never_meet_those_of_the_next(terms: tuple[int, int]):
    """A prompt's tokens were generated before the rollback, and its scores come after it."""
    before, after = terms
    join, sample = PromptJoin(["sample", "sample"], 1), sample_id(0, 0)
    old, new = (sample, Row(1, 0, -1, ("anyone", 0))), (sample, Row(2, 0, -1, ("anyone", 1)))
    join.arrive(0, message(Rollouts, [old]), [], before)
    join.arrive(0, message(Rollouts, [new]), [], after)
    join.arrive(1, message(Scores, [new]), [], after)
    generations = {row.generation for column in join.take([sample]) for row in contents(column)}
    assert generations == ({2} if after > before else {1, 2})


def test_19_who_alone_keeps_its_state_is_at_another_step_than_those_who_were_rolled_back(tmp_path: Path):
    """The ledger of the checkpoint accepts step 1 again; the one that went on refuses it."""
    ledger = Ledger(tmp_path / "ledger.db")
    prompts = [sample_id(p, 0) for p in range(3)]
    for step, sample in enumerate(prompts):
        ledger.admit([sample], step, 1, step + 1)
        for state in ("scored", "batched"):
            ledger.move([sample], state)
        if step == 1:
            ledger.backup(tmp_path / "checkpoint.db")
        ledger.commit_step(step, 1, [sample])
    restored = Ledger(tmp_path / "checkpoint.db")
    assert (restored.version, restored.cursor, restored.restart_live(term=2)) == (1, 2, [prompts[1]])
    for state in ("scored", "batched"):
        restored.move([prompts[1]], state)
    restored.commit_step(1, 2, [prompts[1]])
    with pytest.raises(LedgerError, match="step 1 can't be committed at version 3"):
        ledger.commit_step(1, 2, [prompts[1]])
    for each in (ledger, restored):
        assert each.totals().imbalance == 0
        each.close()


# --- 20: stall


def stalled(rules: Rules) -> World:
    """A run in a deadlock, because a lease is held while waiting for credit."""
    for seed in range(25):
        world = World(Config("remax", "colocated", prompts=3), rules)
        try:
            in_any_order(world, seed)
        except Deadlock:
            if any(wait.what == "credit" for wait in world.waits()):
                return world
    raise AssertionError("no schedule stalls with a stage that waits for credit")


def test_20_the_graph_of_a_stall_leads_around_in_a_circle():
    """Every waiting part names the part that it waits for, which leads back to the first one."""
    world = stalled(Rules(kept_while_sending="lease"))
    board = WaitBoard()
    for waiting in world.waits():
        board.note(waiting)
    holders = {lease.pool: lease.holder.stage for lease in world.leases.values() if lease.holder is not None}
    graph = board.graph(now=60.0, holders=holders)
    assert any(line.startswith("policy.generate") and "credit on reward.score" in line for line in graph)
    assert any(line.startswith("reward.score") and "the lease on all, held by policy/0," in line for line in graph)
    waits_for = {w.who: holders.get(w.on, w.on) for w in world.waits()}
    waits_for["policy/0"] = next(w.who for w in world.waits() if w.what == "credit")  # the stage that it generates for
    seen, who = [], "policy/0"
    while who not in seen:
        seen.append(who)
        who = waits_for[who]
    assert who == "policy/0"


def test_20_a_stage_that_moves_on_leaves_the_graph():
    """The report of a stall shows current waits only."""
    board = WaitBoard()
    board.note(Waiting("reward.score#1", "rows", "policy.generate#1"))
    board.note(Waiting("reward.score#1"))
    assert board.graph(now=60.0) == []
