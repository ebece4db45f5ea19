"""Where the workers of a job run: a gang of Ray actors, or one in this very process."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.configuration import ClusterConfig
from cluster.errors import ClusterError, ConfigError
from cluster.reporter import Event, Reporter, StopSignal


def run_workers(
    function: Callable[..., Any],
    *arguments: Any,
    config: ClusterConfig,
    run_dir: str,
    on_event: Callable[[Event], None] | None = None,
    stop: StopSignal | None = None,
    worlds: Sequence[int] | None = None,
) -> Any:
    """Call `function(process, *arguments, reporter)` on every worker and return rank 0's result; see `run_gang`.

    Raises: ConfigError for several workers in one process; ClusterError where workers were told to stop and `stop` is
    not there to learn of it; what `run_gang` or the function raises.
    """
    if not config.in_process:
        from cluster.worker_group import run_gang

        signal = stop or StopSignal()
        result = run_gang(
            *(function, *arguments),
            config=config,
            run_dir=run_dir,
            on_event=on_event,
            stop=signal,
            worlds=worlds,
        )
        if stop is None and signal.requested:
            raise ClusterError(
                "workers must be left to finish, and one was told to stop by a signal; give the same command again"
            )
        return result
    if config.workers != 1:
        raise ConfigError(
            f"--cluster.in-process has one worker, and cluster.workers is {config.workers}; give --cluster.workers 1, "
            "or leave --cluster.in-process out"
        )
    return _run_here(function, arguments, config, _DirectReporter(on_event, stop))


def _run_here(
    function: Callable[..., Any], arguments: tuple, config: ClusterConfig, reporter: Reporter
) -> Any:
    from cluster.process import start_process, stop_process

    reporter.emit("started", {"pid": os.getpid(), "host": "127.0.0.1", "restarts": 0, "workers": 1})
    with tempfile.TemporaryDirectory(prefix="grail-") as directory:
        process = start_process(
            rank=0,
            world_size=1,
            local_rank=0,
            local_world_size=1,
            rendezvous=f"file://{directory}/rendezvous",
            num_threads=max(1, int(config.cpus_per_worker)),
            use_gpu=config.gpus_per_worker > 0,
            timeout_s=config.collective_timeout_s,
        )
        try:
            return function(process, *arguments, reporter)
        finally:
            stop_process()


class _DirectReporter(Reporter):
    """Events are heard at once, and the wish to stop is read where it was set."""

    def __init__(self, on_event: Callable[[Event], None] | None, stop: StopSignal | None):
        super().__init__()
        self._hear = on_event or (lambda event: None)
        self._signal = stop or StopSignal()

    def emit(self, kind: str, values: Mapping[str, Any]) -> None:
        self._hear(Event(kind=kind, rank=self.rank, values=values))

    def stop_requested(self) -> bool:
        """Raises: what the run was ended with, where it must not save."""
        if self._signal.error is not None:
            raise self._signal.error
        return self._signal.requested
