"""Settings of the controller: the pace of a run, its checkpoints, its evaluations and its deadlines."""

from __future__ import annotations

import msgspec

from workers.settings import Finite, NonNegative, NonNegativeInt, Positive, PositiveInt, Settings, Share


class Checkpoints(Settings, frozen=True):
    """When the state is written, and how many checkpoints are kept."""

    every: NonNegativeInt = 10  # steps; 0: only at the end and on request
    keep: NonNegativeInt = 2  # the newest ones; 0: all


class Evaluation(Settings, frozen=True):
    """Answers to the held-out prompts, scored by metrics; a set of `data.eval` may have its own settings.

    Each metric is one curve, the mean score of all answers. With several answers to a prompt each pass@k is another:
    the probability that at least one of k answers passes.
    """

    # A rule's name or "package.module:function", or "reward" for the score of the run's reward; or a list of them.
    metric: str | list[str] = "exact_match"
    every: NonNegativeInt = 0  # steps; 0: only before the first and after the last
    limit: NonNegativeInt = 0  # rows of the held-out file; 0: all
    samples: PositiveInt = 1  # answers to each prompt; of each version the same random numbers draw them
    temperature: NonNegative = 0.0  # 0: greedy, the likeliest token at each place
    top_p: Share = 1.0  # as generation.top_p, which does not apply here
    top_k: NonNegativeInt = 0  # as generation.top_k, which does not apply here
    # The k of pass@k, at most `samples`; none: `samples`, where that is more than 1.
    pass_at: list[PositiveInt] = msgspec.field(default_factory=list)
    pass_score: Finite = 1.0  # an answer with this score or more passes


class EvaluationData(Settings, frozen=True, omit_defaults=True):
    """One set of held-out rows, and what is otherwise for it than [evaluation] says."""

    path: str  # a file or folder of rows
    prompt: str = ""  # as data.prompt; "": that one
    reference: str = ""  # as data.reference; "": that one
    metric: str | list[str] | None = None  # none: evaluation.metric
    limit: NonNegativeInt | None = None  # none: evaluation.limit
    samples: PositiveInt | None = None  # none: evaluation.samples
    temperature: NonNegative | None = None  # none: evaluation.temperature
    top_p: Share | None = None  # none: evaluation.top_p
    top_k: NonNegativeInt | None = None  # none: evaluation.top_k
    pass_at: list[PositiveInt] | None = None  # none: evaluation.pass_at
    pass_score: Finite | None = None  # none: evaluation.pass_score


class Deadlines(Settings, frozen=True):
    """How long something may take before it is reported or ended, in seconds."""

    publish: Positive = 120.0  # one publication of weights
    checkpoint: Positive = 600.0  # writing one checkpoint
    stall: Positive = 120.0  # without progress: the wait-for graph is shown
    give_up: Positive = 900.0  # without progress: the run ends and shows the wait-for graph
    # Without an answer of a service's process, busy or not: it is reported, and ended and replaced where it trains
    # nothing; one that trains is ended after give_up.
    answer: Positive = 60.0
    # Draining after a stop is requested. Then a step that no model has finished is given up, and trained again by a
    # resume; one that a model has finished is waited for.
    stop: Positive = 60.0


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a run, in steps, prompts and samples."""

    steps: int
    prompts_per_step: int
    samples_per_prompt: int
    staleness: int
    deterministic: bool = False  # the prompts of a step are generated together, one step at a time
    compares_samples: bool = False  # the algorithm does, within each prompt
    max_refills: int  # rounds of replaced prompts in one step before the run ends and reports the reject rate
