"""Several rewards of a run: checked, weighed, added up, and each reported by itself.

Shapes: B groups of G completions, L codes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import ConfigError, RewardError
from rl.advantages import AdvantageEstimator
from rl.rewards import RewardFunction, RewardOptions, RewardSetting
from rl.types import Advantages, Group, Reward, stack


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """One reward of the mix."""

    name: str
    """What it is called in logs; usually that of its file."""
    reward: Any
    """Config of the reward; its type chooses the reward."""
    weight: float = 1.0
    """What its values are multiplied with."""
    direct: bool = False
    """Add it to the advantages as it is, instead of to the rewards they are computed from."""


@dataclass(frozen=True, kw_only=True)
class MixedRewards:
    """The rewards of a batch, ready for advantages."""

    values: np.ndarray
    """[B, G], or [B, G, L] where a reward speaks of codes: then those of whole completions stand at the last one."""
    mask: np.ndarray
    """[B, G] bool: completions that some reward has an opinion of."""
    direct: np.ndarray
    """[B, G] what is added to the advantages, or [B, G, L] where a direct reward speaks of codes."""
    direct_mask: np.ndarray
    """[B, G] bool."""
    report: Mapping[str, float]
    """Per reward NAME/mean, NAME/spread (mean standard deviation within a group), NAME/share (of the weighted
    spread of all) and, from a pool, NAME/seconds of work."""

    def reporting(self, numbers: Mapping[str, float]) -> "MixedRewards":
        """The same with more numbers in the report."""
        return dataclasses.replace(self, report={**self.report, **numbers})

    def advantages(self, estimator: AdvantageEstimator) -> Advantages:
        """Those of the estimator, with the direct terms added."""
        found = estimator(self.values, self.mask)
        if not self.direct_mask.any():
            return found
        values, added = found.values, self.direct
        if values.ndim != added.ndim:
            values, added = (part if part.ndim == 3 else part[..., None] for part in (values, added))
        return Advantages(
            values=(values + added).astype(np.float32),
            mask=found.mask | self.direct_mask,
            skipped=found.skipped & ~self.direct_mask.any(1),
        )


def check_terms(terms: Sequence[RewardTerm]) -> None:
    """Raises: ConfigError if there are none, two have the same name, or a weight says nothing."""
    names = [term.name for term in terms]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"alignment needs at least one reward, each with a name of its own; got {names}")
    if all(term.direct for term in terms):
        raise ConfigError("at least one reward must not be direct: advantages are computed from the others")
    for term in terms:
        if not np.isfinite(term.weight) or term.weight == 0:
            raise ConfigError(
                f"the weight of the reward {term.name} must be a number other than 0, got {term.weight}"
            )


def prepare_terms(terms: Sequence[RewardTerm], setting: RewardSetting) -> list[RewardTerm]:
    """With what rewards compute once (thresholds), before any worker is started."""
    check_terms(terms)
    return [dataclasses.replace(term, reward=_options(term).prepared(setting)) for term in terms]


def _options(term: RewardTerm) -> RewardOptions:
    if not isinstance(term.reward, RewardOptions):
        raise ConfigError(
            f"the reward {term.name} must be configured by one of rl/rewards, got {term.reward!r}"
        )
    return term.reward


def check_rewards(
    name: str, function: RewardFunction, groups: Sequence[Group], rewards: Sequence[Reward]
) -> None:
    """Raises: RewardError naming reward and user, for another number, a wrong shape or values that are not finite."""
    if len(rewards) != len(groups):
        raise RewardError(
            f"the reward {name} must return one reward for each of {len(groups)} groups, and returned {len(rewards)}; "
            "mend the reward"
        )
    for group, reward in zip(groups, rewards, strict=True):
        expected = (group.size, group.num_levels) if function.of_codes else (group.size,)
        values, mask = np.asarray(reward.values), np.asarray(reward.mask)
        whose = f"user row {group.user_row} (prompt {group.serial})"
        if values.shape != expected or mask.shape != expected[:1] or mask.dtype != bool:
            raise RewardError(
                f"the reward {name} must return values {expected} and a bool mask {expected[:1]} for {whose}, and "
                f"returned {values.shape} and {mask.dtype} {mask.shape}; mend the reward"
            )
        if not np.isfinite(values[mask]).all():
            place = int((~np.isfinite(values.reshape(group.size, -1)).all(1) & mask).argmax())
            raise RewardError(
                f"the reward {name} must be finite, and is {values[place]} for {whose}, completion {place} (item row "
                f"{group.items[place]}); mend the reward"
            )


def mix(terms: Sequence[RewardTerm], rewards: Mapping[str, Sequence[Reward]]) -> MixedRewards:
    """Add up the rewards of the same groups, given by the names of the terms."""
    stacked = {term.name: stack(rewards[term.name]) for term in terms}
    first_mask = stacked[terms[0].name][1]
    mask, direct_mask = np.zeros(first_mask.shape, bool), np.zeros(first_mask.shape, bool)
    values, direct = (
        np.zeros(_widest([stacked[term.name][0] for term in terms if term.direct is is_direct], mask))
        for is_direct in (False, True)
    )
    for term in terms:
        own, own_mask = stacked[term.name]
        weighted = term.weight * np.where(own_mask if own.ndim == 2 else own_mask[..., None], own, 0.0)
        if term.direct:
            direct += weighted if own.ndim == direct.ndim else weighted[..., None]
            direct_mask |= own_mask
            continue
        mask |= own_mask
        if own.ndim == values.ndim:
            values += weighted
        else:
            values[..., -1] += weighted
    return MixedRewards(
        values=values.astype(np.float32),
        mask=mask,
        direct=direct.astype(np.float32),
        direct_mask=direct_mask,
        report=_report(terms, stacked),
    )


def _widest(rewards: Sequence[np.ndarray], mask: np.ndarray) -> tuple[int, ...]:
    """[B, G, L] where one of them speaks of codes, else [B, G]."""
    return next((values.shape for values in rewards if values.ndim == 3), mask.shape)


def _report(
    terms: Sequence[RewardTerm], stacked: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, float]:
    report, spreads = {}, {}
    for term in terms:
        values, mask = stacked[term.name]
        of_items = values if values.ndim == 2 else values.sum(-1)
        shown = np.ma.masked_array(of_items, ~mask)
        report[f"{term.name}/mean"] = float(np.ma.filled(shown.mean(), 0.0))
        report[f"{term.name}/spread"] = float(np.ma.filled(shown.std(axis=1).mean(), 0.0))
        spreads[term.name] = abs(term.weight) * report[f"{term.name}/spread"]
    total = sum(spreads.values())
    return report | {f"{name}/share": spread / total if total else 0.0 for name, spread in spreads.items()}
