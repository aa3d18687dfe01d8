"""What each scheduling rule prevents: the smallest run that fails without the rule, and the same run with it.

The numbers are those of the rules. A variant in `broken` removes a rule; the same configuration under the same
schedules then shows a deadlock or an exceeded bound. Rules 16 to 20 are in `test_rules_of_runs`.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from protocols.data.ids import prompt_of
from tests.asyncflow.simulation import broken
from tests.asyncflow.simulation.configuration import Config, Faults
from tests.asyncflow.simulation.network import Action
from tests.asyncflow.simulation.rules import Rules
from tests.asyncflow.simulation.schedulers import Chosen, by_durations, directed, in_any_order, never
from tests.asyncflow.simulation.world import THE_REAL_RULES, World

SCHEDULES = 25

Schedule = Callable[[World, int], World]


def by_chance(world: World, seed: int) -> World:
    """Random order or durations, with occasional faults if the configuration has any."""
    rate = 0.2 if world.config.faults != Faults() else 0.0
    return (by_durations if seed % 2 else in_any_order)(world, seed, rate)


def on_purpose(late: Chosen = never, strike: Chosen = never) -> Schedule:
    """See `directed`."""
    return lambda world, seed: directed(world, seed, late, strike)


def findings(config: Config, rules: Rules, schedule: Schedule) -> set[str]:
    """The errors of the run under a number of schedules."""
    found = set()
    for seed in range(SCHEDULES):
        try:
            schedule(World(config, rules), seed)
        except Exception as error:  # noqa: BLE001 - the test checks which error it is
            found.add(f"{type(error).__name__}: {error}")
    return found


def shows(config: Config, without: Rules, wrong: str, schedule: Schedule = by_chance) -> None:
    """Without the rule the error `wrong` occurs, and no other; with the rule none does."""
    found = findings(config, without, schedule)
    assert found
    assert {message for message in found if wrong not in message} == set()
    assert findings(config, THE_REAL_RULES, schedule) == set()


# --- 1, 2: joins and the window


def test_1_a_join_with_credit_per_edge_waits_for_the_row_that_another_edge_keeps_out():
    config = Config("remax", staleness=1)
    shows(config, Rules(join_room=broken.credit(1)), "Deadlock")
    assert findings(msgspec.structs.replace(config, staleness=0), Rules(join_room=broken.credit(1)), by_chance) == set()


def test_1_a_join_has_to_hold_all_of_the_window():
    """W * n rows of credit are enough, and one less is not."""
    config = Config("remax", prompts=2, samples=1, staleness=1)
    assert findings(config, Rules(join_room=broken.credit(4)), by_chance) == set()
    assert any("Deadlock" in found for found in findings(config, Rules(join_room=broken.credit(3)), by_chance))


def test_2_a_window_smaller_than_a_batch_waits_for_ever_where_trained_prompts_alone_make_room():
    """With the rule a prompt frees its place when its last row is at the join, so that a window of 1 is only slow."""
    config = Config("grpo", prompts=2, window=1)
    shows(config, Rules(admission=broken.KeepsSlotsUntilTrained), "Deadlock")


# --- 3, 4: waiting and firing


def test_3_a_lease_held_while_waiting_for_credit_keeps_out_who_would_give_it():
    shows(Config("remax", "mixed", staleness=1, steps=3), Rules(kept_while_sending="lease"), "Deadlock")
    shows(Config("remax", "colocated", prompts=3), Rules(kept_while_sending="lease"), "Deadlock")


def test_3_a_service_held_while_waiting_for_credit_keeps_out_its_own_next_stage():
    config = Config("ppo_prox", "colocated", prompts=3)
    shows(config, Rules(kept_while_sending="thread"), "Deadlock")


def test_3_a_delivery_larger_than_the_mailbox_is_let_into_an_empty_one():
    shows(Config("grpo", staleness=1), Rules(has_room=broken.exactly_room), "Deadlock")


def test_4_a_minimum_waits_for_rows_that_never_come():
    shows(Config("grpo"), Rules(fires_on=2), "Deadlock")


# --- 5, 6, 7: failures, their unit, and what they give back


def test_5_a_failed_row_that_vanishes_is_waited_for():
    shows(Config("grpo", faults=Faults(failures=1)), Rules(tombstones=False), "Deadlock")


def test_5_a_baseline_that_failed_ends_its_prompt():
    """Otherwise its samples would be trained against a missing baseline."""
    config = Config("remax", faults=Faults(failures=1))
    shows(config, Rules(prompt_join=broken.BlindToBaselines), "concat needs at least one batch")


def test_6_a_budget_in_samples_is_left_with_a_hole_that_no_group_fits():
    shows(Config("grpo", samples=2, faults=Faults(failures=1)), Rules(admission=broken.CountsSamples), "Deadlock")


def test_7_a_failed_prompt_that_stays_in_the_budget_is_never_replaced():
    shows(Config("grpo", faults=Faults(failures=1)), Rules(admission=broken.KeepsTheBudgetOfTheDead), "Deadlock")


def test_7_a_slot_freed_at_the_first_death_lets_more_be_in_flight_than_the_window():
    config = Config("grpo", samples=2, faults=Faults(failures=2))
    shows(config, Rules(prompt_join=broken.SettlesAtTheFirstDeath), "generating: 3 at policy.generate#1, at most 2")


def test_7_a_dropped_prompt_leaves_the_join_before_the_budget():
    """Otherwise the join would hold its rows and those of the prompt that replaces it."""
    late = on_purpose(
        late=lambda world, action: action == Action("advantage", "end"),
        strike=lambda world, action: action.verb == "drop",
    )
    shows(Config("grpo", faults=Faults(drops=1)), Rules(join_hears_first=False), "join, all: 2", late)


# --- 8, 9, 10, 11: batches


def last_turn(world: World, action: Action) -> bool:
    """A straggler's row takes its last engine step; its first one was not delayed."""
    engine = world.engines[0]
    return (
        action.verb == "decode"
        and prompt_of(action.item) in world.config.stragglers
        and engine.running[action.item].turns == 1
    )


