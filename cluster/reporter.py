"""What passes between a worker and the driver: numbers and log lines up, the wish to stop down."""

import contextlib
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

logger = logging.getLogger(__name__)

_KEPT_STEPS = 200
_ECHO_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something a worker tells the driver."""

    kind: Literal["started", "begun", "progress", "saved", "stopping", "log", "result", "failure"]
    rank: int
    values: Mapping[str, Any] = field(default_factory=dict)
    """started: pid, host, restarts, workers; begun: the step learning goes on from; progress: the numbers reported;
    saved: step of a checkpoint; stopping: the signal that asked for it; log: level, name, message."""


class Listener(Protocol):
    """What hears of every event on the driver, such as progress and status; `to_all` joins several."""

    def on_event(self, event: Event) -> None: ...


def to_all(*listeners: Listener) -> Callable[[Event], None]:
    """What tells each event to all of them, in this order."""

    def on_event(event: Event) -> None:
        for listener in listeners:
            listener.on_event(event)

    return on_event


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """How a worker's steps go, as its driver hears with every answer."""

    step: int | None = None
    """Steps done; None before the worker has said so."""
    steps_s: tuple[float, ...] = ()
    """Seconds that those since the last pulse took, but for those that something else came before."""
    waiting_s: float | None = None
    """Seconds since it ended; None while the worker does something else than steps."""


class Reporter:
    """The worker's end: written by the training thread, emptied by the thread that answers the driver."""

    def __init__(self, rank: int = 0):
        self.rank = rank
        self._events: deque[Event] = deque()
        self._stop = threading.Event()
        self._step: int | None = None
        self._stepped_at: float | None = None
        self._steps_s: deque[float] = deque(maxlen=_KEPT_STEPS)

    def progress(self, **numbers: float | int | str) -> None:
        """Report numbers to the driver; returns at once."""
        self.emit("progress", numbers)

    def stop_requested(self) -> bool:
        """Whether the driver wants this run to save and end; ranks may learn of it at different steps."""
        return self._stop.is_set()

    def stepped(self, step: int) -> None:
        """Say that a step has ended; whoever counts steps has the driver watch for one that hangs."""
        now, before = time.monotonic(), self._stepped_at
        if before is not None:
            self._steps_s.append(now - before)
        self._step, self._stepped_at = step, now

    def pause_steps(self) -> None:
        """Say that something else comes than steps, which may take as long as it likes, until the next one."""
        self._stepped_at = None

    def pulse(self) -> Pulse:
        """How the steps went since the last call; what `drain` is to events."""
        stepped_at = self._stepped_at
        waiting_s = None if stepped_at is None else time.monotonic() - stepped_at
        steps_s = tuple(self._steps_s.popleft() for _ in range(len(self._steps_s)))
        return Pulse(step=self._step, steps_s=steps_s, waiting_s=waiting_s)

    def begun(self, step: int) -> None:
        """Report that the run is about to learn from this step on: what it was given fits what it has saved."""
        self.emit("begun", {"step": step})

    def saved(self, step: int) -> None:
        """Report a complete checkpoint, from any thread; from here on the gang may be started again at another size
        without losing work."""
        self.emit("saved", {"step": step})

    def emit(self, kind: str, values: Mapping[str, Any]) -> None:
        self._events.append(Event(kind=kind, rank=self.rank, values=values))

    def drain(self) -> list[Event]:
        """All events since the last call, oldest first."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def request_stop(self) -> None:
        self._stop.set()


class StopSignal:
    """The driver's end of a stop: set by Ctrl-C or SIGTERM, or by the program itself."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.error: Exception | None = None
        """Why the run must end at once, without saving."""

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self) -> None:
        self._event.set()

    def abort(self, error: Exception) -> None:
        """End the run at once with this error."""
        self.error = error
        self.request()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """While inside, SIGINT and SIGTERM request a stop; a second one ends the process hard.

        What ends a job often sends SIGTERM to the process and to all of its group: that counts as one.
        """
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        first_at: float | None = None

        def handle(number: int, frame: object) -> None:
            nonlocal first_at
            now = time.monotonic()
            if first_at is not None:
                if number == signal.SIGTERM and now - first_at < _ECHO_S:
                    return
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            first_at = now
            self.request()
            logger.warning("%s: saving and stopping; once more ends at once", signal.Signals(number).name)

        for number in previous:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
