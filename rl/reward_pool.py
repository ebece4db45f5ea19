"""The reward pool: workers that score groups, apart from learners and rollouts, and may die at any time."""

import asyncio
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from cluster.configuration import ClusterConfig, check_resources, check_seconds
from cluster.errors import ConfigError, GrailError, RewardError
from cluster.placement import Placement
from cluster.pool import Pool
from rl.reward_mix import MixedRewards, RewardTerm, check_rewards, mix, prepare_terms
from rl.rewards import RewardFunction, RewardSetting
from rl.types import Group, Reward

logger = logging.getLogger(__name__)

NAME = "reward pool"


@dataclass(frozen=True, kw_only=True)
class RewardPoolConfig:
    """Where completions are scored, and how long workers that score are waited for."""

    workers: int = 1
    """Processes that score completions; with 0 the first learner scores them itself."""
    cpus_per_worker: float = 1.0
    """Processor cores reserved for each; fractions share a core, for rewards that mostly wait."""
    gpus_per_worker: float = 0.0
    """Accelerators reserved for each; 0 scores on the processor."""
    groups_per_call: int | None = None
    """Users whose completions are scored together by one worker; None shares a batch out evenly."""
    wait_s: float = 60.0
    """How long a run waits for a reward worker when all have died; then it stops and can be resumed."""
    timeout_s: float = 600.0
    """How long a worker may take for the groups it was given; then it is replaced, and another scores them."""

    def __post_init__(self) -> None:
        if self.workers < 0 or (self.groups_per_call is not None and self.groups_per_call < 1):
            raise ConfigError(
                "reward.workers must be at least 0 and reward.groups-per-call at least 1, got "
                f"{self.workers} and {self.groups_per_call}"
            )
        check_resources("reward", cpus=self.cpus_per_worker, gpus=self.gpus_per_worker)
        check_seconds("reward.timeout-s", self.timeout_s)


@dataclass(kw_only=True)
class _Batch:
    """What was submitted together and is on its way."""

    num_parts: int
    parts: dict[int, "Scored"] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The rewards of some groups, by the names of the terms."""

    rewards: Mapping[str, Sequence[Reward]]
    seconds: Mapping[str, float]


class Rewards(ABC):
    """Scores batches of groups. `close` it, or use it as a context."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def submit(self, groups: Sequence[Group]) -> int:
        """Begin to score a batch; its ticket is for `collect`. It has at least one group, and all have
        equal sizes."""

    @abstractmethod
    def wait(self, ticket: int, timeout_s: float) -> bool:
        """Whether `collect` has nothing left to wait for; waits itself, but no longer than that.

        Raises: as `collect`.
        """

    @abstractmethod
    def collect(self, ticket: int) -> MixedRewards:
        """The rewards of a batch, added up; each ticket is collected once.

        Raises: RewardError naming reward and user, for a reward that fails or returns no reward.
        """

    @abstractmethod
    def close(self) -> None:
        """End the workers, if there are any."""


class OwnRewards(Rewards):
    """This process scores by itself, for machines too small for a pool and for notebooks."""

    def __init__(self, terms: Sequence[RewardTerm], setting: RewardSetting):
        self.terms = _prepared(terms, setting)
        self._score = build_scorer(self.terms, setting)
        self._batches: list[Sequence[Group]] = []

    def submit(self, groups: Sequence[Group]) -> int:
        self._batches.append(groups)
        return len(self._batches) - 1

    def wait(self, ticket: int, timeout_s: float) -> bool:
        """There is nobody to wait for: `collect` scores."""
        return True

    def collect(self, ticket: int) -> MixedRewards:
        groups, self._batches[ticket] = self._batches[ticket], ()
        return _mixed(self.terms, [self._score(groups)])

    def close(self) -> None:
        """There is no worker."""


def _prepared(terms: Sequence[RewardTerm], setting: RewardSetting) -> list[RewardTerm]:
    prepared = prepare_terms(terms, setting)
    for term in prepared:
        if constants := term.reward.to_log():
            logger.info("Reward %s: %s", term.name, ", ".join(f"{k} {v}" for k, v in constants.items()))
    return prepared


def _mixed(terms: Sequence[RewardTerm], parts: Sequence["Scored"]) -> MixedRewards:
    rewards = {term.name: [reward for part in parts for reward in part.rewards[term.name]] for term in terms}
    seconds = {f"{term.name}/seconds": sum(part.seconds[term.name] for part in parts) for term in terms}
    return mix(terms, rewards).reporting(seconds)


