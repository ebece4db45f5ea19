"""A pool: workers behind one queue, each replaced by itself when it dies."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.configuration import ClusterConfig
from cluster.errors import ClusterError
from cluster.packages import check_same, fingerprint, root
from cluster.placement import death_cause, place
from cluster.ray_start import start_ray

logger = logging.getLogger(__name__)

_ITEM_DEATHS = 3


class _Member:
    """An actor of a pool: builds its function once, then answers one item after another."""

    def __init__(self, source: tuple[Path, str], build: Callable[..., Callable], arguments: tuple):
        check_same(*source)
        self.work_on = build(*arguments)

    def work(self, item: Any) -> Any:
        return self.work_on(item)


class Pool:
    """Workers behind one queue: a member that dies is replaced by itself and its item given to another.

    `build(*arguments)` runs once in each member and returns the function of an item; it keeps no state that
    matters, since a replaced member starts anew.

    Example: `with Pool(build_reward, config, members=4, cluster=cluster) as pool: dict(pool.map(groups))`.
    """

    def __init__(
        self,
        build: Callable[..., Callable[[Any], Any]],
        *arguments: Any,
        members: int,
        cluster: ClusterConfig,
        cpus_per_member: float = 1.0,
        max_deaths: int = 10,
    ):
        start_ray(cluster, num_cpus=math.ceil(members * cpus_per_member))
        self.build, self.arguments, self.max_deaths = build, arguments, max_deaths
        self.placement = place(members, cpus=cpus_per_member, timeout_s=cluster.start_timeout_s)
        self.members = [self._member(index) for index in range(members)]
        self.deaths = 0

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def map(self, items: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """(index of the item, result) in the order of completion; at most one item per member is taken ahead.

        Raises: the function's own error; ClusterError if members die more often than `max_deaths`, or one
        item kills three of them.
        """
        source, again = enumerate(items), deque[tuple[int, Any]]()
        idle, busy = list(range(len(self.members))), {}
        item_deaths: dict[int, int] = {}
        while True:
            while idle and (work := again.popleft() if again else next(source, None)) is not None:
                slot = idle.pop()
                busy[self.members[slot].work.remote(work[1])] = (slot, work)
            if not busy:
                return
            reference = ray.wait(list(busy), num_returns=1)[0][0]
            slot, (index, item) = busy.pop(reference)
            try:
                result = ray.get(reference)
            except RayActorError as error:
                item_deaths[index] = item_deaths.get(index, 0) + 1
                self._replace(slot, index, item_deaths[index], error)
                again.append((index, item))
            except RayTaskError as error:
                raise error.cause from error
            else:
                yield index, result
            idle.append(slot)

    def close(self) -> None:
        for member in self.members:
            ray.kill(member)
        self.placement.remove()

    def _member(self, index: int) -> Any:
        return self.placement.actor(_Member, index, (root(), fingerprint()), self.build, self.arguments)

    def _replace(self, slot: int, index: int, item_deaths: int, error: RayActorError) -> None:
        self.deaths += 1
        logger.warning("pool member %d died with item %d: %s; replacing it", slot, index, death_cause(error))
        if item_deaths >= _ITEM_DEATHS or self.deaths > self.max_deaths:
            raise ClusterError(
                f"pool members must outlive their items, and {self.deaths} have died, {item_deaths} of them "
                f"with item {index}: {death_cause(error)}; look at that item and at the memory of the "
                "machines"
            ) from error
        self.members[slot] = self._member(slot)
