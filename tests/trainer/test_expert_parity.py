"""Experts in one process, on every rank, and spread over ranks train alike: losses, weights, moments and biases."""

from dataclasses import replace

import pytest
from torch import nn

from cluster.errors import ConfigError
from launch.commands.pretrain import parse_config
from launch.plots import expert_loads, write_curves
from launch.run_directory import EXPERTS
from models.layers.moe import MixtureConfig
from tests.mixture_model import MixtureModel
from tests.process_group import run_on_processes
from tests.tiny_run import assert_same_state, build_tiny_data, run, tiny_config
from tests.trainer.test_parity import assert_same_training
from tests.trainer.test_weight_average import serve
from tests.training_cases import Case
from trainer.checks import check
from trainer.metric_log import read_metrics

CASE = Case(model="mixture", steps=12)
NOBODY = replace(CASE, streams=2, favour_first_half=True)
"""The second rank has no users from step 10 on, and its experts never get a token."""


@pytest.mark.parametrize(("world_size", "size", "zero_stage"), [(1, 1, 1), (2, 1, 3), (4, 2, 1)])
def test_experts_on_ranks_equal_the_unsharded_reference(world_size, size, zero_stage):
    case = replace(CASE, expert_parallel=size, zero_stage=zero_stage)
    assert_same_training(case, world_size, against=CASE)


def test_a_rank_without_users_and_without_tokens_for_its_experts_takes_part():
    assert_same_training(replace(NOBODY, expert_parallel=2, zero_stage=2), 2, against=NOBODY)


def test_routing_again_in_the_backward_pass_counts_once():
    case = replace(CASE, expert_parallel=2, activation_checkpointing=True)
    assert_same_training(case, 2, against=CASE)


def model_config(data, run_dir, size, **train):
    config = tiny_config(data, run_dir, ema_decay=0.9, **train)
    config = replace(config, log=replace(config.log, every_steps=2))
    model = MixtureModel.Config(width=16, num_heads=2, dropout=0.0)
    return replace(config, model=model, sharding=replace(config.sharding, expert_parallel=size))


def test_a_checkpoint_of_experts_on_two_ranks_goes_on_in_one_process_and_on_two_ranks(tmp_path):
    data = build_tiny_data(tmp_path)
    whole, (parts, alone, again) = (
        model_config(data, tmp_path / "whole", 1),
        (
            model_config(data, tmp_path / "parts", size, zero_stage=stage)
            for size, stage in ((2, 1), (1, 0), (2, 2))
        ),
    )
    ((expected_result, expected),) = run_on_processes(run, 1, whole)
    first, *_ = run_on_processes(run, 2, parts, 2)
    ((second, _),) = run_on_processes(run, 1, alone, 3)
    (result, state), *_ = run_on_processes(run, 2, again)
    assert 0 < first[0]["step"] < second["step"] < result["step"] == expected_result["step"]
    kinds = {name.partition("/")[0] for name in state if "experts.expand" in name}
    assert kinds == {"dense", "exp_avg", "exp_avg_sq", "ema"}
    assert any(name.endswith("choice_bias") and tensor.any() for name, tensor in state.items())
    assert_same_state(state, expected, tolerance=2e-5)
    (metrics,) = run_on_processes(serve, 1, alone)
    assert result["best"] == pytest.approx(expected_result["best"], rel=1e-3)
    assert metrics["ndcg@10"] > 0
    loads = expert_loads(read_metrics(again.run_dir))
    assert [len(layer) for layer in loads] == [4, 6]
    assert [sum(layer) for layer in loads] == pytest.approx([1, 1])
    write_curves(again.run_dir, "ndcg@10")
    assert (tmp_path / "parts" / EXPERTS).stat().st_size > 10_000


def refusals(process, attempts):
    from sharding.experts import shard_experts

    messages = []
    for model, size in attempts:
        with pytest.raises(ConfigError) as error:
            shard_experts(model, size, process)
        messages.append(str(error.value))
    return messages


def test_experts_that_cannot_be_spread_are_refused():
    experts = lambda count: MixtureConfig(num_experts=count, hidden=8).build(8)  # noqa: E731
    none, odd_workers, odd_experts = run_on_processes(
        refusals, 2, [(nn.Linear(2, 2), 2), (experts(6), 3), (experts(5), 2)]
    )[0]
    assert "needs a model with experts, and Linear has none; leave the option out" in none
    assert "3 does not divide 2; use a multiple of 3 workers" in odd_workers
    assert "must divide the number of experts, and 2 does not divide 5; use one of [1]" in odd_experts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cluster.workers", "3"], "2 does not divide 3"),
        (["--cluster.workers", "4", "--train.zero-stage", "3"], "must be 1 or 2 where experts are spread"),
        (["--cluster.workers", "4", "--train.zero-stage", "0"], "must be 1 or 2 where experts are spread"),
    ],
)
def test_impossible_sizes_are_known_before_any_worker_starts(options, message):
    config = parse_config("sasrec", ["--sharding.expert-parallel", "2", *options])
    assert config.sharding.workers_multiple_of == 2
    with pytest.raises(ConfigError, match=message):
        check(config)
