"""A policy of a few hundred weights, trained for seconds, and alignments that start from it."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cluster.process import Process
from cluster.reporter import Reporter
from cluster.storage import Storage
from data_streams.configuration import DataConfig
from data_streams.item_table import ItemTable
from data_streams.semantic_ids import SemanticIdTable
from launch.config_document import to_document, to_yaml
from launch.reward_parts import reward_setting
from models.decoder_only import DecoderOnly
from models.path_reward import ProcessRewardConfig
from models.process_reward import ProcessReward
from rl.advantages.group import GroupRelative
from rl.configuration import AlignConfig, AlignOptions, RolloutConfig
from rl.objectives.grpo_sr import GrpoSr
from rl.places import Places
from rl.reward_mix import RewardTerm
from rl.reward_pool import RewardPoolConfig
from rl.rewards.hit import Hit
from rl.rewards.python_function import PythonFunction
from rl.types import Group
from tests.process_group import run_on_processes
from tests.tiny_run import NUM_ITEMS, NUM_USERS, StopAfter, build_tiny_data, read_all
from trainer.checkpoint_reader import CheckpointReader
from trainer.configuration import EvaluationConfig, PretrainConfig, SearchConfig, TrainConfig

CODE_SIZES = (5, 6, 4)
EPOCHS = 2


def near(groups: list[Group]) -> list[np.ndarray]:
    """How near an item is to the last one on the circle; illegal paths get 0."""
    distances = [np.abs((group.items - group.history[-1]) % NUM_ITEMS - 1) for group in groups]
    return [np.where(g.items >= 0, np.exp(-d / 8), 0.0) for g, d in zip(groups, distances, strict=True)]


async def slowly(groups: list[Group]) -> list[np.ndarray]:
    """The same reward for those who want to watch."""
    await asyncio.sleep(0.25)
    return near(groups)


def fails_at_first(groups: list[Group]) -> list[np.ndarray]:
    raise KeyError("no such table")


NEAR = RewardTerm(name="near", reward=PythonFunction.Config(path="tests.rl.tiny_alignment:near"))
SLOWLY = RewardTerm(name="near", reward=PythonFunction.Config(path="tests.rl.tiny_alignment:slowly"))
FAILS = RewardTerm(name="broken", reward=PythonFunction.Config(path="tests.rl.tiny_alignment:fails_at_first"))
HIT = RewardTerm(name="hit", reward=Hit.Config())


def make_start(folder: Path) -> PretrainConfig:
    """The configuration of a policy that was pretrained for a few steps."""
    data = build_tiny_data(folder / "data")
    table = folder / "ids"
    items = np.arange(NUM_ITEMS)
    codes = np.stack([items // 24 % 5, items // 4 % 6, items % 4], axis=1).astype(np.int32)
    SemanticIdTable(item_ids=ItemTable.load(data).item_ids, codes=codes, code_sizes=CODE_SIZES).save(
        str(table)
    )
    config = PretrainConfig(
        recipe="tiny",
        run_dir=str(folder / "start"),
        seed=3,
        data=DataConfig(
            path=data,
            semantic_ids=str(table),
            max_length=10,
            tokens_per_step=128,
            num_streams=6,
            shuffle_chunks=2,
        ),
        model=DecoderOnly.Config(
            width=16,
            num_blocks=1,
            num_depth_blocks=1,
            num_heads=2,
            feedforward_width=32,
            dropout=0.1,
            init_scale=0.1,
        ),
        train=TrainConfig(
            epochs=4, checkpoint_every_s=None, warmup_steps=2, precision="fp32", learning_rate=5e-3
        ),
        evaluation=EvaluationConfig(cutoffs=(5, 10), bootstrap_resamples=20),
        search=SearchConfig(width=10, validation_width=10),
    )
    run_on_processes(pretrain_start, 1, config)
    Storage(config.run_dir).write("config.yaml", to_yaml(to_document(config)).encode())
    return config


def make_prm(start: PretrainConfig, folder: Path) -> PretrainConfig:
    """A PRM with the start's encoder, trained for two steps."""
    shared = {
        entry.name: getattr(start.model, entry.name)
        for entry in dataclasses.fields(ProcessReward.Config)
        if hasattr(start.model, entry.name)
    }
    prm = ProcessRewardConfig(num_heads=1, feedforward_width=16, num_negatives=8, positions=None)
    config = dataclasses.replace(
        start,
        run_dir=str(folder / "prm"),
        init_from=start.run_dir,
        model=ProcessReward.Config(**shared, prm=prm),
        train=dataclasses.replace(start.train, epochs=1, max_steps=2),
    )
    run_on_processes(pretrain_start, 1, config)
    Storage(config.run_dir).write("config.yaml", to_yaml(to_document(config)).encode())
    return config


def pretrain_start(process: Process, config: PretrainConfig) -> None:
    from trainer.start import pretrain

    pretrain(process, config, {}, Reporter())


def alignment(start: PretrainConfig, run_dir: Path, **options: Any) -> AlignConfig:
    """An alignment without any further process; sections may be replaced whole."""
    train = TrainConfig(
        epochs=EPOCHS,
        learning_rate=3e-3,
        table_learning_rate=0.0,
        warmup_steps=2,
        precision="fp32",
        validate_every_steps=6,
        checkpoint_every_s=None,
        keep_last=10,
    )
    config = AlignConfig(
        start=start.run_dir,
        run_dir=str(run_dir),
        seed=5,
        objective=GrpoSr.Config(),
        advantage=GroupRelative.Config(),
        rewards=(NEAR, HIT),
        align=AlignOptions(users_per_step=20, group_size=4),
        rollout=RolloutConfig(workers=0),
        reward=RewardPoolConfig(workers=0),
        train=train,
        data=start.data,
        evaluation=start.evaluation,
        search=start.search,
        log=dataclasses.replace(start.log, every_steps=1),
    )
    return dataclasses.replace(config, **options)


def run_alignment(
    process: Process, config: AlignConfig, start: PretrainConfig, stop_after: int | None = None
) -> dict[str, Any]:
    from rl.start import start_alignment

    data = config.data
    setting = reward_setting(
        config.rewards, data_path=data.path, semantic_ids=data.semantic_ids, seed=config.seed
    )
    reporter = StopAfter(process.rank, stop_after)
    last = CheckpointReader(Storage(f"{start.run_dir}/checkpoints"), "best").step
    return start_alignment(process, config, start, last, {}, setting, Places(), reporter)


def saved_state(run_dir: str | Path, step: int | str = "latest") -> dict[str, Tensor]:
    """Everything that the checkpoints of a run hold, but for the state of tables, which do not learn."""
    reader = CheckpointReader(Storage(f"{run_dir}/checkpoints"), step)
    return {name: read_all(reader, name) for name in sorted(reader.tensors)}


def all_users() -> list[int]:
    return list(range(NUM_USERS))
