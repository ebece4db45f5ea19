"""Decoder-only generation of semantic IDs, tuned for the small Amazon 5-core sets, on two workers."""

from cluster.configuration import ClusterConfig
from data_streams.configuration import DataConfig
from models.decoder_only import DecoderOnly
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=50, tokens_per_step=1024),
        model=DecoderOnly.Config(num_depth_blocks=1),
        train=TrainConfig(
            epochs=10,
            learning_rate=1.5e-3,
            table_learning_rate=0.07,
            weight_decay=0.05,
            validate_every_epochs=5,
            checkpoint_every_s=30.0,
        ),
        cluster=ClusterConfig(workers=2),
    )
