"""One process of a group: who it is, its device, and the groups it speaks through."""

import datetime
import logging
import os
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from cluster.errors import ClusterError, ConfigError, MeetingError
from cluster.faults import COLLECTIVE, kind_of
from cluster.memory import keep_freed_memory

logger = logging.getLogger(__name__)

all_gather_equal = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Tensors of one size from all ranks, one after another: torch 2.13 renamed it and warns at the name that 2.11 has."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A member of a running process group."""

    rank: int
    world_size: int
    local_rank: int
    """Index among the processes of this machine."""
    local_world_size: int
    """Processes of the group on this machine."""
    device: torch.device
    host_group: dist.ProcessGroup
    """Gloo group for integers of the host (batch sizes, stop flags), apart from the group of the tensors."""
    num_threads: int


def start_process(
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    rendezvous: str,
    num_threads: int,
    use_gpu: bool = False,
    timeout_s: float = 600.0,
) -> Process:
    """Join the process group and return this process's place in it; ends with `stop_process`.

    `rendezvous` is `file:///path` on one machine, where no port of the store is opened then, or
    `tcp://host:port` between machines; gloo speaks over loopback or over the interface towards that host.

    Raises: MeetingError if the other processes do not arrive within `timeout_s`, or the port is taken; ConfigError
    where torch does not see the accelerator.
    """
    if use_gpu:
        _require_accelerator(local_rank)
    _set_environment(rank, world_size, local_rank, local_world_size, num_threads, use_gpu)
    os.environ["GLOO_SOCKET_IFNAME"] = interface_towards(rendezvous)
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    _set_default_timeout(timeout)
    host_group = _meet(rank, world_size, rendezvous, timeout, backend="nccl" if use_gpu else "gloo")
    logger.debug("rank %d of %d joined at %s with %d threads", rank, world_size, rendezvous, num_threads)
    return Process(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        device=device,
        host_group=host_group,
        num_threads=num_threads,
    )


def _require_accelerator(local_rank: int) -> None:
    found = torch.cuda.device_count()
    if found <= local_rank:
        raise ConfigError(
            f"cluster.gpus-per-worker above 0 needs an accelerator for every worker of a machine, and torch "
            f"{torch.__version__} sees {found} here; give --cluster.gpus-per-worker 0, or install a driver and a build "
            "of torch for it"
        )


def _meet(
    rank: int, world_size: int, rendezvous: str, timeout: datetime.timedelta, *, backend: str
) -> dist.ProcessGroup:
    """Join the group of the tensors and that of the host, which is returned. Raises: MeetingError."""
    try:
        dist.init_process_group(
            backend=backend, init_method=rendezvous, rank=rank, world_size=world_size, timeout=timeout
        )
        return dist.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, TimeoutError) as error:
        if isinstance(error, RuntimeError) and kind_of(error) != COLLECTIVE:
            raise
        raise MeetingError(
            f"{world_size} processes were expected at {rendezvous} within {timeout.total_seconds():.0f} s, and rank "
            f"{rank} could not reach all of them ({error}); look at the logs of the other ranks"
        ) from error


def _set_default_timeout(timeout: datetime.timedelta) -> None:
    """Also for the groups that libraries make: torch 2.13 gives those 30 minutes (NCCL 10) whatever the first has.

    DeepSpeed speaks through such groups alone, so a halted worker would hold the others for as long.
    """
    distributed_c10d.default_pg_timeout = timeout
    if distributed_c10d.default_pg_nccl_timeout is not None:
        distributed_c10d.default_pg_nccl_timeout = timeout


def stop_process() -> None:
    """Leave the process group; nothing happens outside of one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def loopback_interface() -> str:
    """Name of the network interface that never leaves this machine, `lo` on most."""
    return _interface_of("127.0.0.1")


def interface_towards(rendezvous: str) -> str:
    """The network interface over which the other processes of the group are reached."""
    parts = urlsplit(rendezvous)
    if parts.scheme == "file":
        return loopback_interface()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing; it only picks the route.
        probe.connect((parts.hostname, parts.port))
        return _interface_of(probe.getsockname()[0])


def _interface_of(own_address: str) -> str:
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own_address for entry in addresses):
            return name
    raise ClusterError(
        f"processes speak over the network interface with address {own_address}, and this machine has none "
        "such; bring it up (`ip link set lo up` for 127.0.0.1)"
    )


def _set_environment(
    rank: int, world_size: int, local_rank: int, local_world_size: int, num_threads: int, use_gpu: bool
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(local_world_size),
        # Ray sets 1 for an actor with one core; libraries loaded later read this, torch is told by itself.
        OMP_NUM_THREADS=str(num_threads),
    )
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
