"""ReservedPools reserves the devices of a run's pools on Ray: a placement group per pool, a bundle per device.

Services run in the bundles of their pool, and a bundle belongs to one pool, so pools never overlap. A device is an
accelerator, or on a machine without one a CPU slot: a quarter of a core in Ray's accounting, since slots time-share the
cores anyway. A request beyond the cluster's devices is refused with the numbers, before any model loads. Devices that
others hold are waited for, which is told.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec
import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from asyncflow.services.channels.endpoint import ServiceError
from asyncflow.services.ranks.spec import ServiceSpec
from asyncflow.services.runtime import CPU_SLOT, SLOTS_PER_CORE

GROUP = "asyncflow/"  # the name of a run's placement group begins so
NO_DEVICE: Mapping[str, Any] = MappingProxyType({"num_cpus": 0})  # options of an actor without a device
RESERVE_SECONDS = 120.0  # how long to wait for devices that another run is about to release
TELL_SECONDS = 3.0  # a longer wait is told
_LOOK_SECONDS = 1  # Ray takes whole seconds; a cancelled start is held up for no longer
TYPE_AMOUNT = 0.001  # of a resource that only names the type of a node's accelerators

ACCELERATORS = {  # device -> the accelerator type that Ray detects on a node
    "A100-80G": "A100",
    "H100": "H100",
    "H200": "H200",
    "MI300X": "AMD-Instinct-MI300X-OAM",
}


class PoolRequest(msgspec.Struct, frozen=True):
    """A pool's devices, all of one kind."""

    devices: int
    device: str = ""  # "A100-80G", ..., "cpu-slot"; "": an accelerator if the cluster has any, else a CPU slot


class ReservedPools:
    """The pools of one run, from `reserve` to `release`."""

    def __init__(self, requests: Mapping[str, PoolRequest]) -> None:
        self._requests = dict(requests)
        self._groups: dict[str, PlacementGroup] = {}
        self._bundles: dict[str, dict[str, float]] = {}
        self._tenants: Counter[tuple[str, int]] = Counter()  # (pool, bundle) -> actors that share it

    async def reserve(self, specs: Sequence[ServiceSpec], tell: Callable[[str], None]) -> None:
        """Reserve the devices. What it has to wait for is told, once.

        Raises ServiceError, with the numbers, if the cluster does not have them, or not in time.
        """
        if not self._requests:
            return
        total = ray.cluster_resources()
        self._bundles = {name: bundle_of(request, total) for name, request in self._requests.items()}
        refuse_shortage(self._requests, self._bundles, total)
        for spec in specs:
            for rank in range(spec.topology.world_size):
                if place := self._place(spec, rank):
                    self._tenants[place] += 1
        try:
            for name, request in self._requests.items():
                bundles = [self._bundles[name]] * request.devices
                own = f"{GROUP}{specs[0].run if specs else ''}/{name}/{secrets.token_hex(4)}"
                self._groups[name] = placement_group(bundles, strategy="PACK", name=own)
            await self._wait(tell)
        except BaseException:
            self.release()
            raise

    def _held_by_others(self) -> list[str]:
        """The pools of other runs that have their devices: "run/pool 2 x 0.25 CPU"."""
        groups: Any = placement_group_table()
        own = {group.id.hex() for group in self._groups.values()}
        held = [
            (group["name"].removeprefix(GROUP).rpartition("/")[0], list(group["bundles"].values()))
            for key, group in groups.items()
            if group["state"] == "CREATED" and group["name"].startswith(GROUP) and key not in own
        ]
        return [f"{pool} {len(bundles)} x {_format_bundle(bundles[0])}" for pool, bundles in held]

    def options(self, spec: ServiceSpec, rank: int = 0) -> dict[str, Any]:
        """Ray's options for the actor of a service's rank: its bundle, and its share of that device."""
        place = self._place(spec, rank)
        if place is None:
            return dict(NO_DEVICE)
        pool, bundle = place
        share = shares_of(self._bundles[pool], self._tenants[place])
        strategy = PlacementGroupSchedulingStrategy(self._groups[pool], placement_group_bundle_index=bundle)
        return {**NO_DEVICE, **share, "scheduling_strategy": strategy}

    def accelerates(self, spec: ServiceSpec) -> bool:
        """Whether the devices of a service's pool are accelerators."""
        return "GPU" in self._bundles.get(spec.pool, {})

    def release(self) -> None:
        """Release the devices. Idempotent."""
        groups, self._groups = self._groups, {}
        self._tenants.clear()
        for group in groups.values():
            remove_placement_group(group)

    def _place(self, spec: ServiceSpec, rank: int) -> tuple[str, int] | None:
        request = self._requests.get(spec.pool)
        return (spec.pool, rank % request.devices) if request else None

    async def _wait(self, tell: Callable[[str], None]) -> None:
        began, told = time.monotonic(), False
        for name, group in self._groups.items():
            while not await asyncio.to_thread(group.wait, _LOOK_SECONDS):
                waited = time.monotonic() - began
                if waited >= RESERVE_SECONDS:
                    late = f"were not free within {RESERVE_SECONDS:g} s; stop what uses them, or request fewer"
                    raise ServiceError(await asyncio.to_thread(self._shortage, name, late))
                if waited >= TELL_SECONDS and not told:
                    now = (
                        f"are not free; waits for them for {RESERVE_SECONDS:g} s: stop what uses them, or request fewer"
                    )
                    tell(await asyncio.to_thread(self._shortage, name, now))
                    told = True
        if told:
            tell(f"the pools have their devices after {time.monotonic() - began:.0f} s")

    def _shortage(self, name: str, what: str) -> str:
        """What a pool waits for, what the cluster has of it, and which runs hold some."""
        wanted, free, total = self._bundles[name], ray.available_resources(), ray.cluster_resources()
        there = ", ".join(f"{free.get(kind, 0.0):g} of {total.get(kind, 0.0):g} {kind} are free" for kind in wanted)
        held = ", ".join(self._held_by_others())
        return (
            f"pool {name!r}: {self._requests[name].devices} x {_format_bundle(wanted)} {what} "
            f"(on the cluster {there}; held by other runs: {held or 'none, so another program holds them'})"
        )


