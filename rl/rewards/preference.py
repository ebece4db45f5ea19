"""The dense preference reward: how likely the user answers an item, by a frozen model of logged behaviour.

The model is trained by `grail pretrain reward-sim` and calibrated by `grail evaluate`. Illegal completions get 0.

Source: r_pref of GenRec (JD.com, 2026; industrial.md 1.4), a SIM-style ranking model; with several actions their
weighted mean, like the P-Score of OneRec. RECONSTRUCTED: a mean instead of a fusion network.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from cluster.errors import ConfigError, DataError
from data_streams.item_table import ItemTable
from models.recommender import Ranker
from rl.group_batch import completed_items, history_batch
from rl.rewards import RewardFunction, RewardOptions, RewardSetting
from rl.types import Group, Reward
from trainer.calibration import Calibration
from trainer.frozen import FrozenRun, frozen_step, load_frozen, model_class


class Preference(RewardFunction):
    """Shapes: [G] in 0..1 per group.

    Raises: ConfigError for another kind of model or unfit weights; DataError for a model of another catalogue.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardOptions):
        run: str = ""
        """Directory of a run of `grail pretrain reward-sim`."""
        checkpoint: str = "best"
        """latest, best or the number of a step."""
        weights: tuple[float, ...] = ()
        """How much each action of the model counts; left out, the first one (a click) alone."""

        def run_names(self) -> tuple[str, ...]:
            if not self.run:
                raise ConfigError(
                    "the preference reward needs a trained reward model: give its run directory with "
                    "--rewards.preference.run, within hybrid --rewards.hybrid.preference.run (train one with `grail "
                    "pretrain reward-sim`)"
                )
            return (self.run,)

        def prepared(self, setting: RewardSetting) -> "Preference.Config":
            config = setting.runs[self.run]
            require_ranker(model_class(config), config.run_dir)
            # That run may train on, and a worker that takes the place of another must reward as that one did.
            return replace(self, checkpoint=frozen_step(config, self.checkpoint))

        def build(self, setting: RewardSetting) -> "Preference":
            config = setting.runs[self.run]
            frozen = load_frozen(config, self.checkpoint, setting.device)
            check_run(frozen, ItemTable.load(setting.data_path), setting.data_path)
            calibration = Calibration.load(
                config.run_dir, frozen.model.actions, step=frozen.step, data_path=config.data.path
            )
            return Preference(self, frozen, calibration)

    def __init__(self, config: Config, frozen: FrozenRun, calibration: Calibration):
        actions = frozen.model.actions
        weights = config.weights or (1.0, *[0.0] * (len(actions) - 1))
        if len(weights) != len(actions) or min(weights) < 0 or not sum(weights):
            raise ConfigError(
                f"the preference reward needs a weight for each of {', '.join(actions)}, none below 0 and one above, "
                f"got {config.weights}"
            )
        self.frozen, self.calibration = frozen, calibration
        self.weights = torch.tensor(weights) / sum(weights)

    async def score(self, groups: Sequence[Group]) -> list[Reward]:
        return [Reward.of(values) for values in self.preferences(groups)]

    @torch.no_grad()
    def preferences(self, groups: Sequence[Group]) -> np.ndarray:
        """Shapes: [B, G] float32 in 0..1, 0 for illegal completions."""
        model, items = self.frozen.model, completed_items(groups)
        batch = history_batch(groups, max_length=self.frozen.config.data.max_length)
        rows = self.frozen.lookup(model.candidate_ids(batch, items))
        device = self.frozen.device
        logits = model.logits(rows, batch.to(device), items.to(device)).cpu()
        probabilities = self.calibration.probabilities(logits)
        return torch.where(items >= 0, probabilities @ self.weights, 0.0).numpy()


def check_run(frozen: FrozenRun, items: ItemTable, data_path: str) -> None:
    """Item rows must mean the same to the reward model and to the policy.

    Raises: ConfigError for another kind of model, DataError for another catalogue.
    """
    require_ranker(type(frozen.model), frozen.config.run_dir)
    if frozen.items.fingerprint != items.fingerprint:
        raise DataError(
            f"the reward model of {frozen.config.run_dir} was trained on another catalogue than {data_path}; train "
            "both on shards with the same items in the same order"
        )


def require_ranker(kind: type, run_dir: str) -> None:
    """Raises: ConfigError where the model of a run is of a class that scores no given items."""
    if not issubclass(kind, Ranker):
        raise ConfigError(
            f"{run_dir} holds a {kind.__name__}, and a preference is scored by a model of given items; train one with "
            "`grail pretrain reward-sim`"
        )
