"""URM from scratch: a small decoder that asks for items with several query tokens.

`--model.by-action` lets one model serve several objectives, where the data's sequences hold several actions.
"""

from data_streams.configuration import DataConfig
from models.objectives.sampled_softmax import SampledSoftmax
from models.urm import URM
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=50, tokens_per_step=2048),
        model=URM.Config(newest_item=True),
        objective=SampledSoftmax.Config(num_negatives=512, log_q=True),
        train=TrainConfig(
            epochs=10, learning_rate=4e-3, table_learning_rate=0.1, warmup_steps=10, patience=3
        ),
    )
