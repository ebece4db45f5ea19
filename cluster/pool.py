"""A pool: workers behind one queue, each replaced by itself when it dies."""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.configuration import ClusterConfig
from cluster.errors import ClusterError, PoolGoneError
from cluster.packages import check_same, fingerprint, root
from cluster.placement import ACTOR_DIED, Placement, death_cause, place
from cluster.ray_start import start_ray

logger = logging.getLogger(__name__)

GONE = "the member has died with it"
"""Result of an item that was for one member only."""

_ITEM_DEATHS = 3
_SHORTEST_WAIT_S = 0.05
_ANSWER_S = 1.0
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
"""Before a member is started again that died without an item; doubled each time."""


class _Member:
    """An actor of a pool: builds its function once, then answers one item after another."""

    def __init__(self, source: tuple[Path, str]):
        check_same(*source)

    def start(self, build: Callable[..., Callable], arguments: tuple) -> int:
        """Returns the process id; what `build` raises is told apart from the death of the process."""
        self.work_on = build(*arguments)
        return os.getpid()

    def answer(self) -> None:
        """Says that the member lives."""

    def work(self, item: Any) -> Any:
        return self.work_on(item)


@dataclass(kw_only=True)
class _Slot:
    """One place of the pool and the member that holds it now."""

    index: int
    actor: Any = None
    pid: int | None = None
    """Process of the member once it is ready."""
    failed_starts: int = 0
    """Members that died without an item, since one was ready."""
    start_due: float = math.inf
    """When the member must be ready, while it starts."""
    restart_at: float | None = None
    """When the next member is started, where the last one died without an item."""
    ended_because: str = ""
    """Why the pool itself has ended the member, whose death Ray then does not explain."""


@dataclass(kw_only=True)
class _Work:
    ticket: int
    item: Any = field(repr=False)
    repeats: bool
    """Whether it is given to another member when one dies with it."""
    deaths: int = 0
    """Members that have died with it."""
    due: float = math.inf
    """When the member that has it is ended."""


