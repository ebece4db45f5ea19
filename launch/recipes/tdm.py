"""TDM with JTM's user representation, small, for the synthetic world; its tree comes from grail tokenize tree.

As published: --model.no-window-products, and --model.no-hierarchical-history for TDM's own representation, which starts
to learn far later; see docs/tdm.md.
"""

from data_streams.configuration import DataConfig
from models.tdm import TDM
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=50, tokens_per_step=512),
        model=TDM.Config(
            windows=(6, 3, 1, 1, 1),
            attention_hidden=16,
            hierarchical_history=True,
            window_products=True,
            num_negatives=60,
            positions=8,
            init_scale=0.2,
        ),
        train=TrainConfig(epochs=12, learning_rate=5e-3, table_learning_rate=0.07, validate_every_epochs=2),
    )
