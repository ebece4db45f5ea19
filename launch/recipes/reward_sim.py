"""A model of how users answer what they are shown (SIM), the dense reward of alignment; needs exposures."""

from data_streams.configuration import DataConfig
from models.reward_sim import RewardSim
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=400, tokens_per_step=4096, history_exposures=True),
        model=RewardSim.Config(),
        train=TrainConfig(
            epochs=2,
            learning_rate=1e-2,
            table_learning_rate=0.2,
            selection_metric="auc",
        ),
    )
