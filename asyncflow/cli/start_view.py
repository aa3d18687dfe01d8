"""What a terminal shows while a run starts: the phase, and which services load. Elsewhere one line at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from asyncflow.run.start_progress import StartProgress


@contextmanager
def start_view(console: Console, progress: StartProgress | None) -> Iterator[Callable[[], None]]:
    """Show a start until the block ends, or the function that it gives is called: the run has started.

    Nothing is shown where there is no `progress`.
    """
    if progress is None:
        yield lambda: None
        return
    live = Live(
        console=console,
        transient=True,
        refresh_per_second=4,
        get_renderable=lambda: current(progress, time.monotonic()),
    )
    if console.is_terminal:
        live.start()

    def started() -> None:
        live.stop()
        console.print(summary(progress), markup=False, highlight=False, soft_wrap=True)

    try:
        yield started
    finally:
        live.stop()


def current(progress: StartProgress, now: float) -> Text:
    """The start as it is; `now` in seconds of time.monotonic()."""
    text = Text(f"{progress.phase}  ").append(f"{now - progress.began:.0f} s", style="dim")
    for service, load in list(progress.loads.items()):
        state = f"loads, {now - load.began:.0f} s" if load.seconds is None else f"ready after {load.seconds:.1f} s"
        text.append(f"\n  {service:<12} ", style="cyan").append(state, style="" if load.seconds is None else "dim")
    return text


def summary(progress: StartProgress) -> str:
    """The whole start in one line, the slowest services first."""
    loads = sorted(progress.loads.items(), key=lambda item: -(item[1].seconds or 0.0))
    services = ", ".join(f"{service} {load.seconds or 0.0:.1f} s" for service, load in loads)
    return f"started in {time.monotonic() - progress.began:.1f} s: {services}"
