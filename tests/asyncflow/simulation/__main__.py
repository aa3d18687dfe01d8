"""Run N random configurations of the rules of time, or explore small ones whole, and print what they showed.

python -m tests.asyncflow.simulation [N] [--first SEED] [--processes P]
python -m tests.asyncflow.simulation --exhaustive [--states MOST]
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.asyncflow.simulation.configuration import Config, Faults
from tests.asyncflow.simulation.exhaustive import AtOnce, Explored, all_but_work, explore, nothing, what_is_local
from tests.asyncflow.simulation.randomly import result_of, table

RESTART = Faults(restarts=1)

# More than a suite has time for.
SPACES: list[tuple[AtOnce, Config]] = [
    (nothing, Config("ppo", "split", steps=2)),
    (nothing, Config("ppo", "colocated", steps=1, faults=RESTART)),
    (nothing, Config("ppo", "split", steps=1, faults=Faults(duplicates=1))),
    (nothing, Config("remax", "split", steps=1, faults=Faults(failures=1))),
    (what_is_local, Config("ppo", "split", steps=1, faults=RESTART)),
    (what_is_local, Config("remax", "split", steps=1, faults=RESTART)),
    (what_is_local, Config("ppo", "split", steps=1, prompts=2)),
    (what_is_local, Config("ppo", "split", steps=1, samples=2)),
    (what_is_local, Config("remax", "colocated", steps=1, prompts=2)),
    *(
        (all_but_work, Config(algorithm, layout, prompts=prompts, samples=samples, staleness=1, steps=2))
        for algorithm in ("ppo", "remax")
        for layout in ("split", "colocated")
        for prompts, samples in ((1, 1), (1, 2), (2, 1), (2, 2))
    ),
    *(
        (all_but_work, Config(algorithm, layout, steps=2, faults=Faults(failures=1, drops=1, restarts=1)))
        for algorithm in ("ppo", "remax")
        for layout in ("split", "colocated")
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.asyncflow.simulation")
    parser.add_argument("runs", nargs="?", type=int, default=400)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--exhaustive", action="store_true", help="all orders of small configurations instead")
    parser.add_argument("--states", type=int, default=100_000, help="most states of one configuration")
    given = parser.parse_args()
    start = time.monotonic()
    with ProcessPoolExecutor(given.processes) as pool:
        if given.exhaustive:
            wrong = False
            waiting = {pool.submit(explored_space, *space, given.states): space for space in SPACES}
            for done in as_completed(waiting):
                (at_once, config), explored = waiting[done], done.result()
                wrong |= isinstance(explored, str)
                print(f"{at_once.__name__:<14} {config}\n  {explored}", flush=True)
        else:
            results = list(pool.map(result_of, range(given.first, given.first + given.runs), chunksize=25))
            wrong = any(r.wrong for r in results)
            print(table(results))
    print(f"seconds         {time.monotonic() - start:.0f}")
    return int(wrong)


def explored_space(at_once: AtOnce, config: Config, most_states: int) -> Explored | str:
    """What there was, or what was wrong."""
    try:
        return explore(config, at_once=at_once, most_states=most_states)
    except Exception as error:  # noqa: BLE001 - it is this configuration's finding
        return f"WRONG {type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
