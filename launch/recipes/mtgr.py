"""MTGR, a ranker that scores all candidates of a user in one pass; needs exposures on recorded pages, with times.

With an auxiliary loss that the paper has not: a few thousand users answer too little to learn from that alone.
"""

from data_streams.configuration import DataConfig
from models.mtgr import MTGR
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=400, tokens_per_step=4096, history_exposures=True),
        model=MTGR.Config(auxiliary_weight=1.0),
        train=TrainConfig(
            epochs=8,
            learning_rate=3e-3,
            table_learning_rate=0.2,
            selection_metric="auc",
        ),
    )
