"""TIGER over text semantic IDs, for the small Amazon 5-core sets and half an hour on two cores: two workers."""

from cluster.configuration import ClusterConfig
from data_streams.configuration import DataConfig
from models.tiger import Tiger
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=20, tokens_per_step=512),
        model=Tiger.Config(
            encoder="causal",
            num_encoder_blocks=3,
            num_decoder_blocks=2,
            num_heads=4,
            head_width=32,
            feedforward_width=512,
        ),
        train=TrainConfig(
            epochs=14,
            learning_rate=1.5e-3,
            weight_decay=0.05,
            validate_every_epochs=7,
            checkpoint_every_s=30.0,
        ),
        cluster=ClusterConfig(workers=2),
    )
