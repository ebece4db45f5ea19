"""GenRec on made-up pages, cut anew in each epoch, for the small Amazon 5-core sets, on two workers."""

from cluster.configuration import ClusterConfig
from data_streams.configuration import DataConfig
from models.genrec import GenRec
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(
            max_length=50, tokens_per_step=1024, pages="count", page_events=2, page_borders="drawn"
        ),
        model=GenRec.Config(),
        train=TrainConfig(
            epochs=30,
            learning_rate=1.5e-3,
            weight_decay=0.05,
            checkpoint_every_s=30.0,
        ),
        cluster=ClusterConfig(workers=2),
    )
