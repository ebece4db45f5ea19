"""M6-Rec from scratch as a ranker: answers to shown items, from text alone; needs exposures on recorded pages.

As published: --model.joint-tokens all --model.region bidirectional --model.window request --model.no-likeness; see
docs/m6rec.md.
"""

from data_streams.configuration import DataConfig
from models.m6rec_ranking import M6RecRanking
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=400, tokens_per_step=4096, history_exposures=True),
        model=M6RecRanking.Config(
            width=128,
            num_blocks=3,
            num_heads=2,
            feedforward_width=256,
            separate_blocks=1,
            joint_tokens="last",
            region="behaviours",
            window="span",
            likeness=True,
        ),
        train=TrainConfig(epochs=4, learning_rate=2e-3, warmup_steps=30, selection_metric="auc"),
    )
