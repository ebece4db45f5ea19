"""A value that one process puts into Ray's object store once, and others read from there without a copy."""

from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from cluster.errors import ClusterError


@dataclass(frozen=True, kw_only=True)
class SharedObject:
    """May travel inside of any message; the value lives as long as the process that put it and a reference to it.

    NumPy arrays inside of the value are read in place on the same machine, and must not be written to.
    """

    reference: Any

    @staticmethod
    def put(value: Any) -> "SharedObject":
        return SharedObject(reference=ray.put(value))

    def get(self, timeout_s: float) -> Any:
        """Raises: ClusterError if the time is up; ray.exceptions.RayError if the process that put it is gone."""
        try:
            return ray.get(self.reference, timeout=timeout_s)
        except GetTimeoutError as error:
            raise ClusterError(
                f"what one process shares must reach the others within {timeout_s:g} s, and did not; look at the "
                "network between the hosts, or give --rollout.weights broadcast"
            ) from error
