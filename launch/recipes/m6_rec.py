"""M6-Rec from scratch as a retriever: users and items are text alone, such as titles, brands and categories.

As published: --model.joint-tokens all --model.region bidirectional --model.positions 1; see docs/m6rec.md.
"""

from data_streams.configuration import DataConfig
from models.m6rec import M6Rec
from models.objectives.sampled_softmax import SampledSoftmax
from trainer.configuration import EvaluationConfig, PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=50, tokens_per_step=2048),
        model=M6Rec.Config(
            width=128,
            num_blocks=3,
            num_heads=2,
            feedforward_width=256,
            separate_blocks=1,
            joint_tokens="last",
            region="behaviours",
        ),
        objective=SampledSoftmax.Config(num_negatives=512),
        train=TrainConfig(epochs=6, learning_rate=2e-3, warmup_steps=30, patience=3),
        evaluation=EvaluationConfig(users_per_batch=256),
    )
