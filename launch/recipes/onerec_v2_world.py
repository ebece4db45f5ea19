"""OneRec-V2 at the size of the synthetic world, with play times, on two workers."""

from cluster.configuration import ClusterConfig
from data_streams.configuration import DataConfig
from models.layers.feedforward import FeedForwardConfig
from models.layers.user_context import ContextConfig
from models.onerec_v2 import OneRecV2
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=100, tokens_per_step=4096),
        model=OneRecV2.Config(
            width=64,
            num_blocks=3,
            num_heads=2,
            feedforward=FeedForwardConfig(hidden=176),
            context=ContextConfig(hidden=128, play_time=True, short_length=20),
            dropout=0.1,
        ),
        train=TrainConfig(
            epochs=10,
            learning_rate=2e-3,
            table_learning_rate=0.07,
            checkpoint_every_s=30.0,
        ),
        cluster=ClusterConfig(workers=2),
    )
