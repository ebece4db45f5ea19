"""MTGR, a ranker that scores all candidates of a user in one pass; needs exposures on recorded pages, with times."""

from data_streams.configuration import DataConfig
from models.mtgr import MTGR
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=400, tokens_per_step=4096, history_exposures=True),
        model=MTGR.Config(),
        train=TrainConfig(
            epochs=2,
            learning_rate=3e-3,
            table_learning_rate=0.2,
            selection_metric="auc",
        ),
    )
