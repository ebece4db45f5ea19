"""GRU4Rec with sampled softmax: sessions, or histories in which the last few events tell most."""

from data_streams.configuration import DataConfig
from models.gru4rec import GRU4Rec
from models.objectives.sampled_softmax import SampledSoftmax
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=50, tokens_per_step=2048),
        model=GRU4Rec.Config(width=128),
        # Negatives are drawn as published: popular items more often, and the scores corrected for that.
        objective=SampledSoftmax.Config(num_negatives=2048, popularity_share=1.0, log_q=True),
        train=TrainConfig(epochs=10, learning_rate=2e-3, table_learning_rate=0.07, patience=3),
    )
