"""Where a job runs: how many workers, on which cluster, and how failures are met."""

import math
from dataclasses import dataclass

from cluster.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Workers, the resources of each, and how long and how often they are waited for or started again."""

    address: str | None = None
    """Address of a running Ray cluster; left out, Ray starts by itself on this machine."""
    workers: int = 1
    """Training processes; tables and optimizer state are sharded over them."""
    in_process: bool = False
    """Work in the command's own process, with plain torch in place of Ray, DeepSpeed and TorchRec: for one processor or
    accelerator on a machine without those. Nothing starts again after a fault."""
    min_workers: int | None = None
    """Fewest processes to go on with when workers or hosts are lost; left out, as many as it starts with."""
    max_workers: int | None = None
    """Most processes to grow to when the cluster has room; left out, as many as it starts with."""
    cpus_per_worker: float = 1.0
    """Processor cores reserved for each worker; its thread count follows from it."""
    gpus_per_worker: float = 0.0
    """Accelerators reserved for each worker, 1 or a fraction; 0 trains on the processor."""
    start_timeout_s: float = 300.0
    """How long to wait for the workers to be placed and started."""
    max_restarts: int = 3
    """How many times in a row the gang is started again from the latest checkpoint after a fault without getting
    further than before."""
    collective_timeout_s: float = 600.0
    """How long a collective operation, or a checkpoint, may wait for the other workers."""

    def __post_init__(self) -> None:
        check_resources("cluster", cpus=self.cpus_per_worker, gpus=self.gpus_per_worker)
        check_one_accelerator("cluster", self.gpus_per_worker)
        most = max(self.workers, self.max_workers or 0)
        if 0 < self.gpus_per_worker < 1 and most > 1:
            # NCCL refuses two ranks on one accelerator, and CUDA shows none of those that are named twice.
            raise ConfigError(
                f"cluster.gpus-per-worker must be 0 or 1 where several workers train together, got "
                f"{self.gpus_per_worker:g} for {most} workers; give 1, or --cluster.workers 1"
            )
        check_seconds("cluster.start-timeout-s", self.start_timeout_s)
        check_seconds("cluster.collective-timeout-s", self.collective_timeout_s)


def check_resources(section: str, *, cpus: float, gpus: float) -> None:
    """Raises: ConfigError unless both are numbers that Ray can reserve for a worker."""
    if not 0 < cpus < math.inf:
        raise ConfigError(
            f"{section}.cpus-per-worker must be above 0, got {cpus:g}; fractions, such as 0.1, share a core"
        )
    if not (0 <= gpus <= 1 or (gpus > 1 and gpus % 1 == 0)):
        raise ConfigError(
            f"{section}.gpus-per-worker must be 0, a fraction of 1 or a whole number, got {gpus:g}"
        )


def check_one_accelerator(section: str, gpus: float) -> None:
    """Raises: ConfigError if a worker that computes on one accelerator is to reserve more."""
    if gpus > 1:
        raise ConfigError(
            f"{section}.gpus-per-worker must be at most 1, since each worker computes on one accelerator, got "
            f"{gpus:g}; give 1, and {gpus:g} times as many --{section}.workers"
        )


def check_seconds(option: str, seconds: float) -> None:
    """Raises: ConfigError unless something can be waited for so long."""
    if not seconds > 0:
        raise ConfigError(f"{option} must be above 0 seconds, got {seconds:g}")
