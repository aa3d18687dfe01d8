"""Run N random configurations of the simulation, or explore small ones exhaustively, and print the results.

python -m tests.asyncflow.simulation [N] [--first SEED] [--processes P]
python -m tests.asyncflow.simulation --exhaustive [--states MOST]
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.asyncflow.simulation.configuration import Config, Faults
from tests.asyncflow.simulation.exhaustive import explore
from tests.asyncflow.simulation.randomly import result_of, table

FOUR = ("grpo", "ppo", "remax", "safe_rlhf")

SPACES = [
    *(
        Config(algorithm, layout, prompts=prompts, samples=samples, staleness=staleness, steps=2)
        for algorithm in FOUR
        for layout in ("split", "colocated")
        for prompts in (1, 2)
        for samples in (1, 2)
        for staleness in (0, 1)
    ),
    *(
        Config(algorithm, layout, staleness=staleness, steps=2)
        for algorithm in FOUR
        for layout in ("mixed", "shared")
        for staleness in (0, 1)
    ),
    *(
        Config(algorithm, layout, steps=1, faults=faults)
        for algorithm in ("grpo", "ppo", "remax")
        for layout in ("split", "colocated")
        for faults in (Faults(failures=1), Faults(drops=1), Faults(duplicates=1), Faults(losses=1), Faults(restarts=1))
    ),
    *(Config("grpo", layout, samples=2, steps=1, faults=Faults(failures=1)) for layout in ("split", "colocated")),
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.asyncflow.simulation")
    parser.add_argument("runs", nargs="?", type=int, default=400)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--exhaustive", action="store_true", help="explore all orders of small configurations instead")
    parser.add_argument("--states", type=int, default=1_000_000, help="the largest number of states per configuration")
    given = parser.parse_args()
    start = time.monotonic()
    with ProcessPoolExecutor(given.processes) as pool:
        if given.exhaustive:
            wrong, cut = False, 0
            waiting = {pool.submit(explored_space, space, given.states): space for space in SPACES}
            for done in as_completed(waiting):
                explored = done.result()
                wrong |= explored.startswith("WRONG")
                cut += explored.startswith("cut")
                print(f"{waiting[done]!s:<60} {explored}", flush=True)
            print(f"spaces          {len(SPACES)}, {cut} of them incomplete")
        else:
            results = list(pool.map(result_of, range(given.first, given.first + given.runs), chunksize=25))
            wrong = any(r.wrong for r in results)
            print(table(results))
    print(f"seconds         {time.monotonic() - start:.0f}")
    return int(wrong)


def explored_space(config: Config, most_states: int) -> str:
    """The size of the explored space, or the first error."""
    start = time.process_time()
    try:
        seen = explore(config, most_states=most_states)
    except Exception as error:  # noqa: BLE001 - any error is this configuration's result
        return f"WRONG {type(error).__name__}: {error}"
    whole = "all" if seen.complete else "cut at"
    seconds = time.process_time() - start
    return f"{whole} {seen.states} states, {seen.transitions} transitions, {seconds:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
