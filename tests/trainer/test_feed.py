"""The feed: ranks with nothing to do go on beside the others; where nobody has anything, all raise the same error."""

from itertools import chain
from pathlib import Path

import numpy as np

from cluster.errors import DataError
from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.configuration import DataConfig
from data_streams.stream import TrainStream
from models.recommender import StepContext
from tests.data_streams.tiny_data import make_chunk, write_data_set
from tests.process_group import run_on_processes
from trainer.feed import Feed
from trainer.step_input import StepInput, join_parts

USERS, NUM_STREAMS = 64, 4


class BareFeed(Feed):
    """Steps that hold the users and nothing a model would look up."""

    def _prepare(self, batch: SequenceBatch, step: int) -> StepInput:
        rank, world_size = self.process.rank, self.process.world_size
        context = StepContext(step=step, seed=self.seed, rank=rank, world_size=world_size)
        part = (batch, {}, batch.num_users)
        return join_parts((), [part], batch, context, None, self.process.device)


def fed(process: Process, configs: list[DataConfig]) -> list[list[list[int]] | str]:
    """For each data set the users of this rank in every step of an epoch, or the error it ended with."""
    return [_fed(process, config) for config in configs]


def _fed(process: Process, config: DataConfig) -> list[list[int]] | str:
    stream = TrainStream(config, seed=0, rank=process.rank, world_size=process.world_size)
    feed = BareFeed(
        stream,
        None,
        None,
        process,
        seed=0,
        micro_batches=1,
        prefetch_steps=config.prefetch_steps,
        stop_requested=lambda: False,
        checkpoint_after=lambda: None,
    )
    try:
        return [step.user_ids.tolist() for step, _ in feed.steps(0, None, 0)]
    except DataError as error:
        return str(error)


def of_all_ranks(results: list[list[list[list[int]]]]) -> list[list[list[int]]]:
    """The users of each data set and step, from the results of each rank."""
    return [
        [sorted(user for own in step for user in own) for step in zip(*ranks, strict=True)]
        for ranks in zip(*results, strict=True)
    ]


def with_pages(folder: Path, users_with_page: int) -> DataConfig:
    """Users of twelve clicks, of whom the first ones chose two items of a page."""
    chunk = make_chunk([12] * USERS)
    page_id = np.full(chunk.num_events, -1, dtype=np.int32)
    for first in chunk.offsets[:users_with_page]:
        page_id[first + 4 : first + 6] = 0
    chunk.columns.update(page_id=page_id, action=np.zeros(chunk.num_events, dtype=np.int8))
    write_data_set(folder, chunk, actions=["click"])
    return config(folder, pages="recorded")


def with_missing_chunks(folder: Path, *missing: int) -> DataConfig:
    manifest = write_data_set(folder, make_chunk([12] * USERS), chunk_users=16, chunks_per_shard=1)
    for chunk in missing:
        (folder / manifest.chunks[chunk].shard).unlink()
    return config(folder, on_bad_shard="skip")


def config(folder: Path, **options) -> DataConfig:
    return DataConfig(
        path=str(folder), tokens_per_step=64, num_streams=NUM_STREAMS, shuffle_chunks=1, **options
    )


def test_a_rank_without_pages_or_readable_chunks_goes_on_beside_the_others(tmp_path):
    configs = [with_pages(tmp_path / "pages", 3), with_missing_chunks(tmp_path / "chunks", 1)]
    alone = of_all_ranks(run_on_processes(fed, 1, configs))
    together = of_all_ranks(run_on_processes(fed, NUM_STREAMS, configs))
    assert together == alone
    assert sorted(chain(*alone[0])) == list(range(USERS))
    assert sorted(chain(*alone[1])) == [*range(16), *range(32, USERS)]


def test_where_no_rank_has_pages_or_readable_chunks_all_raise_the_same_error(tmp_path):
    configs = [with_pages(tmp_path / "pages", 0), with_missing_chunks(tmp_path / "chunks", 0, 1, 2, 3)]
    (alone,) = run_on_processes(fed, 1, configs)
    assert "of the 0 pages of" in alone[0] and "none is left" in alone[0]
    assert "all chunks with training users are bad" in alone[1]
    assert run_on_processes(fed, 2, configs) == [alone, alone]
