"""GRU4Rec tuned for the small Amazon 5-core sets (Beauty, Sports), on two workers."""

from cluster.configuration import ClusterConfig
from data_streams.configuration import DataConfig
from models.gru4rec import GRU4Rec
from models.objectives.sampled_softmax import SampledSoftmax
from trainer.configuration import PretrainConfig, TrainConfig


def recipe() -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(max_length=50, tokens_per_step=1024),
        model=GRU4Rec.Config(width=256, dropout=0.5),
        objective=SampledSoftmax.Config(num_negatives=2048, popularity_share=1.0, log_q=True),
        train=TrainConfig(epochs=10, learning_rate=2e-3, table_learning_rate=0.07, checkpoint_every_s=10.0),
        cluster=ClusterConfig(workers=2),
    )
