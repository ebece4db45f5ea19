"""Climber-Pilot: several next items at once, with recent events hidden, as a page is asked for."""

from cluster.configuration import ClusterConfig
from data_streams.configuration import DataConfig
from models.climber_pilot import ClimberPilot
from models.objectives.sampled_softmax import SampledSoftmax
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=50, tokens_per_step=1024),
        model=ClimberPilot.Config(width=256, num_blocks=1, num_heads=4, dropout=0.5, num_branches=2),
        objective=SampledSoftmax.Config(num_negatives=2048),
        train=TrainConfig(epochs=10, learning_rate=1.5e-3, table_learning_rate=0.07, checkpoint_every_s=10.0),
        cluster=ClusterConfig(workers=2),
    )
