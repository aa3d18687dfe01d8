"""Events of a run as sentences, for its log and for a person who follows it on a console."""

from __future__ import annotations

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


def sentence(event: Event, steps: int) -> str | None:  # noqa: PLR0912 - one case per event
    """An event in one line; None for the waits, which change all the time, and texts. `steps`: of the whole run."""
    match event:
        case RunStarted():
            resumed = f", {event.first_step} of them done before" if event.first_step else ""
            line = f"run {event.run}: {event.steps} steps{resumed}, in {event.folder}"
        case StepCommitted():
            line = (
                f"step {event.step}/{steps}  reward {event.reward_mean:.4f}  kl {event.kl:.4f}  "
                f"loss {event.loss:+.4f}  staleness {event.staleness_max}  samples {event.samples}  "
                f"{tokens_per_second(event):.0f} tokens/s  {event.seconds:.2f} s"
            )
        case Evaluated():
            line = f"evaluation at step {event.step}: {event.metric} {event.value:.4f} over {event.samples} samples"
        case CheckpointWritten():
            line = (
                f"checkpoint of step {event.step}: {event.path}, {event.nbytes / 1e6:.1f} MB in {event.seconds:.2f} s"
            )
        case Published():
            proofs = [f"probe differs by {receipt.probe_difference:.2g}" for receipt in event.receipts]
            megabytes = f"{event.nbytes / 1e6:.1f} MB in {event.seconds:.2f} s"
            line = f"version {event.version} published: {megabytes}, {', '.join(proofs) or 'to no engine'}"
        case SamplesEnded():
            line = f"{event.count} samples {event.state}: {one_line(event.reason)}"
        case ServiceReplaced():
            line = (
                f"{event.service} died and was replaced in {event.seconds:.1f} s: {one_line(event.cause)}; "
                f"its log: logs/{event.service}.log"
            )
        case RolledBack():
            lost = f", {event.lost_steps} steps are made again" if event.lost_steps else ""
            line = (
                f"{' and '.join(event.services)} died: back to step {event.step} in {event.seconds:.1f} s{lost}: "
                f"{one_line(event.cause)}"
            )
        case ServiceSilent():
            ended = ", so it is killed" if event.ended else ""
            line = f"{event.service} has not answered for {event.seconds:.0f} s{ended}"
        case CodeReloaded():
            files = [f"{module} {digest}" for module, digest in event.digests.items()]
            line = f"code reloaded after step {event.step}: {', '.join(files) or 'no file changed'}"
        case CodeRefused():
            line = f"code refused after step {event.step}, the old code stays in use: {one_line(event.error)}"
        case StateChanged():
            line = f"the run is {event.state}"
        case Stalled():
            line = f"no progress for {event.seconds:.0f} s: " + "; ".join(event.graph)
        case Warned():
            line = f"warning: {event.text}"
        case RunEnded():
            cause = f": {event.error}" if event.error else ""
            line = f"run {event.outcome} after step {event.step}{cause}"
        case WaitsChanged() | SamplesShown():
            line = None
    return line


def one_line(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.split())


def tokens_per_second(step: StepCommitted) -> float:
    """The rate at which a step's response tokens came, over its whole time."""
    return step.tokens_generated / step.seconds if step.seconds else 0.0