class RewardPool(Rewards):
    """Scores batches of groups; several may be on their way, and work is lost by no death of a worker.

    Example:
        with RewardPool(terms, setting, config=config, cluster=cluster) as pool:
            ticket = pool.submit(completions.groups())
            ...
            advantages = pool.collect(ticket).advantages(estimator)
    """

    def __init__(
        self,
        terms: Sequence[RewardTerm],
        setting: RewardSetting,
        *,
        config: RewardPoolConfig,
        cluster: ClusterConfig,
        placement: Placement | None = None,
    ):
        """`placement` is where an actor that keeps the pool must put its workers, see `cluster.pool`.

        Raises: ConfigError for terms that cannot work, before any worker is started."""
        self.terms = _prepared(terms, setting)
        self.config = config
        self._pool = Pool(
            *(
                build_scorer,
                self.terms,
                replace(setting, device="cuda:0") if config.gpus_per_worker else setting,
            ),
            members=config.workers,
            cluster=cluster,
            cpus_per_member=config.cpus_per_worker,
            gpus_per_member=config.gpus_per_worker,
            patience_s=config.wait_s,
            item_timeout_s=config.timeout_s,
            name=NAME,
            placement=placement,
        )
        self._batches: dict[int, _Batch] = {}
        self._part_of: dict[int, tuple[int, int]] = {}
        self._next_ticket = 0

    @property
    def pids(self) -> list[int]:
        """Processes of the workers that are ready."""
        return self._pool.pids

    def submit(self, groups: Sequence[Group]) -> int:
        """Returns at once."""
        size = self.config.groups_per_call or -(-len(groups) // self.config.workers)
        starts = range(0, len(groups), max(size, 1))
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._batches[ticket] = _Batch(num_parts=len(starts))
        for number, start in enumerate(starts):
            part = self._pool.submit(list(groups[start : start + size]))
            self._part_of[part] = ticket, number
        return ticket

    def wait(self, ticket: int, timeout_s: float) -> bool:
        batch = self._batches[ticket]
        if len(batch.parts) < batch.num_parts:
            self._receive(timeout_s)
        return len(batch.parts) == batch.num_parts

    def collect(self, ticket: int) -> MixedRewards:
        """Raises: as `Rewards`; PoolGoneError if there was no worker for too long; ClusterError if they keep dying."""
        while not self.wait(ticket, math.inf):
            pass
        batch = self._batches.pop(ticket)
        return _mixed(self.terms, [batch.parts[number] for number in range(batch.num_parts)])

    def close(self) -> None:
        self._pool.close()

    def _receive(self, timeout_s: float) -> None:
        for part, scored in self._pool.poll(timeout_s):
            ticket, number = self._part_of.pop(part)
            self._batches[ticket].parts[number] = scored


def build_scorer(terms: Sequence[RewardTerm], setting: RewardSetting) -> Callable[[Sequence[Group]], Scored]:
    """What a worker of the pool does with some groups: all rewards at once, each checked."""
    functions = {term.name: term.reward.build(setting) for term in terms}
    return lambda groups: asyncio.run(_score_all(functions, groups))


async def _score_all(functions: Mapping[str, RewardFunction], groups: Sequence[Group]) -> Scored:
    found = await asyncio.gather(*(_score(name, function, groups) for name, function in functions.items()))
    rewards, seconds = zip(*found, strict=True)
    return Scored(
        rewards=dict(zip(functions, rewards, strict=True)), seconds=dict(zip(functions, seconds, strict=True))
    )


async def _score(
    name: str, function: RewardFunction, groups: Sequence[Group]
) -> tuple[Sequence[Reward], float]:
    started = time.perf_counter()
    rewards = await _call(name, function, groups)
    check_rewards(name, function, groups, rewards)
    return rewards, time.perf_counter() - started


async def _call(name: str, function: RewardFunction, groups: Sequence[Group]) -> Sequence[Reward]:
    """A reward may be anyone's code and raise anything; the error names the first user it fails for."""
    try:
        return await function.score(groups)
    except Exception as error:
        # Ours say themselves what to do.
        advice = "" if isinstance(error, GrailError) else "; mend the reward"
        if len(groups) == 1:
            raise RewardError(
                f"the reward {name} failed for user row {groups[0].user_row} (prompt {groups[0].serial}): "
                f"{type(error).__name__}: {error}{advice}"
            ) from error
        for group in groups:
            await _call(name, function, [group])
        users = ", ".join(str(group.user_row) for group in groups)
        raise RewardError(
            f"the reward {name} failed for the user rows {users} together, and for none of them alone: "
            f"{type(error).__name__}: {error}{advice}"
        ) from error
