"""Starting Ray inside this job, or joining a cluster that runs already."""

import logging
import math
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import psutil
import ray
from ray._private import parameter, services
from ray._private import utils as ray_utils
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray._raylet import AuthenticationMode, get_authentication_mode

from cluster.configuration import ClusterConfig
from cluster.environment import environment
from cluster.errors import ClusterError
from cluster.packages import PACKAGES, root, search_path
from cluster.topology import num_hosts, usable_cores

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 256 * 2**20
_ANSWER_TIMEOUT_S = 10.0
_LATE = "timed out during startup"
"""What Ray says where its daemons are not up in time; the error has no class of its own."""


def start_ray(config: ClusterConfig, num_cpus: int | None = None) -> None:
    """Make sure that Ray runs: embedded in this job on this machine, or joined at `config.address`.

    An embedded Ray has a core for every worker asked for, more than the machine has where need be; it ends
    with this process, however this process ends. Calling again is free.

    Raises: ClusterError if the cluster at `config.address` does not answer or refuses the token, or an embedded one is
    not up in time.
    """
    needed = num_cpus or max(usable_cores(), math.ceil(config.workers * config.cpus_per_worker))
    if ray.is_initialized():
        if config.address is not None or ray.cluster_resources().get("CPU", 0) >= needed:
            return
        ray.shutdown()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray's default of 15 lets any other program of the machine starve the training.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if config.address is None:
        _start_embedded(needed, config.start_timeout_s)
    else:
        _join(config.address)


def _start_embedded(num_cpus: int, timeout_s: float) -> None:
    if num_cpus > usable_cores():
        logger.warning(
            "%d cores were asked for, this machine has %d: workers share", num_cpus, usable_cores()
        )
    # The token lives in the environment of this process and its children only. Ray 2.60 turns authentication
    # on by itself where the mode is not set; setting it here would be too late, it is read when ray is
    # imported.
    os.environ.pop("RAY_AUTH_MODE", None)
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Workers inherit this. A `runtime_env` would say the same and cost every job seconds: its workers are made anew,
    # after an agent has looked at it, where those that Ray has ready are taken otherwise.
    packages = environment({"PYTHONPATH": search_path()})
    with _shielded_from_signals(), _keeping_sigterm(), packages, _without_idle_daemons():
        _init_patiently(
            timeout_s,
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="ERROR",
        )
    if get_authentication_mode() != AuthenticationMode.TOKEN:
        ray.shutdown()
        raise ClusterError(
            "Ray must run with token authentication, since its ports are open to the network, and it started "
            "without; unset RAY_AUTH_MODE"
        )


def _init_patiently(timeout_s: float, **options: Any) -> None:
    """ray.init, again where a busy machine did not bring Ray's daemons up in the 30 s that Ray 2.60 gives them.

    Raises: ClusterError once that has happened and `timeout_s` are over.
    """
    until = time.monotonic() + timeout_s
    while True:
        own = set(psutil.Process().children(recursive=True))
        try:
            ray.init(**options)
            return
        except Exception as error:
            if type(error) is not Exception or _LATE not in str(error):
                raise
            # Ray leaves them to themselves: those of two starts would be in each other's way.
            _end(set(psutil.Process().children(recursive=True)) - own)
            if time.monotonic() >= until:
                raise ClusterError(
                    f"Ray must start within cluster.start-timeout-s {timeout_s:g} s, and its daemons were not up: this "
                    "machine is too busy; end other work on it, or give more time"
                ) from error
        logger.warning(
            "Ray's daemons were not up in time, since this machine is busy; they are started again"
        )


def _end(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _join(address: str) -> None:
    _check_answers(address)
    # Where a token is at hand it is shown; Ray 2.60 does this by itself for new clusters only.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    packages = [str(root() / package) for package in PACKAGES]
    try:
        with _keeping_sigterm():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"py_modules": packages, "env_vars": {"RAY_USAGE_STATS_ENABLED": "0"}},
            )
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"a Ray cluster was expected at --cluster.address {address}, and it cannot be joined ({error}); "
            "look whether it runs (`ray status`) and whether RAY_AUTH_TOKEN or ~/.ray/auth_token holds its "
            "token"
        ) from error
    logger.info("joined the Ray cluster at %s: %d hosts, %s", address, num_hosts(), ray.cluster_resources())


def _check_answers(address: str) -> None:
    """Fail at once where nothing listens; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"a Ray cluster must listen at --cluster.address {address}, and nothing answers there ({error}); "
            "start it (`ray start --head`) or correct the address"
        ) from error


@contextmanager
def _without_idle_daemons() -> Iterator[None]:
    """Nothing scales one machine up, and workers report their logs by themselves: two processes less to start.

    Ray 2.60 has no option for it.
    """
    complete = parameter.RayParams
    parameter.RayParams = partial(complete, no_monitor=True, include_log_monitor=False)
    try:
        yield
    finally:
        parameter.RayParams = complete


class _ShieldedProcess(services.ConsolePopen):
    """One of Ray's daemons, which must outlive the signals that end a job until the workers have saved."""

    def __init__(self, *arguments: Any, **options: Any):
        # A process group of its own: signals of a shell or of `timeout` do not reach it.
        super().__init__(*arguments, process_group=0, **options)

    def terminate(self) -> None:
        """At the end of the job: the daemon and what it started; a SIGTERM would not be heard."""
        family = psutil.Process(self.pid).children(recursive=True)
        self.kill()
        _end(family)


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Whoever listens to SIGTERM goes on doing so; Ray 2.60 would put a handler in its place that ends the process."""
    take, handler = ray_utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    ray_utils.set_sigterm_handler = lambda ray_handler: None
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = take
        # The C++ part of Ray has taken the signal too, and would abort.
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _shielded_from_signals() -> Iterator[None]:
    """Ray's daemons started inside do not end at a SIGTERM to the job's process group or to all its processes.

    Stopping a container, a cgroup or a Slurm step sends it to everyone; without the raylet no worker could save.
    A blocked signal stays blocked in children, so the workers unblock it for themselves. Ray 2.60 has no option
    for it; it does the same with SIGINT.
    """
    popen = services.ConsolePopen
    services.ConsolePopen = _ShieldedProcess
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        services.ConsolePopen = popen
