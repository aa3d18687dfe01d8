"""User code is reloaded during a run: later rows use the new code, and no row is lost."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import asyncflow
from asyncflow.client.run import Run
from asyncflow.control.store.ledger import Ledger
from asyncflow.control.supervision.outcome import RunFailed
from asyncflow.control.user_code import UserCode
from asyncflow.observe.journal import read_lines
from asyncflow.recipe.config import BadInput, Recipe, recipe_text, to_recipe
from asyncflow.services.channels.endpoint import ServiceError
from protocols.control.events import CodeRefused, CodeReloaded, Event, RunEnded, StepCommitted

RULE = "def score(prompt, response, reference):\n    return {}\n"
OWN = '''
from asyncflow.dataflow.trace import Flow, algorithm
from protocols.data.messages import Experience, LogProbs, Rollouts, Scores
from protocols.stage import Measured
from workers.advantages.rloo import rloo as advantages
from workers.losses import policy_loss_named
from workers.losses.tokens import Surrogate

SCALE = 1.0

def scaled(
    rollouts: Rollouts, reference: LogProbs, scores: Scores, *, kl_coefficient: float = 0.0
) -> Measured[Experience]:
    """What the recipe's user thought of."""
    measured = advantages(rollouts, reference, scores, kl_coefficient=kl_coefficient)
    measured.metrics.values["scale"] = SCALE
    return measured

@algorithm(least_samples=2)
def own(flow: Flow) -> None:
    """RLOO under another name."""
    rollouts = flow.policy.generate(flow.prompts)
    joined = flow.join(rollouts, flow.reference.log_probs(rollouts), flow.reward.score(rollouts))
    flow.policy.update(joined.apply(scaled))

def loss(tokens, settings):
    plain = policy_loss_named("reinforce")(tokens, settings)
    return Surrogate(plain.loss * SCALE, plain.clipped)