straggling = on_purpose(late=last_turn)


def test_8_ages_against_an_earlier_version_let_a_sample_be_trained_too_old():
    config = Config("grpo", staleness=1, steps=3, turns=2, stragglers=(1,))
    shows(config, Rules(inflight_prompts=broken.AgesAgainstYesterday), "2 versions old at step 2, bound 1", straggling)


def test_9_the_newest_first_leave_the_oldest_to_batches_that_can_not_take_them():
    config = Config("grpo", staleness=1, steps=3, turns=2, stragglers=(1,))
    shows(config, Rules(inflight_prompts=broken.NewestFirst), "Deadlock", straggling)


def test_10_two_stragglers_fall_due_together():
    """Nothing is due at step 1, which trains a fresh prompt; at step 2 both are due and the batch has room for one."""
    config = Config("grpo", staleness=2, steps=4, turns=2, stragglers=(1, 2))
    shows(config, Rules(inflight_prompts=broken.LooksAtWhatIsDueNow), "Deadlock", straggling)


def test_11_a_version_that_rises_when_the_policy_is_done_has_values_of_an_older_critic():
    slow_critic = on_purpose(late=lambda world, action: action.who == "critic.update#1")
    shows(Config(), Rules(rises_after="policy"), "is 1 versions old at step 1, bound 0", slow_critic)


def a_late_straggler(world: World, action: Action) -> bool:
    """The straggler completes after the policy's update has begun and before the critic's."""
    return last_turn(world, action) if world.controller.training is None else action.who == "critic.update#1"


def test_11_trainers_that_each_form_their_own_batch_train_different_rows():
    """An older prompt settles after the first trainer has begun."""
    config = Config(staleness=1, steps=3, turns=2, stragglers=(0,))
    late = on_purpose(late=a_late_straggler)
    shows(config, Rules(one_batch=False), "trains other rows than", late)


# --- 12, 13, 14, 15: versions, leases, grains


def test_12_a_lease_held_until_the_weights_are_out_keeps_the_generator_from_loading_them():
    shows(Config("grpo", "shared"), Rules(update_keeps_lease=True), "Deadlock")


def test_12_weights_that_go_out_after_their_commit_are_those_of_a_later_step():
    """The commit lets the next step begin, which changes the weights before the snapshot."""
    slow = on_purpose(late=lambda world, action: action.verb == "publish late")
    shows(
        Config("grpo", staleness=1), Rules(publishes_first=False), "weights of step 2 are published as version 1", slow
    )


def test_13_without_a_min_version_a_slow_replica_generates_with_weights_from_before_the_admission():
    slow = on_purpose(late=lambda world, action: action.who == "generator/1" and action.verb == "load")
    shows(Config("grpo", replicas=2), Rules(min_version="nowhere"), "is 1 versions old at step 1, bound 0", slow)


def test_13_a_row_that_waits_for_its_min_version_in_a_slot_keeps_out_the_load_that_it_waits_for():
    config = Config("grpo", replicas=2)
    without = Rules(min_version="in the slot", loads="when idle")
    slow = on_purpose(late=lambda world, action: action.who == "generator/1" and action.verb == "load")
    assert any("Deadlock" in found for found in findings(config, without, slow))
    assert findings(config, Rules(loads="when idle"), slow) == set(), "the version is checked before the slot"
    assert findings(config, Rules(min_version="in the slot"), slow) == set(), "loads preempt running rows"


