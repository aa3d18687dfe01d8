"""Start a run on a server, follow it, stop it early: python drive_a_run.py http://127.0.0.1:8642 recipe.toml

The token is read from ASYNCFLOW_TOKEN. It needs `asyncflow[client]` only, neither torch nor Ray.
"""

import asyncio
import sys

import asyncflow
from protocols.control.events import StepCommitted


async def main(url: str, recipe: str) -> None:
    async with asyncflow.connect(url) as client:
        run = await client.submit(recipe)
        async for event in run.events():
            if isinstance(event, StepCommitted):
                print(f"step {event.step}: reward {event.reward_mean:.3f}", flush=True)
                if event.step == 2:
                    await run.drain()
        print(f"{run.name}: {(await run.wait()).outcome}")


asyncio.run(main(*sys.argv[1:]))
