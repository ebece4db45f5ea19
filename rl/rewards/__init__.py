"""Rewards: one file each, stateless and scored in batches, so that any worker can score any group again."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rl.types import Group, Reward
from trainer.configuration import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class RewardSetting:
    """What a reward may be built from; small, since it travels to every worker."""

    data_path: str
    """Folder or address of the shards whose item rows the groups speak of."""
    semantic_ids: str = ""
    """Folder of the items' semantic IDs, whose paths the groups hold."""
    seed: int = 0
    device: str = "cpu"
    """Where trained models score."""
    runs: Mapping[str, PretrainConfig] = field(default_factory=dict)
    """Configuration of every trained run that a reward names; filled in where the parts are put together."""


class RewardFunction(ABC):
    """Scores groups; keeps nothing between calls that matters."""

    of_codes: bool = False
    """Whether it rewards every prefix, [G, L], or whole completions, [G]."""

    @abstractmethod
    async def score(self, groups: Sequence[Group]) -> list[Reward]:
        """One reward for each group, in their order."""


@dataclass(frozen=True, kw_only=True)
class RewardOptions(ABC):
    """The configuration of a reward."""

    reads_positive_features: ClassVar[bool] = False
    """Whether it reads columns of the observed positives, which prompts of pages do not carry."""

    @property
    def rewards_codes(self) -> bool:
        """The `of_codes` of what it builds."""
        return False

    def run_names(self) -> tuple[str, ...]:
        """Directories of the trained runs it needs, for `RewardSetting.runs`."""
        return ()

    def prepared(self, setting: RewardSetting) -> "RewardOptions":
        """The same options with what is computed once, before any worker is started."""
        return self

    @abstractmethod
    def build(self, setting: RewardSetting) -> RewardFunction:
        """Called once in each worker."""

    def to_log(self) -> dict[str, Any]:
        """Constants that were computed and belong into the log."""
        return {}