def test_13_loads_in_any_order_take_a_replica_back():
    slow = on_purpose(late=lambda world, action: action.who == "generator/1" and action.verb == "load")
    shows(Config("grpo", steps=3, replicas=2), Rules(loads="in any order"), "versions: generator/1 goes from", slow)


def test_14_the_last_to_come_is_not_served_first():
    config = Config("ppo", "colocated", samples=2, staleness=1, steps=3, firing_rows=1)
    shows(config, Rules(leases=broken.last_come_first_served), "grants before one's own")


def test_15_a_row_that_comes_once_a_prompt_is_not_waited_for_once_a_sample():
    shows(Config("remax"), Rules(prompt_join=broken.WithoutGrain), "Deadlock")


# --- delivery: duplicates, late and lost deliveries, restarts


def test_a_row_that_left_is_remembered_or_it_is_generated_twice():
    config = Config("grpo", faults=Faults(duplicates=1))
    twice = on_purpose(strike=lambda world, action: action.verb == "duplicate")
    shows(config, Rules(row_table=broken.ForgetsWhatLeft), "generating: 2", twice)


def test_a_prompt_that_ended_is_remembered_or_late_rows_stay_forever():
    config = Config("grpo", faults=Faults(duplicates=1))

    def copy(world: World, action: Action) -> bool:
        delivery = world.network.flights.get(action.item) if action.who in ("network", "chance") else None
        return delivery is not None and delivery.edge == "reward.score#1.0"

    def had(world: World, action: Action) -> bool:
        stage = world.row_stage("reward.score#1")
        return copy(world, action) and not stage.table.fresh(0, world.network.flights[action.item].samples)

    late = on_purpose(late=had, strike=copy)
    shows(config, Rules(row_table=broken.ForgetsWhatEnded), "leak", late)


def dies(name: str, when: Callable[[World], bool] = lambda world: True) -> Chosen:
    """Strike this service as soon as `when` holds."""
    return lambda world, action: action.verb == "restart" and action.item == name and when(world)


def test_an_outbox_is_kept_until_its_prompts_end():
    """An accepted row is not safe: its mailbox dies with the receiving process."""
    config = Config("grpo", faults=Faults(restarts=1))
    holding = dies("reward", lambda world: world.row_stage("reward.score#1").phase == "working")
    shows(config, Rules(outbox=broken.LetsGoOfWhatWasTaken), "Deadlock", on_purpose(strike=holding))


def test_regenerated_rows_have_an_attempt_of_their_own():
    """Otherwise the reward of one generation would be joined with the tokens of another."""
    config = Config("grpo", faults=Faults(restarts=1))
    half_joined = on_purpose(
        late=lambda world, action: action.who == "reward.score#1",
        strike=dies("generator", lambda world: world.closing.join.depth > 0),
    )
    shows(config, Rules(new_attempts=False), "mixed: batch", half_joined)


def unread(world: World) -> bool:
    """The reviser holds a row of the scorer that it has not read."""
    return len(world.row_stage("reviser.revise#1").table) > 0


@pytest.mark.parametrize(
    "without", [Rules(asks_again=False), Rules(row_table=broken.NeverTakesBack)], ids=["unasked", "not taken back"]
)
def test_unreadable_rows_are_taken_back_and_requested_again(without: Rules):
    """The successor's row arrived while its predecessor's held its place: it was refused and is not sent again."""
    config = Config("middle_join", faults=Faults(restarts=1))
    slow_reviser = on_purpose(
        late=lambda world, action: action.who == "reviser.revise#1", strike=dies("scorer", unread)
    )
    shows(config, without, "Deadlock", slow_reviser)


def test_a_successor_is_told_which_prompts_are_over():
    """Otherwise it keeps forever the rows that a sender, which has not read the notice either, sends again."""
    config = Config("grpo", faults=Faults(restarts=1))
    deaf_generator = on_purpose(
        late=lambda world, action: action == Action("generator", "end"),
        strike=dies("reward", lambda world: world.controller.version == 1 and not world.services["reward"].to_end),
    )
    shows(config, Rules(tells_ended=False), "leak", deaf_generator)


def test_prompts_of_a_join_that_died_are_incomplete_again():
    config = Config("grpo", prompts=2, faults=Faults(restarts=1))
    half_a_batch = on_purpose(strike=dies("advantage", lambda world: world.controller.inflight.ready == 1))
    shows(config, Rules(inflight_prompts=broken.NeverMarksIncomplete), "KeyError", half_a_batch)


def test_a_trainer_takes_each_step_once():
    config = Config("grpo", faults=Faults(duplicates=1))
    twice = on_purpose(
        strike=lambda world, action: (
            action.verb == "duplicate" and world.network.flights[action.item].edge == "policy.update#1.0"
        )
    )
    shows(config, Rules(trains_once=False), "doubled: policy.update#1 trains step 0 again", twice)
