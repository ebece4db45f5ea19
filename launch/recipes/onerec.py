"""OneRec in its published shapes, --model.size 0.015b to 2.633b; for accelerators and data with likes."""

from data_streams.configuration import DataConfig
from models.layers.user_context import ContextConfig
from models.lifelong_history import LifelongConfig
from models.onerec import OneRec
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=2000, tokens_per_step=1_048_576),
        model=OneRec.Config(
            size="0.935b",
            # RECONSTRUCTED: sizes of the features, of which those of the report are not in our data.
            context=ContextConfig(
                hidden=1024,
                row_width=64,
                item_codes=False,
                user_rows=10_000_000,
                short_length=20,
                positive_length=256,
                positive_actions=("like",),
            ),
            lifelong=LifelongConfig(num_queries=128, num_blocks=2, hidden=2048, cluster_events=50),
            targets_per_user=1,
            dropout=0.0,
        ),
        train=TrainConfig(
            epochs=1, learning_rate=8e-5, table_learning_rate=1e-4, precision="bf16", zero_stage=1
        ),
    )
