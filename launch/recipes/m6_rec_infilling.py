"""M6-Rec's language model pretrained by infilling, for m6-rec and m6-rec-ranking to start from (--init-from)."""

from data_streams.configuration import DataConfig
from models.m6rec_infilling import M6RecInfilling
from models.objectives.sampled_softmax import SampledSoftmax
from trainer.configuration import EvaluationConfig, PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=20, tokens_per_step=1024),
        model=M6RecInfilling.Config(
            width=128,
            num_blocks=3,
            num_heads=2,
            feedforward_width=256,
            separate_blocks=1,
        ),
        # What validation compares users and items by; nothing is trained with it.
        objective=SampledSoftmax.Config(),
        train=TrainConfig(epochs=6, learning_rate=3e-4, warmup_steps=30, selection_metric="step"),
        evaluation=EvaluationConfig(users_per_batch=256),
    )