'''
ALL_OWN: dict[str, Any] = {
    "algorithm": "users_file:own",
    "loss": {"policy": "users_file:loss"},
    "rule": "tests.asyncflow.pipeline.rules:varied",
}
MakeOf = Callable[..., Recipe]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's file, importable as `users_file`."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    yield folder / "users_file.py"
    sys.modules.pop("users_file", None)


@pytest.fixture
def recipe_of(table: dict[str, Any]) -> MakeOf:
    """A recipe of RLOO with a staleness of 2 and the reward of `users_file`."""

    def make(rule: str = "users_file:score", **changes: Any) -> Recipe:
        policy = {**table["models"]["policy"], "learning_rate": 1e-4}
        models = {"policy": policy, "reference": table["models"]["reference"], "reward": {"rule": rule}}
        asynchronous = {"staleness": 2, "deterministic": False, "data": {"train": table["data"]["train"]}}
        return to_recipe(
            table | {"algorithm": "rloo", "steps": 8, "advantage": {}} | asynchronous | changes | {"models": models}
        )

    return make


async def after(run: Run, step: int, act: Callable[[], Any], events: list[Event]) -> Any:
    """Follow a run to its end. Start `act` when a step is committed, and return its result."""
    acting: asyncio.Task[Any] | None = None
    async for event in run.events():
        events.append(event)
        if isinstance(event, StepCommitted) and event.step == step:
            acting = asyncio.create_task(act())
    assert acting is not None
    return await acting


def rewards(events: list[Event]) -> list[float]:
    return [event.reward_mean for event in events if isinstance(event, StepCommitted)]


def assert_all_trained(run: Run, events: list[Event]) -> None:
    ended = events[-1]
    assert isinstance(ended, RunEnded)
    assert ended.outcome == "finished", ended.error
    ledger = Ledger(run.folder / "ledger.db")
    totals, reasons = ledger.totals(), ledger.reasons()
    ledger.close()
    assert (totals.trained, totals.live, totals.imbalance) == (64, 0, 0)
    assert set(reasons) <= {("trained", ""), ("dropped", "run_ended")}


async def test_a_changed_reward_changes_later_rewards_only_and_loses_no_sample(own: Path, recipe_of: MakeOf):
    own.write_text(RULE.format(1.0))
    events: list[Event] = []
    async with asyncflow.launch(recipe_of()) as run:

        async def change() -> CodeReloaded:
            own.write_text(RULE.format(3.0))  # of the same length, and within the same second
            return await run.reload()

        reloaded = await after(run, 2, change, events)
    assert [event for event in events if isinstance(event, CodeReloaded)] == [reloaded]
    assert list(reloaded.digests) == ["users_file"]
    assert len(reloaded.digests["users_file"]) == 32
    seen = rewards(events)
    assert seen == sorted(seen)
    assert seen[: reloaded.step] == [1.0] * reloaded.step
    assert 2 <= reloaded.step < 8
    whole = reloaded.step + 3  # until then a batch may hold rows that were scored before
    assert whole > 7 or seen[whole:] == [3.0] * (8 - whole)
    assert seen[-1] > 1.0
    assert_all_trained(run, events)
    assert reloaded.digests["users_file"] in (run.folder / "logs" / "controller.log").read_text()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("def score(prompt, response, reference)\n    return 3.0\n", r"users_file\.py:1 raised SyntaxError"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("def rate(prompt, response, reference):\n    return 3.0\n", "has no function 'score'"),
        (RULE.format("response.upper"), "returned <built-in method upper"),
        (RULE.format("lenght(response)"), "NameError: name 'lenght' is not defined"),
        (
            "def score(response, reference, difficulty, kind):\n    return 3.0\n",
            r"users_file:score asks for difficulty, kind, .* for every row of .*train\.jsonl: .* \(no other column\)",
        ),
    ],
)
async def test_a_file_with_an_error_is_refused_and_the_old_code_runs_on(
    own: Path, recipe_of: MakeOf, text: str, complaint: str
):
    own.write_text(RULE.format(1.0))
    events: list[Event] = []
    async with asyncflow.launch(recipe_of()) as run:

        async def change() -> None:
            own.write_text(text)
            with pytest.raises(BadInput, match=complaint):
                await run.reload()

        await after(run, 2, change, events)
    refused = [event for event in events if isinstance(event, CodeRefused)]
    assert len(refused) == 1
    assert "users_file" in refused[0].digests
    assert rewards(events) == [1.0] * 8
    assert_all_trained(run, events)


async def test_a_corrected_file_is_taken_and_an_unchanged_one_is_nothing_new(own: Path, recipe_of: MakeOf):
    own.write_text(RULE.format(1.0))
    events: list[Event] = []
    async with asyncflow.launch(recipe_of()) as run:

        async def change() -> None:
            assert (await run.reload()).digests == {}
            own.write_text("1 +")
            with pytest.raises(BadInput, match="SyntaxError"):
                await run.reload()
            own.write_text(RULE.format(2.0))
            assert list((await run.reload()).digests) == ["users_file"]

        await run.pause()
        following = asyncio.create_task(after(run, 1, _nothing, events))
        await change()  # a paused run reloads, too
        await run.resume()
        await following
    assert set(rewards(events)) == {2.0}
    assert_all_trained(run, events)


async def test_an_algorithm_and_its_loss_change_in_one_file(own: Path, recipe_of: MakeOf):
    own.write_text(OWN)
    events: list[Event] = []
    async with asyncflow.launch(recipe_of(**ALL_OWN)) as run:

        async def change() -> CodeReloaded:
            own.write_text(own.read_text().replace("SCALE = 1.0", "SCALE = 0.0"))
            return await run.reload()

        reloaded = await after(run, 2, change, events)
    steps = [event.metrics for event in events if isinstance(event, StepCommitted)]
    scales = [metrics["scale"] for metrics in steps]
    assert scales == [1.0] * reloaded.step + [0.0] * (8 - reloaded.step), "from that step on, as a batch closes whole"
    assert [metrics["policy.gradient_norm"] > 0 for metrics in steps] == [scale > 0 for scale in scales]
    assert_all_trained(run, events)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (", flow.reward.score(rollouts))", ", flow.reward.score(rollouts)).where", "AttributeError"),
        ("least_samples=2", "least_samples=1", "declares other defaults"),
        ("flow.policy.update(joined", "flow.policy.log_probs(rollouts)\n    flow.policy.update(joined", "log_probs"),
        ("def scaled", "def other_name(x):\n    pass\n\ndef scales", "NameError: name 'scaled'"),
        ("kl_coefficient: float = 0.0", "beta: float = 0.0", "no longer takes kl_coefficient"),
        (
            "kl_coefficient: float = 0.0\n",
            "kl_coefficient: float = 0.0, gain: float\n",
            "needs gain; give it a default",
        ),
        ("plain.loss * SCALE", "plain.loss.sum()", "returned shapes"),
        ("Surrogate(plain.loss", "(plain.loss", "it returned tuple, want a Surrogate"),
        ("plain.loss * SCALE", "plain.loss.detach()", "failed its check with RuntimeError"),
    ],
)
async def test_an_algorithm_that_is_wired_otherwise_and_a_loss_that_fails_are_refused(
    own: Path, recipe_of: MakeOf, old: str, new: str, complaint: str
):
    own.write_text(OWN)
    assert old in OWN
    async with asyncflow.launch(recipe_of(**ALL_OWN | {"steps": 3})) as run:
        own.write_text(own.read_text().replace(old, new))
        with pytest.raises(BadInput, match=complaint):
            await run.reload()
        assert (await run.wait()).outcome == "finished"


async def test_a_reload_of_an_ended_run_fails(own: Path, recipe_of: MakeOf):
    own.write_text(RULE.format(1.0))
    async with asyncflow.launch(recipe_of(steps=1)) as run:
        await run.wait()
        with pytest.raises(RunFailed, match="the run is over"):
            await run.reload()


async def test_a_reload_that_ends_the_run_fails_with_the_cause(
    own: Path, recipe_of: MakeOf, monkeypatch: pytest.MonkeyPatch
):
    async def give(*_: object) -> None:
        raise ServiceError("reward: SwitchCode: its ranks are out of step")

    monkeypatch.setattr(UserCode, "give", give)
    own.write_text(RULE.format(1.0))
    async with asyncflow.launch(recipe_of()) as run:
        await run.pause()
        own.write_text(RULE.format(2.0))
        async with asyncio.timeout(30):
            with pytest.raises(RunFailed, match="its ranks are out of step"):
                await run.reload()


async def _nothing() -> None:
    return None


def test_a_signal_reloads_a_run_of_the_command_line(recipe_of: MakeOf, own: Path, tmp_path: Path):
    own.write_text(RULE.format(1.0))
    recipe, folder = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(recipe_text(recipe_of(steps=10_000, checkpoints={"every": 0})))
    command = [sys.executable, "-m", "asyncflow.cli.main", "run", str(recipe), "--folder", str(folder)]
    paths = os.pathsep.join([str(own.parent), str(Path(asyncflow.__file__).parent.parent)])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL)
    try:
        wait_for_reward(process, folder, 1.0)
        own.write_text(RULE.format(2.0))
        process.send_signal(signal.SIGUSR1)
        wait_for_reward(process, folder, 2.0)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()


def wait_for_reward(process: subprocess.Popen[bytes], folder: Path, reward: float) -> None:
    deadline = time.monotonic() + 180
    while not any(line["reward_mean"] == reward for line in read_lines(folder / "metrics.jsonl")):
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        assert time.monotonic() < deadline, f"no step had a mean reward of {reward}"
        time.sleep(0.05)
