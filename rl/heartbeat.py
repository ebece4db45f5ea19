"""Signs of life of rank 0 while it waits for the workers of a pool, so that no other learner takes it for lost."""

import time

from cluster.configuration import ClusterConfig
from cluster.process import Process
from sharding.collectives import exchange_integers

_BEATS_PER_TIMEOUT = 10
_LONGEST_S = 5.0
"""Between two looks at what else may have happened, such as a wish to stop."""
_DONE, _WAITING = 0, 1


class Heartbeat:
    """The others stay in `end` until rank 0 comes there too, and hear from it `every_s` seconds at the latest.

    So no collective lasts longer, and a worker that hangs may take longer than a collective until it is replaced.
    Between its beats and the end, rank 0 exchanges nothing else over the host group.
    """

    def __init__(self, process: Process, cluster: ClusterConfig):
        self.process = process
        self.every_s = min(cluster.collective_timeout_s / _BEATS_PER_TIMEOUT, _LONGEST_S)
        self._last = time.monotonic()

    def beat(self) -> None:
        """Rank 0 says that it still waits."""
        exchange_integers([_WAITING], self.process)
        self._last = time.monotonic()

    def beat_if_due(self) -> None:
        """The same for a loop of short waits."""
        if time.monotonic() >= self._last + self.every_s:
            self.beat()

    def end(self) -> None:
        """Return once rank 0 waits no longer; a collective call."""
        while exchange_integers([_DONE], self.process)[0] == (_WAITING,):
            pass
