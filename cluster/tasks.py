"""Independent pieces of work as Ray tasks, a bounded number of them at a time."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.configuration import ClusterConfig
from cluster.errors import ClusterError, ours
from cluster.placement import death_cause
from cluster.ray_start import start_ray

logger = logging.getLogger(__name__)

_REPORT_S = 10.0


def run_tasks(
    function: Callable[[Any], Any],
    arguments: Sequence[Any],
    *,
    num_cpus: float = 1,
    description: str,
    config: ClusterConfig | None = None,
) -> Iterator[Any]:
    """Call `function(argument)` for each argument on the cluster; yield results as they complete, in any
    order.

    At most one task more than fit at once is in flight, so results do not pile up in memory. A task whose
    worker dies is run again by Ray.

    Raises: the function's own GrailError, or the one that tells of a full disk or an unusable path; ClusterError where
    workers die again and again; RuntimeError with the remote traceback for any other error.
    """
    start_ray(config or ClusterConfig())
    at_once = max(1, math.floor(ray.cluster_resources().get("CPU", 1) / num_cpus)) + 1
    task = ray.remote(function).options(num_cpus=num_cpus)
    waiting, running, num_done = iter(arguments), set(), 0
    reported = time.monotonic()
    while True:
        while len(running) < at_once and (argument := next(waiting, _NOTHING)) is not _NOTHING:
            running.add(task.remote(argument))
        if not running:
            return
        done, _ = ray.wait(list(running), num_returns=1)
        running.remove(done[0])
        yield _result(done[0], description)
        num_done += 1
        if time.monotonic() - reported > _REPORT_S:
            reported = time.monotonic()
            logger.info("%s: %d of %d done", description, num_done, len(arguments))


_NOTHING = object()


def _result(reference: Any, description: str) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise ours(error.cause) or RuntimeError(str(error)) from None
    except RayError as error:
        raise ClusterError(
            f"{description} needs workers that live to the end of a task, and one died each time it was tried: "
            f"{death_cause(error)}; look at the memory of the machines"
        ) from error
