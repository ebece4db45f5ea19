"""The recipe whose parts are measured, `sasrec-amazon`, on the users of a benchmark."""

from dataclasses import dataclass, replace
from itertools import islice

from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.stream import TrainStream
from launch.recipes import sasrec_amazon
from trainer.assembly import Assembly, assemble
from trainer.configuration import PretrainConfig
from trainer.learner import Learner
from trainer.start import make_learner


@dataclass(frozen=True, kw_only=True)
class RunningRecipe:
    """The recipe put together by the code that `grail pretrain` uses."""

    config: PretrainConfig
    stream: TrainStream
    assembly: Assembly
    learner: Learner


def recipe_config(data: str) -> PretrainConfig:
    config = sasrec_amazon.recipe()
    return replace(config, data=replace(config.data, path=data))


def start_recipe(process: Process, data: str) -> RunningRecipe:
    """A collective call."""
    config = recipe_config(data)
    assembly = assemble(config, process)
    learner, _ = make_learner(assembly)
    return RunningRecipe(
        config=config, stream=train_stream(process, config), assembly=assembly, learner=learner
    )


def train_stream(process: Process, config: PretrainConfig) -> TrainStream:
    return TrainStream(config.data, seed=config.seed, rank=process.rank, world_size=process.world_size)


def first_batches(stream: TrainStream, count: int) -> list[SequenceBatch]:
    """What this rank trains on in the first steps of the first epoch; fewer where the data has fewer steps."""
    count = min(count, stream.steps_per_epoch())
    return list(islice(stream.batches(0), count))
