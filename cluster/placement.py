"""Where actors are put: resources are reserved for all of a group before any is made.

The only file that makes Ray actors and placement groups.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private import state
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.elastic import largest_world
from cluster.errors import ClusterError
from cluster.reporter import StopSignal

logger = logging.getLogger(__name__)

_REPORT_WAITING_S = 5.0
_SETTLE_S = 10.0
"""How long an elastic group waits for all the room its cluster may have, before it takes less."""
_CLAIM_S = 3.0
"""How long a reservation that should succeed is waited for; a host that just died may still be counted."""

ACTOR_DIED = (RayActorError, OutOfMemoryError, ObjectLostError)
"""What a call of a dead actor raises: the second where Ray 2.60 ended it, since its host ran out of memory, the third
where it had answered and its host died with the answer."""


class Placement:
    """Reserved resources for a number of equal actors."""

    def __init__(self, group: PlacementGroup, bundle: dict[str, float], size: int):
        self.group, self.bundle, self.size = group, bundle, size

    def actor(self, actor_class: type, index: int, *arguments: Any) -> Any:
        """Make an actor on the reservation of this index; Ray never restarts it by itself."""
        return (
            ray.remote(actor_class)
            .options(
                num_cpus=self.bundle["CPU"],
                num_gpus=self.bundle.get("GPU", 0),
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.group, placement_group_bundle_index=index
                ),
            )
            .remote(*arguments)
        )

    def remove(self) -> None:
        remove_placement_group(self.group)


def place(
    workers: int, *, cpus: float, gpus: float = 0.0, timeout_s: float, stop: StopSignal | None = None
) -> Placement:
    """Reserve resources for each worker, and say every few seconds what is being waited for.

    Raises: ClusterError if the cluster has no room within `timeout_s`, or a stop is requested meanwhile.
    """
    bundle = _bundle(cpus, gpus)
    group = _reserve(bundle, workers)
    begun = reported = time.monotonic()
    while not group.wait(timeout_seconds=1):
        now, has = time.monotonic(), _free(bundle)
        if now - begun > timeout_s or (stop and stop.requested):
            remove_placement_group(group)
            raise ClusterError(
                f"{workers} workers with {bundle} each were to be placed within {timeout_s:.0f} s, and after "
                f"{now - begun:.0f} s the cluster has {has}; ask for fewer with --cluster.workers, or add "
                "machines"
            )
        if now - reported >= _REPORT_WAITING_S:
            reported = now
            logger.info(
                "waiting for room for %d workers with %s each: the cluster has %s", workers, bundle, has
            )
    return Placement(group, bundle, workers)


def require_gpus(needed: float, options: str) -> None:
    """Fail at once where waiting for room would not help. Raises: ClusterError naming the options that ask for them."""
    there = ray.cluster_resources().get("GPU", 0)
    if needed > there:
        raise ClusterError(
            f"{options} need {needed:g} accelerators together, and the cluster has {there:g}; lower them (0 works on "
            "the processor), or add machines"
        )


def place_largest(
    worlds: Sequence[int],
    *,
    cpus: float,
    gpus: float = 0.0,
    timeout_s: float,
    stop: StopSignal | None = None,
) -> Placement:
    """Reserve resources for as many workers as the cluster has room for, among the rising numbers of `worlds`.

    What a dead gang held is given back within moments, so less than all hosts could hold is taken only after
    some seconds.

    Raises: ClusterError if there is no room for the smallest number within `timeout_s`, or a stop is requested
    meanwhile.
    """
    if len(worlds) == 1:
        return place(worlds[0], cpus=cpus, gpus=gpus, timeout_s=timeout_s, stop=stop)
    bundle = _bundle(cpus, gpus)
    begun = reported = time.monotonic()
    while (waited := time.monotonic() - begun) < timeout_s and not (stop and stop.requested):
        size = largest_world(worlds, free_room(bundle))
        if size and (size >= (largest_world(worlds, total_room(bundle)) or 0) or waited > _SETTLE_S):
            group = _reserve(bundle, size)
            if group.wait(timeout_seconds=_CLAIM_S):
                return Placement(group, bundle, size)
            remove_placement_group(group)
        if time.monotonic() - reported >= _REPORT_WAITING_S:
            reported = time.monotonic()
            logger.info(
                "waiting for room for %d to %d workers with %s each: the cluster has %s",
                *(worlds[0], worlds[-1], bundle, _free(bundle)),
            )
        time.sleep(0.2)
    raise ClusterError(
        f"at least {worlds[0]} workers with {bundle} each were to be placed within {timeout_s:.0f} s, and after "
        f"{waited:.0f} s the cluster has {_free(bundle)}; lower --cluster.min-workers, or add machines"
    )


def free_room(bundle: Mapping[str, float], own: Mapping[str, int] | None = None) -> int:
    """Workers that fit on the hosts now; `own` are those that already hold resources, by node id."""
    # Ray 2.60 tells the free resources of each host through its private module only.
    free = state.available_resources_per_node()
    own = own or {}
    return sum(_fit(resources, bundle) + own.get(node, 0) for node, resources in free.items())


def total_room(bundle: Mapping[str, float]) -> int:
    """Workers that would fit on the hosts that are alive if nothing else ran there."""
    return sum(_fit(node["Resources"], bundle) for node in ray.nodes() if node["Alive"])


def _fit(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    # Ray counts in ten-thousandths, so a sum of fractions may fall a little short.
    return min(math.floor(resources.get(name, 0.0) / amount + 1e-4) for name, amount in bundle.items())


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def _reserve(bundle: dict[str, float], workers: int) -> PlacementGroup:
    return placement_group([bundle] * workers, strategy="PACK")


def _free(bundle: dict[str, float]) -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(f"{free.get(name, 0):g} of {total.get(name, 0):g} {name} free" for name in bundle)


def death_cause(error: RayError) -> str:
    """The sentence of Ray's long message that says why a process ended."""
    text = " ".join(str(error).split())
    _, found, rest = text.partition("exit detail: ")
    return (rest if found else text)[:300]
