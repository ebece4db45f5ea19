"""The recipe whose parts are measured, `sasrec-amazon` unless said otherwise, on the users of a benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from cluster.plugins import load_plugin
from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.stream import TrainStream
from models.recommender import StepContext
from trainer.assembly import Assembly, assemble
from trainer.configuration import PretrainConfig
from trainer.learner import Learner
from trainer.start import make_learner
from trainer.step_input import prepare_step

RECIPE = "sasrec-amazon"


@dataclass(frozen=True, kw_only=True)
class RunningRecipe:
    """The recipe put together by the code that `grail pretrain` uses."""

    config: PretrainConfig
    process: Process
    stream: TrainStream
    assembly: Assembly
    learner: Learner

    def take_steps(
        self, batches: Sequence[SequenceBatch], counts: Sequence[Sequence[int]] | None = None
    ) -> None:
        """What the feed prepares in the background is done here in front of each step.

        `counts` are the targets of every rank in each step, needed where there are several ranks.
        """
        train = self.config.train
        for step, batch in enumerate(batches):
            context = StepContext(
                step=step,
                seed=self.config.seed,
                rank=self.process.rank,
                world_size=self.process.world_size,
            )
            prepared = prepare_step(
                self.assembly.model,
                batch,
                context,
                train.micro_batches,
                self.assembly.item_features,
                self.process.device,
            )
            prepared = prepared.with_counts([counts[step] if counts else [batch.num_tokens]])
            self.learner.step(prepared, train.learning_rate, train.table_learning_rate)


def recipe_config(data: str, name: str = RECIPE) -> PretrainConfig:
    config = load_plugin("launch.recipes", name).recipe()
    return replace(config, data=replace(config.data, path=data))


def start_recipe(process: Process, data: str, name: str = RECIPE) -> RunningRecipe:
    """A collective call."""
    return start(process, recipe_config(data, name))


def start(process: Process, config: PretrainConfig) -> RunningRecipe:
    """A collective call."""
    assembly = assemble(config, process)
    learner, _ = make_learner(assembly)
    return RunningRecipe(
        config=config,
        process=process,
        stream=train_stream(process, config),
        assembly=assembly,
        learner=learner,
    )


def train_stream(process: Process, config: PretrainConfig) -> TrainStream:
    return TrainStream(config.data, seed=config.seed, rank=process.rank, world_size=process.world_size)


def first_batches(stream: TrainStream, count: int) -> list[SequenceBatch]:
    """What this rank trains on in the first steps of the first epoch; fewer where the data has fewer steps."""
    count = min(count, stream.steps_per_epoch())
    return list(islice(stream.batches(0), count))
