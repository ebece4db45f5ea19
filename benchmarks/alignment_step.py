"""A whole step of alignment (rollout, reward, update) against TRL's `GRPOTrainer`, with equal weights and prompts."""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.setting.benchmark import Bar, Benchmark, Request, Scale, compare_rates
from benchmarks.setting.peer_process import PeerProcess
from benchmarks.setting.small_gpt import GPTShape, SmallGPT, random_weights
from benchmarks.setting.timing import Timing
from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.recommender import StepContext
from rl.advantages.group import GroupRelative
from rl.configuration import AlignOptions
from rl.drawing import Drawing
from rl.objectives.grpo import Grpo
from rl.policy import PolicyModule, experience
from rl.prompts import POSITIVES, to_prompts
from rl.reward_mix import RewardTerm
from rl.reward_pool import OwnRewards
from rl.rewards import RewardSetting
from rl.rewards.python_function import PythonFunction
from rl.types import Group
from sharding.tables import NoTables
from trainer.configuration import TrainConfig
from trainer.learner import Learner
from trainer.plain_engine import PlainEngine
from trainer.step_input import StepInput, join_parts

BENCHMARK = Benchmark(
    unit="completions/s",
    bars=(Bar(key="least_ratio_at_short", at_least=5.0), Bar(key="ratio", at_least=10.0)),
    threads_per_rank=1,
)
SETTINGS: dict[Scale, tuple[tuple[int, int], ...]] = {
    "full": ((60, 8), (60, 16), (240, 8), (240, 16)),
    "small": ((6, 2), (12, 4)),
}
"""Length of the prompts and completions of each; the first half is the short one, the last is what `ratio` means."""
SHAPE: dict[Scale, GPTShape] = {
    "full": GPTShape(num_codes=258, max_positions=243),
    "small": GPTShape(width=32, num_layers=2, num_heads=4, num_codes=34, max_positions=15),
}
STEPS: dict[Scale, int] = {"full": 3, "small": 1}
USERS, RESERVED = 8, 2
REWARD = RewardTerm(name="sum", reward=PythonFunction.Config(path="benchmarks.alignment_step:sum_of_codes"))


def sum_of_codes(groups: Sequence[Group]) -> list[np.ndarray]:
    return [group.paths.sum(1).astype(np.float32) for group in groups]


def measure(process: Process, request: Request) -> dict[str, Any]:
    """Both sides take some steps, one side after the other, the first of each uncounted."""
    shape, folder, steps = SHAPE[request.scale], Path(request.scratch), STEPS[request.scale]
    weights = random_weights(shape)
    save_file(weights, folder / "weights.safetensors")
    (folder / "shape.json").write_text(json.dumps(asdict(shape)))
    peer = PeerProcess("benchmarks.peers.trl_grpo", folder, 1)
    found = {}
    for prompt, group in SETTINGS[request.scale]:
        prompts = _prompts(shape, prompt)
        save_file({"prompts": prompts}, folder / f"prompts-{prompt}.safetensors")
        theirs = peer.ask(prompt=prompt, group=group, steps=steps)["steps"]
        ours = _steps(shape, weights, prompts, group, steps)
        found[prompt, group] = _timing(ours), _timing(theirs)
    peer.close()
    rates = {
        f"prompt {prompt}, {group} completions": compare_rates(USERS * group, *timings)
        for (prompt, group), timings in found.items()
    }
    ratios = [rate["ratio"] for rate in rates.values()]
    return {
        **list(rates.values())[-1],
        "least_ratio_at_short": min(ratios[: len(ratios) // 2]),
        "settings": {
            name: {key: rate[key] for key in ("ours", "peer", "ratio")} for name, rate in rates.items()
        },
        "parameters": sum(tensor.numel() for tensor in weights.values()),
    }


def _prompts(shape: GPTShape, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, shape.num_codes - RESERVED, (USERS, length), generator=generator)


def _timing(steps: Sequence[tuple[float, float]]) -> Timing:
    return Timing(wall_s=[wall for wall, _ in steps], cpu_s=[cpu for _, cpu in steps])


def _steps(
    shape: GPTShape, weights: dict[str, Tensor], prompts: Tensor, group: int, steps: int
) -> list[tuple[float, float]]:
    """Seconds and processor seconds of each step but the first."""
    torch.set_num_threads(1)
    model = SmallGPT(shape, {name: tensor.clone() for name, tensor in weights.items()}).requires_grad_()
    codes = torch.cartesian_prod(*[torch.arange(4)] * shape.num_levels)
    drawing = Drawing(
        AlignOptions(group_size=group), codes, model.code_sizes, seed=0, precision=torch.float32
    )
    objective = Grpo.Config(kl_weight=0.0).build()
    module = PolicyModule(model, torch.float32, objective=objective, drawing=drawing)
    engine = PlainEngine(module, TrainConfig(learning_rate=1e-4))
    learner = Learner(module, engine, NoTables(), seed=0, rank=0, world_size=1)
    rewards, estimator = OwnRewards([REWARD], RewardSetting(data_path="")), GroupRelative.Config().build()
    batch, times = _batch(prompts), []
    for step in range(steps + 1):
        started = time.perf_counter(), time.process_time()
        given = to_prompts(batch, batch.user_ids + step * USERS, codes)
        drawn = drawing.draw(model, {}, batch, given, step)
        mixed = rewards.collect(rewards.submit(drawn.groups()))
        learnt = experience(batch, drawn, mixed.advantages(estimator), codes)
        learner.step(_step_input(model, dataclasses.replace(batch, supervision=learnt), step), 1e-4, 0.0)
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return times[1:]


def _batch(prompts: Tensor) -> SequenceBatch:
    users = torch.arange(len(prompts))
    nothing = Jagged.from_lengths(torch.zeros(0, dtype=torch.int64), torch.zeros_like(users))
    return SequenceBatch(
        user_ids=users,
        items=Jagged.from_lengths(prompts.flatten(), torch.full_like(users, prompts.shape[1])),
        supervision={POSITIVES: nothing},
    )


def _step_input(model: SmallGPT, batch: SequenceBatch, step: int) -> StepInput:
    context = StepContext(step=step, targets_per_rank=(batch.num_users,))
    return join_parts([], [(batch, {}, batch.num_users)], batch, context, None, torch.device("cpu"))
