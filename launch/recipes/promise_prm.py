"""A process reward model alone, for a generator that stays as it is: --init-from its run gives it the encoder."""

from dataclasses import fields, replace

from launch.recipes import promise
from models.process_reward import ProcessReward, RewardedHistoryConfig
from trainer.configuration import PretrainConfig


def recipe() -> PretrainConfig:
    """The encoder's options must be those of the generator's run."""
    base = promise.recipe()
    shared = {entry.name: getattr(base.model, entry.name) for entry in fields(RewardedHistoryConfig)}
    return replace(
        base,
        model=ProcessReward.Config(**shared),
        train=replace(base.train, learning_rate=1e-3),
        search=replace(base.search, validation_width=5),
    )
