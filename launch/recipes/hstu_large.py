"""HSTU-large in the published shape for MovieLens-1M: eight layers of two heads, width 50; for an accelerator."""

from data_streams.configuration import DataConfig
from models.hstu import HSTU
from models.objectives.full_softmax import FullSoftmax
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=200, tokens_per_step=16_384),
        model=HSTU.Config(
            width=50,
            num_blocks=8,
            num_heads=2,
            attention_dim=25,
            value_dim=25,
            dropout=0.2,
            time_bias=False,
        ),
        objective=FullSoftmax.Config(temperature=0.05),
        train=TrainConfig(epochs=100, learning_rate=1e-3, table_learning_rate=0.07, validate_every_steps=400),
    )
