"""The display of a running run: a live panel on a terminal, one plain line per event elsewhere.

controller -> Event -> Board (the state that the events add up to) -> panel or line -> console
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from asyncflow.observe.curves import MEMORY
from asyncflow.observe.memory import DEVICE, RESIDENT
from asyncflow.observe.sentences import one_line, sentence, tokens_per_second
from protocols.control.events import (
    CheckpointWritten,
    CodeRefused,
    CodeReloaded,
    Evaluated,
    Event,
    Published,
    RolledBack,
    RunEnded,
    RunStarted,
    SamplesEnded,
    SamplesShown,
    ServiceReplaced,
    ServiceSilent,
    Stalled,
    StateChanged,
    StepCommitted,
    WaitsChanged,
    Warned,
)

HISTORY = 40  # steps that the sparkline shows
WAITS = 8  # waits that the panel shows
REASONS = 4  # why samples ended untrained; the panel shows the most frequent reasons

_BLOCKS = "▁▂▃▄▅▆▇█"


@contextmanager
def live_view(console: Console) -> Iterator[Callable[[Event], None]]:
    """Show a run's events on a console: gives the function that shows one event, cheap enough for every event."""
    board, lock = Board(), threading.Lock()  # rich renders in a thread of its own, since time passes without events

    def current() -> RenderableType:
        with lock:
            return panel(board)

    shown = Live(console=console, refresh_per_second=4, get_renderable=current) if console.is_terminal else None
    with shown or nullcontext() as live:

        def show(event: Event) -> None:
            with lock:
                board.take(event)
            for line in lines_of(event, board, live is not None):  # above the panel, where they stay when it is gone
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield show


@dataclass
class Board:
    """The state of a run, folded from its events so far."""

    began: float = field(default_factory=time.monotonic)
    run: str = ""
    state: str = "starting"
    steps: int = 0
    committed: int = 0
    last: StepCommitted | None = None
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    evaluations: dict[str, tuple[float, float]] = field(default_factory=dict)  # metric -> first, last
    waits: WaitsChanged | None = None
    ended: dict[str, int] = field(default_factory=dict)  # "dropped: reason" -> samples

    def take(self, event: Event) -> None:
        """Update the board with one event."""
        match event:
            case RunStarted():
                self.run, self.steps, self.committed, self.state = event.run, event.steps, event.first_step, "running"
            case StepCommitted():
                self.last, self.committed = event, event.step
                self.rewards.append(event.reward_mean)
                self.seconds.append(event.seconds)
            case Evaluated():
                first, _ = self.evaluations.get(event.metric, (event.value, event.value))
                self.evaluations[event.metric] = (first, event.value)
            case WaitsChanged():
                self.waits = event
            case SamplesEnded():
                key = f"{event.state}: {event.reason}"
                self.ended[key] = self.ended.get(key, 0) + event.count
            case StateChanged():
                self.state = event.state
            case RunEnded():
                self.state, self.waits = event.outcome, None
            case Stalled() | Warned() | ServiceSilent() | SamplesShown():
                pass
            case CheckpointWritten() | Published() | ServiceReplaced() | RolledBack() | CodeReloaded() | CodeRefused():
                pass

    @property
    def seconds_left(self) -> float | None:
        """The rest of the run at the mean pace of the last steps; None before the first one."""
        return sum(self.seconds) / len(self.seconds) * (self.steps - self.committed) if self.seconds else None


def lines_of(event: Event, board: Board, on_panel: bool) -> Iterator[str]:
    """What is printed of an event; `on_panel`: beside a panel, which shows the steps. `board` includes the event."""
    shown = on_panel and isinstance(event, StepCommitted | RunStarted | Evaluated)
    if not shown and not isinstance(event, Published) and (line := sentence(event, board.steps)):
        yield line
    if isinstance(event, RunStarted):
        yield from (f"warning: {one_line(warning)}" for warning in event.warnings)


def panel(board: Board) -> RenderableType:
    """The board as a panel for a terminal."""
    body: list[RenderableType] = [_progress(board), Text(), _facts(board)]
    waits = sorted(board.waits.waits.items()) if board.waits else []
    if waits:
        body += [Text(), Text("who waits on whom", style="dim"), _waits(waits)]
    return Panel(Group(*body), title=Text(board.run or "asyncflow"), title_align="left", border_style="dim", width=88)


