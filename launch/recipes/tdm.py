"""TDM: a tree over the items and a deep model of user and node, small; its tree comes from grail tokenize tree."""

from data_streams.configuration import DataConfig
from models.tdm import TDM
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=50, tokens_per_step=2048),
        model=TDM.Config(windows=(10, 5, 2, 2, 1, 1, 1), num_negatives=60, positions=4),
        train=TrainConfig(epochs=10, learning_rate=2e-3, table_learning_rate=0.07, patience=3),
    )