class Pool:
    """Workers behind one queue: a member that dies is replaced by itself and its item given to another.

    `build(*arguments)` runs once in each member and returns the function of an item; it keeps no state that
    matters, since a replaced member starts anew. Work moves on inside `submit`, `poll` and `map` only.

    Example: `with Pool(build_reward, config, members=4, cluster=cluster) as pool: dict(pool.map(groups))`.
    """

    def __init__(
        self,
        build: Callable[..., Callable[[Any], Any]],
        *arguments: Any,
        members: int,
        cluster: ClusterConfig,
        cpus_per_member: float = 1.0,
        gpus_per_member: float = 0.0,
        max_deaths: int = 10,
        patience_s: float = 60.0,
        item_timeout_s: float = math.inf,
        name: str = "pool",
        placement: Placement | None = None,
    ):
        """`max_deaths` counts those between two finished items; `patience_s` is how long the pool may be without
        a ready member, once it had one; a member that takes longer than `item_timeout_s` for an item hangs, and is
        ended as if it had died. A pool that an actor keeps needs the `placement` that its driver has made: a
        reservation of an actor's own outlives it (Ray 2.60)."""
        start_ray(cluster, num_cpus=math.ceil(members * cpus_per_member))
        self.build, self.arguments, self.name = build, arguments, name
        self.max_deaths, self.patience_s, self.item_timeout_s = max_deaths, patience_s, item_timeout_s
        self._is_own_placement = placement is None
        self.placement = placement or place(
            members, cpus=cpus_per_member, gpus=gpus_per_member, timeout_s=cluster.start_timeout_s
        )
        self.deaths = 0
        """Members that have died so far."""
        self._deaths_in_a_row = 0
        self._tickets = 0
        self._queue: deque[_Work] = deque()
        self._idle: list[_Slot] = []
        self._busy: dict[Any, tuple[_Slot, _Work | None]] = {}
        """What is awaited: an answer to work, or the start of a member (None)."""
        self._failed: list[RayTaskError] = []
        self._gone_since: float | None = time.monotonic()
        """Since when there is no member that is ready; None while there is one."""
        self._start_timeout_s = cluster.start_timeout_s
        self._limit_s, self._is_new, self._has_said = cluster.start_timeout_s, True, True
        self.slots = [_Slot(index=index) for index in range(members)]
        for slot in self.slots:
            self._start(slot)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pending(self) -> int:
        """Items that were submitted and have not come back."""
        return len(self._queue) + sum(work is not None for _, work in self._busy.values())

    @property
    def pids(self) -> list[int]:
        """Processes of the members that are ready."""
        return [slot.pid for slot in self.slots if slot.pid is not None]

    def submit(self, item: Any, *, repeats: bool = True) -> int:
        """Queue an item; its ticket, a number that rises from 0, comes back with its result.

        One that does not repeat has the result GONE when a member dies with it. Where nothing is pending, as many
        items as there are `pids` go to one member each.
        """
        work = _Work(ticket=self._tickets, item=item, repeats=repeats)
        self._tickets += 1
        self._queue.append(work)
        self._hand_out()
        return work.ticket

    def poll(self, timeout_s: float | None = None) -> list[tuple[int, Any]]:
        """(ticket, result) of what has come back, waiting for at least one unless the time is up or nothing is
        pending.

        Raises: the function's own error; ClusterError if members die too often or one item kills three of them;
        PoolGoneError if there was no member for too long.
        """
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        found: list[tuple[int, Any]] = []
        while self.pending or self._failed:
            if self._failed:
                if found:
                    return found
                self._raise_failed()
            results, ready = self._advance(0.0 if found else until - time.monotonic())
            found += results
            if (found and not ready) or time.monotonic() >= until:
                break
        return found

    @property
    def is_complete(self) -> bool:
        """Whether every member is ready."""
        return len(self.pids) == len(self.slots)

    def wait_for_all(self, timeout_s: float) -> None:
        """Return once every member is ready, or the time is up. Nothing may be pending.

        Raises: what `build` does; PoolGoneError if there is no member for too long.
        """
        until = time.monotonic() + timeout_s
        while not self.is_complete and time.monotonic() < until:
            self._advance(until - time.monotonic())
            if self._failed:
                self._raise_failed()

    def end_members_with(self, tickets: Iterable[int]) -> None:
        """Kill those that work on these items, because they take too long; they are replaced as after any death."""
        for slot, work in self._busy.values():
            if work is not None and work.ticket in tickets:
                ray.kill(slot.actor)

    def map(self, items: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """(index of the item, result) in the order of completion; one item more than there are members is taken
        ahead. Nothing else may be pending.

        Raises: as `poll`.
        """
        first, source = self._tickets, iter(items)
        while True:
            while self.pending <= len(self.slots) and (item := next(source, _NOTHING)) is not _NOTHING:
                self.submit(item)
            if not self.pending:
                return
            yield from ((ticket - first, result) for ticket, result in self.poll())

    def close(self) -> None:
        for slot in self.slots:
            if slot.actor is not None:
                ray.kill(slot.actor)
        if self._is_own_placement:
            self.placement.remove()

    def _start(self, slot: _Slot) -> None:
        slot.pid, slot.restart_at, slot.start_due = None, None, time.monotonic() + self._start_timeout_s
        slot.ended_because = ""
        slot.actor = self.placement.actor(_Member, slot.index, (root(), fingerprint()))
        self._busy[slot.actor.start.remote(self.build, self.arguments)] = (slot, None)

    def _start_due(self) -> None:
        now = time.monotonic()
        for slot in self.slots:
            if slot.restart_at is not None and now >= slot.restart_at:
                self._start(slot)

    def _advance(self, seconds: float) -> tuple[list[tuple[int, Any]], list[Any]]:
        """Start and hand out what is due, wait for an answer; results that came, and the answers they came from."""
        self._start_due()
        self._hand_out()
        self._end_overdue()
        ready = self._wait(max(min(seconds, self._time_to_act()), 0.0))
        results = [result for reference in ready for result in self._take(reference)]
        self._check_not_gone()
        return results, ready

    def _hand_out(self) -> None:
        silent: list[_Slot] = []
        while self._queue and self._idle:
            slot = self._idle.pop()
            # What is for one member only goes to it, or is GONE with it.
            answers = self._answers(slot) if self._queue[0].repeats else True
            if answers:
                self._give(slot)
            elif answers is None:
                silent.append(slot)
        # One that hangs has an item's time for that, where nobody else is there.
        while self._queue and silent:
            self._give(silent.pop())
        self._idle[:0] = silent

    def _give(self, slot: _Slot) -> None:
        work = self._queue.popleft()
        work.due = time.monotonic() + self.item_timeout_s
        self._busy[slot.actor.work.remote(work.item)] = (slot, work)

    def _answers(self, slot: _Slot) -> bool | None:
        """Members may have died while they had nothing to do, and no item is to blame for that. None where one says
        nothing."""
        answer = slot.actor.answer.remote()
        try:
            if not ray.wait([answer], timeout=_ANSWER_S)[0]:
                return None
            ray.get(answer)
            return True
        except ACTOR_DIED as error:
            self._bury(slot, None, error)
            return False

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for slot, work in self._busy.values():
            if work is None and now >= slot.start_due:
                logger.warning(
                    "member %d of the %s has not been ready for %.0f s; it hangs, and is replaced",
                    *(slot.index, self.name, self._start_timeout_s),
                )
                slot.start_due, slot.ended_because = math.inf, "it was not ready in time"
                ray.kill(slot.actor)
            if work is not None and now >= work.due:
                logger.warning(
                    "member %d of the %s has had item %d for %.0f s; it hangs, and is replaced",
                    *(slot.index, self.name, work.ticket, self.item_timeout_s),
                )
                work.due, slot.ended_because = math.inf, f"it took more than {self.item_timeout_s:g} s"
                ray.kill(slot.actor)

    def _wait(self, seconds: float) -> list[Any]:
        if not self._busy:
            time.sleep(min(seconds, _PAUSE_S))
            return []
        timeout = None if seconds == math.inf else seconds
        return ray.wait(list(self._busy), num_returns=1, timeout=timeout)[0]

    def _take(self, reference: Any) -> list[tuple[int, Any]]:
        """The result of a reference that is ready, if it is one of work."""
        slot, work = self._busy.pop(reference)
        try:
            result = ray.get(reference)
        except ACTOR_DIED as error:
            self._bury(slot, work, error)
            return [] if work is None or work.repeats else [(work.ticket, GONE)]
        except RayTaskError as error:
            if work is not None:
                self._idle.append(slot)
            # Raised once what came back before it has been handed over.
            self._failed.append(error)
            return []
        self._idle.append(slot)
        if work is None:
            slot.pid, slot.failed_starts = result, 0
            logger.info("member %d of the %s is ready (pid %d)", slot.index, self.name, slot.pid)
            self._has_come_back()
            return []
        self._deaths_in_a_row = 0
        return [(work.ticket, result)]

    def _raise_failed(self) -> NoReturn:
        error = self._failed.pop()
        # Ray's error alone knows where in the member it happened.
        raise error.cause from error

    def _bury(self, slot: _Slot, work: _Work | None, error: RayError) -> None:
        """Put the work of a dead member back in front of the queue, and replace the member."""
        self.deaths += 1
        cause, is_ready = slot.ended_because or death_cause(error), slot.pid is not None
        # One that is only out of reach would keep its place.
        ray.kill(slot.actor)
        slot.pid = slot.actor = None
        at = "while it started" if not is_ready else "idle" if work is None else f"with item {work.ticket}"
        logger.warning("member %d of the %s died %s: %s; replacing it", slot.index, self.name, at, cause)
        if is_ready:
            self._count_death(work, cause, error)
        if work is None:
            pause_s = min(_PAUSE_S * 2**slot.failed_starts, _LONGEST_PAUSE_S)
            slot.failed_starts, slot.restart_at = slot.failed_starts + 1, time.monotonic() + pause_s
        else:
            if work.repeats:
                self._queue.appendleft(work)
            self._start(slot)
        if is_ready and not self.pids:
            self._gone_since, self._has_said = time.monotonic(), False

    def _count_death(self, work: _Work | None, cause: str, error: RayError) -> None:
        """Of a member that was ready. Raises: ClusterError where that is one too many."""
        self._deaths_in_a_row += 1
        with_item = ""
        if work is not None:
            work.deaths += 1
            with_item = f", {work.deaths} of them with item {work.ticket}"
        # All members may die at once while they wait for work, and are met one by one.
        most = self.max_deaths + len(self.slots)
        if self._deaths_in_a_row > most or (work is not None and work.deaths >= _ITEM_DEATHS):
            raise ClusterError(
                f"{self.name} members must outlive their items, and {self.deaths} have died{with_item}: {cause}; look "
                "at the item, the memory of the machines and the time-out of the pool"
            ) from error

    def _has_come_back(self) -> None:
        if self._gone_since is not None and not self._is_new:
            waited = time.monotonic() - self._gone_since
            logger.warning("the %s has a member again after %.1f s", self.name, waited)
        self._gone_since, self._limit_s, self._is_new = None, self.patience_s, False

    def _time_to_act(self) -> float:
        """Seconds until something is due even if no member answers."""
        now, due = time.monotonic(), [slot.restart_at for slot in self.slots if slot.restart_at is not None]
        due += [slot.start_due if work is None else work.due for slot, work in self._busy.values()]
        if self._gone_since is not None:
            due.append(self._gone_since + self._limit_s)
        return max(min(due) - now, _SHORTEST_WAIT_S) if due else math.inf

    def _check_not_gone(self) -> None:
        if self._gone_since is None:
            return
        if not self._has_said:
            self._has_said = True
            logger.warning(
                "all %d members of the %s are gone; waiting up to %.0f s for one to come back",
                *(len(self.slots), self.name, self._limit_s),
            )
        if time.monotonic() - self._gone_since > self._limit_s:
            raise PoolGoneError(
                f"the {self.name} needs at least one of its {len(self.slots)} members, and has had none for "
                f"{self._limit_s:.0f} s; nothing is lost: look at the machines and the log above, then start the "
                "same command again to go on"
            )


_NOTHING = object()
