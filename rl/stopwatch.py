"""Where the time of steps goes, and what they were like, between two lines of the log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = ("rollout", "reward", "update", "transfer")


class Stopwatch:
    """Adds up seconds under the names of `PARTS`."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.started = time.perf_counter()

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - begun

    def shares(self) -> dict[str, float]:
        """Share of the time since the last call that each part took; then begins anew."""
        total = max(time.perf_counter() - self.started, 1e-9)
        found = {f"time/{part}_share": seconds / total for part, seconds in self.seconds.items()}
        self.__init__()
        return found


class Means:
    """Means of named numbers over the steps since the last line."""

    def __init__(self) -> None:
        self.totals: dict[str, tuple[float, int]] = {}

    def add(self, **numbers: float) -> None:
        for name, value in numbers.items():
            total, count = self.totals.get(name, (0.0, 0))
            self.totals[name] = total + value, count + 1

    def take(self) -> dict[str, float]:
        found = {name: total / count for name, (total, count) in self.totals.items()}
        self.totals.clear()
        return found
