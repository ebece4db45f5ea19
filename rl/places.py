"""Where the workers of the pools are put, reserved before any learner starts."""

from dataclasses import dataclass

from cluster.errors import ClusterError
from cluster.placement import Placement, place, require_gpus
from cluster.reporter import StopSignal
from rl.configuration import AlignConfig


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the workers of the pools are put; made once by the driver, so that learners may start again."""

    rollout: Placement | None = None
    reward: Placement | None = None

    @staticmethod
    def reserve(config: AlignConfig, stop: StopSignal | None = None) -> "Places":
        """Ray must run.

        Raises: ClusterError if the cluster has too few accelerators or no room in time, or a stop is requested
        meanwhile.
        """
        require_gpus(
            config.num_gpus(),
            "--cluster.gpus-per-worker, --rollout.gpus-per-worker and --reward.gpus-per-worker",
        )
        found: dict[str, Placement] = {}
        try:
            for name, pool in (("rollout", config.rollout), ("reward", config.reward)):
                if pool.workers:
                    found[name] = place(
                        pool.workers,
                        cpus=pool.cpus_per_worker,
                        gpus=pool.gpus_per_worker,
                        timeout_s=config.cluster.start_timeout_s,
                        stop=stop,
                    )
        except ClusterError:
            Places(**found).remove()
            raise
        return Places(**found)

    def remove(self) -> None:
        """Give the room back; the driver's process may align again."""
        for placement in (self.rollout, self.reward):
            if placement is not None:
                placement.remove()
