"""GenRec: learns to write whole pages of semantic IDs, small, for the pages of the synthetic world."""

from cluster.configuration import ClusterConfig
from data_streams.configuration import DataConfig
from models.genrec import GenRec
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=100, tokens_per_step=1024, pages="auto"),
        model=GenRec.Config(width=64, num_blocks=2, feedforward_width=256),
        train=TrainConfig(epochs=5, learning_rate=2e-3, checkpoint_every_s=10.0),
        cluster=ClusterConfig(workers=2),
    )
