"""OneRec, point-wise, at the size of the small Amazon 5-core sets, on two workers."""

from cluster.configuration import ClusterConfig
from data_streams.configuration import DataConfig
from models.onerec import OneRec
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=50, tokens_per_step=1024),
        # With the 0.02 of larger models the loss of the first code stays that of popular codes for a hundred steps and more.
        model=OneRec.Config(targets_per_user=10, init_scale=0.05),
        train=TrainConfig(
            epochs=20,
            learning_rate=1.5e-3,
            table_learning_rate=0.07,
            weight_decay=0.05,
            checkpoint_every_s=30.0,
        ),
        cluster=ClusterConfig(workers=2),
    )
