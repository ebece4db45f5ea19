"""Climber-Pilot fine-tuned to serve under conditions (categories): give --init-from RUN of climber-pilot."""

from dataclasses import replace

from launch.recipes import climber_pilot
from trainer.configuration import PretrainConfig


def recipe() -> PretrainConfig:
    """The paper's rate is 1e-5 on billions of events; on data of this size that moves nothing."""
    base = climber_pilot.recipe()
    return replace(
        base,
        model=replace(base.model, condition_column="categories"),
        train=replace(base.train, epochs=3, learning_rate=3e-4, table_learning_rate=0.01),
        evaluation=replace(base.evaluation, condition="attention"),
    )
