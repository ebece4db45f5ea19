"""OneRec-V2 in its published shapes, --model.size 0.1b to 8b and 4b-a0.5b; for accelerators."""

from data_streams.configuration import DataConfig
from models.layers.user_context import ContextConfig
from models.onerec_v2 import OneRecV2
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=512, tokens_per_step=524_288),
        model=OneRecV2.Config(
            size="1b",
            # RECONSTRUCTED: from what further keys and values cost in the report, 54 numbers describe an event.
            context=ContextConfig(hidden=64, row_width=64, item_codes=False),
            targets_per_user=1,
            dropout=0.0,
        ),
        train=TrainConfig(epochs=1, learning_rate=1.58e-4, precision="bf16", zero_stage=1),
    )
