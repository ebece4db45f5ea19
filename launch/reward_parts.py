"""Puts the rewards of a run together: names become options, and named runs their configurations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster.plugins import plugin_config
from launch.run_directory import absolute, load_config

if TYPE_CHECKING:
    from rl.reward_mix import RewardTerm
    from rl.rewards import RewardSetting

REWARDS = "rl.rewards"


def reward_term(name: str, *, weight: float = 1.0, direct: bool = False, **options: Any) -> "RewardTerm":
    """A reward by the name of its file. Raises: ConfigError if there is none of that name."""
    from rl.reward_mix import RewardTerm

    return RewardTerm(name=name, reward=plugin_config(REWARDS, name)(**options), weight=weight, direct=direct)


def reward_setting(terms: Sequence["RewardTerm"], *, data_path: str, seed: int = 0) -> "RewardSetting":
    """What the rewards are built from, with the configuration of every trained run they name.

    Raises: ConfigError where a reward needs a run and names none; CheckpointError where there is no such run.
    """
    from rl.rewards import RewardSetting

    names = {name for term in terms for name in term.reward.run_names()}
    runs = {name: load_config(name) for name in sorted(names)}
    return RewardSetting(data_path=absolute(data_path), seed=seed, runs=runs)
