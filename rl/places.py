"""Where the workers of the pools are put, reserved before any learner starts."""

from dataclasses import dataclass

from cluster.placement import Placement, place
from rl.configuration import AlignConfig


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the workers of the pools are put; made once by the driver, so that learners may start again."""

    rollout: Placement | None = None
    reward: Placement | None = None

    @staticmethod
    def reserve(config: AlignConfig) -> "Places":
        """Raises: ClusterError if the cluster has no room in time."""
        return Places(
            **{
                name: place(pool.workers, cpus=pool.cpus_per_worker, timeout_s=config.cluster.start_timeout_s)
                for name, pool in (("rollout", config.rollout), ("reward", config.reward))
                if pool.workers
            }
        )
