"""A model of how users answer what they are shown (SIM), the dense reward of alignment; needs exposures."""

from data_streams.configuration import DataConfig
from models.reward_sim import RewardSim
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=400, tokens_per_step=8192),
        model=RewardSim.Config(),
        train=TrainConfig(
            epochs=3,
            learning_rate=3e-3,
            table_learning_rate=0.1,
            patience=1,
            selection_metric="auc",
        ),
    )
