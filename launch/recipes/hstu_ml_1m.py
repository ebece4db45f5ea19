"""HSTU for MovieLens-1M, without times (the public preprocessed form has only the order of events)."""

from cluster.configuration import ClusterConfig
from data_streams.configuration import DataConfig
from models.hstu import HSTU
from models.objectives.full_softmax import FullSoftmax
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=200, tokens_per_step=8192),
        model=HSTU.Config(width=64, num_blocks=2, num_heads=1, dropout=0.2, time_bias=False),
        objective=FullSoftmax.Config(temperature=0.05),
        train=TrainConfig(
            epochs=24,
            learning_rate=2e-3,
            table_learning_rate=0.2,
            validate_every_steps=400,
            checkpoint_every_s=30.0,
        ),
        cluster=ClusterConfig(workers=1, cpus_per_worker=2),
    )
