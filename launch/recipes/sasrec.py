"""SASRec with sampled softmax: a good first model on any data."""

from data_streams.configuration import DataConfig
from models.objectives.sampled_softmax import SampledSoftmax
from models.sasrec import SASRec
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=50, tokens_per_step=2048),
        model=SASRec.Config(width=64, num_blocks=2, num_heads=2, dropout=0.2),
        objective=SampledSoftmax.Config(num_negatives=1024),
        train=TrainConfig(epochs=10, learning_rate=1e-3, table_learning_rate=0.07, patience=3),
    )
