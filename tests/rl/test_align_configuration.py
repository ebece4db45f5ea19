"""What cannot work together is said before any worker is started, with the option's name."""

import dataclasses
import math

import numpy as np
import pytest

from cluster.configuration import ClusterConfig
from cluster.errors import ClusterError, ConfigError
from data_streams.build import build
from data_streams.build_config import BuildConfig
from data_streams.configuration import DataConfig
from data_streams.sources.world import WorldSource
from data_streams.stream import TrainStream
from models.decoder_only import DecoderOnly
from models.sasrec import SASRec
from models.tdm import TDM
from rl.advantages.group import GroupRelative
from rl.advantages.step_wise import StepWise
from rl.configuration import AlignConfig, AlignOptions, RolloutConfig, check_alignment, with_users_per_step
from rl.objectives.ecpo import Ecpo
from rl.objectives.grpo_sr import GrpoSr
from rl.places import Places
from rl.reward_mix import RewardTerm
from rl.reward_pool import RewardPool, RewardPoolConfig
from rl.rewards import RewardSetting
from rl.rewards.duration import Duration
from rl.rewards.hit import Hit
from rl.rewards.process import Process
from trainer.configuration import PretrainConfig

POLICY = PretrainConfig(run_dir="runs/policy", model=DecoderOnly.Config())
HIT = RewardTerm(name="hit", reward=Hit.Config())
ONE_OLD = AlignOptions(max_staleness=1)


def config(**options):
    chosen = {
        "objective": GrpoSr.Config(),
        "advantage": GroupRelative.Config(),
        "rewards": (HIT,),
    }
    return AlignConfig(**{**chosen, **options})


def test_what_can_work_passes():
    check_alignment(config(), POLICY)
    check_alignment(config(objective=Ecpo.Config(), align=ONE_OLD), POLICY)
    prm = RewardTerm(name="prm", reward=Process.Config(run="runs/prm"))
    check_alignment(config(rewards=(HIT, dataclasses.replace(prm, direct=True))), POLICY)
    check_alignment(config(rewards=(HIT, prm), advantage=StepWise.Config()), POLICY)


@pytest.mark.parametrize(
    ("options", "start", "message"),
    [
        ({}, PretrainConfig(run_dir="runs/x", model=SASRec.Config()), "generates semantic IDs.*SASRec"),
        (
            {},
            PretrainConfig(run_dir="runs/x", model=TDM.Config()),
            "probabilities of codes, and the TDM in runs/x",
        ),
        ({"rewards": ()}, POLICY, "at least one reward"),
        (
            {
                "cluster": ClusterConfig(gpus_per_worker=1),
                "rollout": RolloutConfig(gpus_per_worker=0.5, weights="broadcast"),
            },
            POLICY,
            "cluster.gpus-per-worker 1 with rollout.gpus-per-worker 0.5 let some share one",
        ),
        (
            {
                "rewards": (RewardTerm(name="duration", reward=Duration.Config()),),
                "data": DataConfig(pages="recorded"),
            },
            POLICY,
            "the reward duration reads columns.*--data.pages none",
        ),
        (
            {"cluster": ClusterConfig(in_process=True)},
            POLICY,
            "which Ray places; leave --cluster.in-process out",
        ),
        (
            {"cluster": ClusterConfig(workers=2, min_workers=1)},
            POLICY,
            "cluster.min-workers is for pretraining",
        ),
        (
            {"advantage": StepWise.Config()},
            POLICY,
            "StepWise takes rewards that are one per code, and the run's are one per completion",
        ),
        (
            {"rewards": (RewardTerm(name="prm", reward=Process.Config(run="runs/prm")),)},
            POLICY,
            "GroupRelative takes rewards that are one per completion, and the run's are one per code",
        ),
        ({"align": ONE_OLD}, POLICY, "align.max-staleness 1 needs an objective.*GrpoSr does not"),
        (
            {"align": ONE_OLD, "objective": Ecpo.Config(), "rollout": RolloutConfig(workers=0)},
            POLICY,
            "learners that draw themselves cannot",
        ),
    ],
)
def test_what_cannot_work_is_said(options, start, message):
    with pytest.raises(ConfigError, match=message):
        check_alignment(config(**options), start)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        (AlignOptions, {"users_per_step": 0}, "align.users-per-step"),
        (AlignOptions, {"group_size": 1}, "align.group-size at least 2"),
        (AlignOptions, {"temperature": 0.0}, "align.temperature must be above 0"),
        (AlignOptions, {"temperature": math.nan}, "align.temperature must be above 0"),
        (AlignOptions, {"max_staleness": 2}, "align.max-staleness 0 or 1"),
        (RolloutConfig, {"workers": -1}, "rollout.workers must be at least 0"),
        (
            RolloutConfig,
            {"workers": 0, "weights": "broadcast"},
            "rollout.weights broadcast.*rollout.workers is 0",
        ),
        (RolloutConfig, {"gpus_per_worker": 1.5}, "rollout.gpus-per-worker must be 0.*got 1.5"),
        (RewardPoolConfig, {"gpus_per_worker": -1}, "reward.gpus-per-worker must be 0.*got -1"),
        (RewardPoolConfig, {"cpus_per_worker": 0.0}, "reward.cpus-per-worker must be above 0, got 0"),
        (RolloutConfig, {"cpus_per_worker": -1.0}, "rollout.cpus-per-worker must be above 0, got -1"),
        (RolloutConfig, {"timeout_s": 0.0}, "rollout.timeout-s must be above 0 seconds, got 0"),
        (ClusterConfig, {"cpus_per_worker": 0.0}, "cluster.cpus-per-worker must be above 0, got 0"),
        (ClusterConfig, {"gpus_per_worker": 1.5}, "cluster.gpus-per-worker must be 0.*got 1.5"),
        (
            ClusterConfig,
            {"workers": 2, "gpus_per_worker": 0.5},
            "cluster.gpus-per-worker must be 0 or 1 where several.*got 0.5 for 2 workers; give 1",
        ),
        (ClusterConfig, {"gpus_per_worker": 2}, "cluster.*at most 1, .*got 2; give 1, and 2 times as many"),
        (RolloutConfig, {"gpus_per_worker": 4}, "rollout.*at most 1, .*got 4; give 1, and 4 times as many"),
        (ClusterConfig, {"start_timeout_s": -1.0}, "cluster.start-timeout-s must be above 0 seconds, got -1"),
    ],
)
def test_impossible_numbers_are_refused(form, options, message):
    with pytest.raises(ConfigError, match=message):
        form(**options)


