"""Process rewards: a frozen process reward model (PRM) scores every prefix of every completion.

The PRM is a snapshot with its own encoder, so that the policy may train on: PROMISE (Kuaishou, 2026; industrial.md 2)
trains it. RECONSTRUCTED: its scores are the rewards as they are; step-wise advantages normalise them at each depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cluster.errors import ConfigError, DataError
from data_streams.batch import SequenceBatch
from data_streams.semantic_ids import SemanticIdTable
from models.tables import Ids, Rows
from rl.group_batch import completed_paths, history_batch
from rl.rewards import RewardFunction, RewardOptions, RewardSetting
from rl.types import Group, Reward
from trainer.frozen import FrozenRun, frozen_step, load_frozen, model_class


@runtime_checkable
class PrefixScorer(Protocol):
    """What the model of a PRM run must offer."""

    def prefix_ids(self, batch: SequenceBatch, paths: Tensor) -> Ids:
        """What `prefix_scores` looks up. Shapes: paths [B, N, L]."""

    def prefix_scores(self, rows: Rows, batch: SequenceBatch, paths: Tensor) -> Tensor:
        """How promising each prefix of each path is after the history. Shapes: paths [B, N, L] -> [B, N, L]."""


class Process(RewardFunction):
    """Shapes: [G, L] per group, the scores of the PRM, which have no bounds.

    Raises: ConfigError for a run whose model scores no prefixes; DataError for one of other semantic IDs.
    """

    of_codes = True

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardOptions):
        run: str = ""
        """Directory of the run whose model is the PRM."""
        checkpoint: str = "best"
        """latest, best or the number of a step."""

        @property
        def rewards_codes(self) -> bool:
            return True

        def run_names(self) -> tuple[str, ...]:
            if not self.run:
                raise ConfigError(
                    "the process reward needs a trained PRM: give its run directory with "
                    "--rewards.process.run"
                )
            return (self.run,)

        def prepared(self, setting: RewardSetting) -> "Process.Config":
            config = setting.runs[self.run]
            require_prefix_scorer(model_class(config), config.run_dir)
            # That run may train on, and a worker that takes the place of another must reward as that one did.
            return replace(self, checkpoint=frozen_step(config, self.checkpoint))

        def build(self, setting: RewardSetting) -> "Process":
            process = Process(load_frozen(setting.runs[self.run], self.checkpoint, setting.device))
            check_semantic_ids(process.frozen, SemanticIdTable.load(setting.semantic_ids))
            return process

    def __init__(self, frozen: FrozenRun):
        require_prefix_scorer(type(frozen.model), frozen.config.run_dir)
        self.frozen = frozen

    @torch.no_grad()
    async def score(self, groups: Sequence[Group]) -> list[Reward]:
        data, paths = self.frozen.config.data, completed_paths(groups)
        batch = history_batch(groups, max_length=data.max_length, columns=data.columns)
        rows = self.frozen.lookup(self.frozen.model.prefix_ids(batch, paths))
        device = self.frozen.device
        scores = self.frozen.model.prefix_scores(rows, batch.to(device), paths.to(device))
        return [Reward.of(values) for values in scores.float().cpu().numpy()]


def require_prefix_scorer(kind: type, run_dir: str) -> None:
    """Raises: ConfigError where the model of a run is of a class that scores no prefixes."""
    if not issubclass(kind, PrefixScorer):
        raise ConfigError(
            f"{run_dir} holds a {kind.__name__}, which does not score prefixes; a process reward needs a model with "
            "`prefix_ids` and `prefix_scores`"
        )


def check_semantic_ids(frozen: FrozenRun, table: SemanticIdTable) -> None:
    """Codes and item rows must mean the same to the PRM and to the policy, or its scores are of other items.

    Raises: DataError for a run with another table.
    """
    own = None if frozen.semantic_ids is None else frozen.semantic_ids.fingerprint
    if own != table.fingerprint:
        raise DataError(
            f"a process reward model must know the semantic IDs of the policy, {table.fingerprint}, and that of "
            f"{frozen.config.run_dir} was trained with {own or 'none'}; train one for this table"
        )
