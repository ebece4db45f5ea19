"""HSTU-large in the published shape for MovieLens-1M, eight layers of two heads, for an accelerator.

The width is 52 instead of the published 50, since rows of tables have a multiple of 4 numbers. As in `hstu-ml-1m`,
events have no times (`--model.time-bias` where they do), all items are scored instead of 128 negatives, and the table
has a rate of its own; the rates fall with a cosine instead of being constant.
"""

from data_streams.configuration import DataConfig
from models.hstu import HSTU
from models.objectives.full_softmax import FullSoftmax
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=200, tokens_per_step=16_384),
        model=HSTU.Config(
            width=52,
            num_blocks=8,
            num_heads=2,
            attention_dim=26,
            value_dim=26,
            dropout=0.2,
            time_bias=False,
        ),
        objective=FullSoftmax.Config(temperature=0.05),
        train=TrainConfig(epochs=100, learning_rate=1e-3, table_learning_rate=0.07, validate_every_steps=400),
    )