def test_accelerators_that_the_cluster_lacks_are_refused_at_once(monkeypatch):
    monkeypatch.setattr("cluster.placement.ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    asked = config(
        cluster=ClusterConfig(gpus_per_worker=1),
        rollout=RolloutConfig(gpus_per_worker=1),
        reward=RewardPoolConfig(workers=2, gpus_per_worker=0.25),
    )
    assert asked.num_gpus() == 2.5
    with pytest.raises(
        ClusterError, match=r"--rollout.gpus-per-worker.*need 2.5 accelerators.*the cluster has 2"
    ):
        Places.reserve(asked)


def test_each_pool_reserves_its_accelerators_and_works_on_them(monkeypatch):
    placed, made = [], []
    monkeypatch.setattr("cluster.placement.ray.cluster_resources", lambda: {"GPU": 4.0})
    monkeypatch.setattr("rl.places.place", lambda workers, **given: placed.append((workers, given["gpus"])))
    monkeypatch.setattr("rl.reward_pool.Pool", lambda *given, **options: made.append((given[2], options)))
    asked = config(
        rollout=RolloutConfig(workers=2, gpus_per_worker=1), reward=RewardPoolConfig(gpus_per_worker=0.5)
    )
    Places.reserve(asked)
    assert placed == [(2, 1), (1, 0.5)]
    RewardPool(asked.rewards, RewardSetting(data_path=""), config=asked.reward, cluster=asked.cluster)
    ((setting, options),) = made
    assert setting.device == "cuda:0" and options["gpus_per_member"] == 0.5


def test_room_is_given_back_at_the_end_and_where_the_second_pool_finds_none(monkeypatch):
    kept = []

    class Room:
        def __init__(self, workers: int, **_):
            if workers == 5:
                raise ClusterError("no room")
            kept.append(self)

        def remove(self) -> None:
            kept.remove(self)

    monkeypatch.setattr("cluster.placement.ray.cluster_resources", dict)
    monkeypatch.setattr("rl.places.place", Room)
    places = Places.reserve(config(rollout=RolloutConfig(workers=1), reward=RewardPoolConfig(workers=1)))
    assert len(kept) == 2
    places.remove()
    assert not kept
    with pytest.raises(ClusterError, match="no room"):
        Places.reserve(config(rollout=RolloutConfig(workers=1), reward=RewardPoolConfig(workers=5)))
    assert not kept


def test_the_policy_of_an_alignment_has_no_dropout_and_starts_from_the_run(monkeypatch):
    monkeypatch.setattr("rl.configuration.with_users_per_step", lambda data, users: data)
    policy = config(run_dir="runs/aligned").policy(POLICY)
    assert policy.model.dropout == 0 and policy.init_from == "runs/policy"
    assert policy.run_dir == "runs/aligned" and policy.train.table_learning_rate == 0


@pytest.mark.parametrize("keep_exposures", [False, True])
def test_a_step_has_about_as_many_users_as_are_asked_for_with_exposures_too(tmp_path, keep_exposures):
    world = WorldSource.Config(num_users=400, num_items=160, mean_clicks=12.0)
    build(world, BuildConfig(out=str(tmp_path), ray="never", keep_exposures=keep_exposures))
    data = with_users_per_step(DataConfig(path=str(tmp_path), max_length=50), 32)
    steps = list(TrainStream(data, seed=0, rank=0, world_size=1).batches(0))
    assert np.mean([batch.num_users for batch in steps]) == pytest.approx(32, rel=0.2)
