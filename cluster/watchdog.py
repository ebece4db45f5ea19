"""Notices a step that takes many times as long as the others, and shows what every worker is doing in it."""

import sys
import threading
import time
import traceback
from collections import deque
from statistics import median

from cluster.reporter import Pulse

TIMES_MEDIAN = 10.0
_LEAST_S = 2.0
"""Shorter waits are no hang, however fast the steps are."""
_FEWEST_STEPS = 5
_KEPT_STEPS = 200
_DEEPEST = 12


class Watchdog:
    """Listens to the pulses of all workers; kept by the driver of a gang."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_KEPT_STEPS)
        self._last: dict[int, Pulse] = {}
        self._heard_at: dict[int, float] = {}
        self._said_for = -1

    @property
    def step(self) -> int | None:
        """The furthest step any worker has told of; None before any has."""
        return max((pulse.step for pulse in self._last.values() if pulse.step is not None), default=None)

    def hear(self, rank: int, pulse: Pulse) -> None:
        self._seconds.extend(pulse.steps_s)
        self._last[rank], self._heard_at[rank] = pulse, time.monotonic()

    def waiting_s(self) -> float:
        """How long the slowest worker has been in its step; 0 where none is in one."""
        now = time.monotonic()
        # A worker that is halted tells nothing new.
        waiting = (
            pulse.waiting_s + now - self._heard_at[rank]
            for rank, pulse in self._last.items()
            if pulse.waiting_s is not None
        )
        return max(waiting, default=0.0)

    def late(self) -> str | None:
        """What to say, once for each step that takes ten times the median; None while all is well."""
        waiting_s = self.waiting_s()
        if not waiting_s or len(self._seconds) < _FEWEST_STEPS or self._said_for == self.step:
            return None
        usual_s = median(self._seconds)
        if waiting_s < max(TIMES_MEDIAN * usual_s, _LEAST_S):
            return None
        self._said_for = self.step
        return (
            f"step {self.step + 1} has taken {waiting_s:.1f} s so far, and the median is {usual_s:.3f} s; "
            "what every rank is doing:"
        )


def stacks_of_threads(names: tuple[str, ...]) -> str:
    """The innermost calls of this process's threads whose name begins with one of `names`."""
    frames, found = sys._current_frames(), []
    for thread in threading.enumerate():
        if thread.name.startswith(names) and thread.ident in frames:
            calls = traceback.format_stack(frames[thread.ident])[-_DEEPEST:]
            found.append(f"{thread.name}:\n{''.join(calls)}")
    return "\n".join(found) or "none of its threads works"
