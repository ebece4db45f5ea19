"""PROMISE: semantic IDs written by a decoder and chosen by a process reward model, small, for the synthetic world.

The reward has a likeness of user and prefix, which is ours; --model.prm.likeness-negatives None leaves it out.
"""

from cluster.configuration import ClusterConfig
from data_streams.configuration import DataConfig
from models.path_reward import ProcessRewardConfig
from models.promise import Promise
from trainer.configuration import PretrainConfig, SearchConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=50, tokens_per_step=1024),
        model=Promise.Config(
            width=64,
            num_blocks=2,
            num_decoder_blocks=2,
            feedforward_width=256,
            dropout=0.2,
            prm=ProcessRewardConfig(
                width=32, feedforward_width=128, num_negatives=64, positions=4, likeness_negatives=2048
            ),
        ),
        train=TrainConfig(epochs=5, learning_rate=2e-3, checkpoint_every_s=10.0),
        search=SearchConfig(prm=True),
        cluster=ClusterConfig(workers=2),
    )
