"""PROMISE with the published sizes (width 256, history 40), for the small Amazon 5-core sets, on two workers.

The process reward has a likeness of user and prefix, which is ours; --model.prm.likeness-negatives None leaves it out.
"""

from cluster.configuration import ClusterConfig
from data_streams.configuration import DataConfig
from models.path_reward import ProcessRewardConfig
from models.promise import Promise
from trainer.configuration import PretrainConfig, SearchConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=40, tokens_per_step=1024),
        model=Promise.Config(
            width=256,
            num_blocks=2,
            num_decoder_blocks=2,
            feedforward_width=512,
            prm=ProcessRewardConfig(
                width=64, feedforward_width=128, num_negatives=128, positions=2, likeness_negatives=2048
            ),
        ),
        train=TrainConfig(
            epochs=10,
            learning_rate=1e-3,
            table_learning_rate=0.07,
            weight_decay=0.05,
            validate_every_epochs=5,
            checkpoint_every_s=30.0,
        ),
        search=SearchConfig(prm=True),
        cluster=ClusterConfig(workers=2),
    )
