"""OneRec on sessions of the synthetic world, with experts and a thinned-out lifelong history, on two workers."""

from cluster.configuration import ClusterConfig
from data_streams.configuration import DataConfig
from models.layers.feedforward import FeedForwardConfig
from models.layers.moe import MixtureConfig
from models.layers.user_context import ContextConfig
from models.lifelong_history import LifelongConfig
from models.onerec import OneRec
from models.session_targets import SessionConfig
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=100, tokens_per_step=4096),
        model=OneRec.Config(
            width=64,
            num_heads=2,
            encoder_feedforward=FeedForwardConfig(hidden=176),
            decoder_feedforward=MixtureConfig(num_experts=8, top_k=2, hidden=88),
            context=ContextConfig(hidden=128, play_time=True, short_length=20),
            lifelong=LifelongConfig(num_queries=8, num_blocks=1, hidden=176, cluster_events=32),
            session=SessionConfig(items=2, watched_s=1.0),
            targets_per_user=4,
            dropout=0.1,
            # With 0.02 a model of this width reads nothing from its encoder for hundreds of steps.
            init_scale=0.1,
        ),
        train=TrainConfig(
            epochs=10,
            learning_rate=2e-3,
            table_learning_rate=0.07,
            checkpoint_every_s=30.0,
        ),
        cluster=ClusterConfig(workers=2),
    )