def bundle_of(request: PoolRequest, total: Mapping[str, float]) -> dict[str, float]:
    """Ray's resources for one device of a pool. Raises ServiceError for an unknown device."""
    if request.device == CPU_SLOT or (not request.device and not total.get("GPU")):
        return {"CPU": 1 / SLOTS_PER_CORE}
    if not request.device:
        return {"GPU": 1.0}
    if request.device not in ACCELERATORS:
        raise ServiceError(f"no device {request.device!r}; known: {', '.join([*ACCELERATORS, CPU_SLOT])}")
    return {"GPU": 1.0, f"accelerator_type:{ACCELERATORS[request.device]}": TYPE_AMOUNT}


def refuse_shortage(
    requests: Mapping[str, PoolRequest], bundles: Mapping[str, Mapping[str, float]], total: Mapping[str, float]
) -> None:
    """Raise ServiceError, with the numbers, if the pools request more devices than the cluster has."""
    wanted: Counter[str] = Counter()
    for name, request in requests.items():
        for kind, amount in bundles[name].items():
            wanted[kind] += amount * request.devices  # type: ignore[assignment]
    for kind, amount in wanted.items():
        if amount > total.get(kind, 0.0) + 1e-9:
            each = {n: r.devices for n, r in requests.items() if kind in bundles[n]}
            requested = ", ".join(f"{name} {devices}" for name, devices in each.items())
            has = f"{total.get(kind, 0.0):g} {kind}"
            slots = f", {int(total.get(kind, 0.0) * SLOTS_PER_CORE)} slots of a quarter each" if kind == "CPU" else ""
            raise ServiceError(
                f"pools ask for {sum(each.values())} devices of {_format_bundle(bundles[next(iter(each))])} "
                f"({requested}); the cluster has {has}{slots}; take fewer devices, or a larger cluster"
            )


def shares_of(bundle: Mapping[str, float], tenants: int) -> dict[str, float]:
    """Ray's options for one of `tenants` actors that take turns on a device."""
    share = {"CPU": "num_cpus", "GPU": "num_gpus"}
    return {share[kind]: int(1e4 * amount / tenants) / 1e4 for kind, amount in bundle.items() if kind in share}


def _format_bundle(bundle: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