def _progress(board: Board) -> Table:
    row = Table.grid(padding=(0, 2, 0, 0))
    under_way = board.waits.step_progress if board.waits else 0.0
    done = min(board.committed + under_way, board.steps)
    elapsed = f"{_duration(time.monotonic() - board.began)} elapsed"
    left = f"{_duration(board.seconds_left)} left" if board.seconds_left and board.state == "running" else board.state
    bar = ProgressBar(total=max(board.steps, 1), completed=done, width=32)
    step = Text(f"step {board.committed}/{board.steps}", style="bold")
    row.add_row(step, bar, Text(f"{elapsed}, {left}", style="dim"))
    return row


def _facts(board: Board) -> Table:
    facts = Table.grid(padding=(0, 3, 0, 0))
    facts.add_column(style="dim", min_width=10)
    facts.add_column()
    if board.last is not None:
        step = board.last
        facts.add_row("reward", Text(f"{step.reward_mean:.4f}  ").append(sparkline(board.rewards), style="green"))
        facts.add_row("learning", _learning(step))
        if "response_length_mean" in step.metrics:
            facts.add_row("responses", _lengths(step.metrics))
        if "policy.mismatch_mean" in step.metrics:
            mean, largest = step.metrics["policy.mismatch_mean"], step.metrics["policy.mismatch_max"]
            facts.add_row("mismatch", f"engine and trainer differ by {mean:.1e} nats a token, {largest:.1e} at most")
    for metric, (first, last) in board.evaluations.items():
        facts.add_row("held out", Text(f"{metric} {last:.4f}, from {first:.4f}"))
    if board.last is not None:
        tokens = (
            board.waits.tokens_per_second
            if board.waits and board.waits.tokens_per_second
            else tokens_per_second(board.last)
        )
        staleness = f"staleness {board.last.staleness_max} versions at most, {board.last.staleness_mean:.2f} on average"
        facts.add_row("flow", f"{tokens:,.0f} tokens/s   {staleness}")
        if "tokens_total" in board.last.metrics:
            facts.add_row("trained", f"{board.last.metrics['tokens_total']:,.0f} tokens so far")
    if board.waits is not None:
        facts.add_row(
            "prompts", f"{board.waits.live_prompts} live   next batch {board.waits.step_progress:.0%} complete"
        )
    if board.last is not None and (memory := _memory(board.last.metrics)):
        facts.add_row("memory", memory)
    for reason, count in sorted(board.ended.items(), key=lambda item: -item[1])[:REASONS]:
        facts.add_row("samples", Text(f"{count} {reason}", style="yellow"))
    return facts


def _learning(step: StepCommitted) -> str:
    facts = [f"kl {step.kl:.4f}", f"loss {step.loss:+.4f}"]
    for name, key in (("entropy", "policy.entropy"), ("gradient norm", "policy.gradient_norm")):
        facts += [f"{name} {step.metrics[key]:.3g}"] if key in step.metrics else []
    return "   ".join(facts)


def _memory(metrics: Mapping[str, float]) -> str:
    """The memory of each service, the largest first: resident, and behind a plus of accelerators."""
    resident = {
        name.removeprefix(MEMORY).removesuffix(f"_{RESIDENT}"): nbytes
        for name, nbytes in metrics.items()
        if name.startswith(MEMORY) and name.endswith(f"_{RESIDENT}")
    }
    shown: list[str] = []
    for service, nbytes in sorted(resident.items(), key=lambda item: -item[1]):
        device = metrics.get(f"{MEMORY}{service}_{DEVICE}")
        shown.append(f"{service} {nbytes / 1e9:.1f}" + (f" + {device / 1e9:.1f}" if device else ""))
    return f"{', '.join(shown)} GB" if shown else ""


def _lengths(metrics: Mapping[str, float]) -> str:
    mean, p95, cut = (metrics[f"response_{name}"] for name in ("length_mean", "length_p95", "cut"))
    return f"{mean:,.1f} tokens, 95% have {p95:,.0f} at most, {cut:.0%} cut by max_tokens"


def _waits(waits: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(style="cyan")
    for stage, reason in waits[:WAITS]:
        table.add_row(Text(stage), Text(f"waits for {reason}"))
    if len(waits) > WAITS:
        table.add_row(Text(f"and {len(waits) - WAITS} more", style="dim"))
    return table


def sparkline(values: deque[float] | list[float]) -> str:
    """One block character per value, scaled from the lowest to the highest; a space where a value is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)


def _duration(seconds: float | None) -> str:
    whole = round(seconds or 0.0)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"
