"""The preference and process rewards with real frozen runs."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from cluster.errors import ConfigError, DataError
from data_streams.semantic_ids import SemanticIdTable
from models.promise import Promise
from rl.reward_pool import build_scorer
from rl.rewards import RewardSetting
from rl.rewards.hybrid import Hybrid
from rl.rewards.preference import Preference, check_run
from rl.rewards.process import Process
from rl.rewards.relevance import Relevance
from tests.process_group import run_on_processes
from tests.rl.groups import group
from tests.tiny_run import build_tiny_data
from tests.trainer.test_ranking import tiny_reward_run, train_and_evaluate
from trainer.calibration import Calibration
from trainer.frozen import load_frozen


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = tiny_reward_run(tmp_path_factory.mktemp("reward"), epochs=1)
    run_on_processes(train_and_evaluate, 1, config)
    return config


@pytest.fixture
def setting(config):
    return RewardSetting(data_path=config.data.path, runs={config.run_dir: config})


def score(function, *groups):
    return asyncio.run(function.score(groups))


def test_preference_is_the_calibrated_probability_of_the_actions(config, setting):
    groups = [group([3, -1, 7], history=[1, 2]), group([5, 5, 0], history=[4])]
    found = score(Preference.Config(run=config.run_dir).build(setting), *groups)
    assert found[0].values[1] == 0 and found[0].mask.all()
    assert found[1].values[0] == found[1].values[1]
    assert all((0 < reward.values[[0, 2]]).all() and (reward.values < 1).all() for reward in found)
    (alone,) = score(Preference.Config(run=config.run_dir).build(setting), groups[1])
    np.testing.assert_allclose(alone.values, found[1].values, rtol=1e-5)
    of_cart = score(Preference.Config(run=config.run_dir, weights=(0, 1, 0)).build(setting), *groups)
    mixed = score(Preference.Config(run=config.run_dir, weights=(1, 1, 0)).build(setting), *groups)
    np.testing.assert_allclose(
        mixed[0].values, (found[0].values + of_cart[0].values) / 2, rtol=1e-5, atol=1e-7
    )


def test_the_hybrid_reward_is_built_of_its_parts(config, setting, tmp_path):
    vectors = str(tmp_path / "vectors.npy")
    np.save(vectors, np.eye(80, 4, dtype=np.float32) + 0.1)
    options = Hybrid.Config(
        preference=Preference.Config(run=config.run_dir), relevance=Relevance.Config(vectors=vectors)
    )
    assert options.run_names() == (config.run_dir,)
    prepared = options.prepared(setting)
    assert prepared.relevance.threshold is not None and "relevance_threshold" in prepared.to_log()
    given = group([3, -1, 7], positives=[7], history=[3])
    (found,) = score(prepared.build(setting), given)
    assert found.values[1] == 0 and found.values[2] >= found.values[0]
    open_gate = replace(options, gate=False, calibrate=False)
    preference = score(options.preference.build(setting), given)[0]
    assert score(open_gate.build(setting), given)[0].values.tolist() == preference.values.tolist()


def test_a_reward_model_of_other_data_or_of_another_kind_is_refused(config, setting, tmp_path):
    with pytest.raises(ConfigError, match="a weight for each of click, cart, purchase"):
        Preference.Config(run=config.run_dir, weights=(1.0,)).build(setting)
    other = build_tiny_data(tmp_path / "other", num_users=30)
    with pytest.raises(DataError, match="another catalogue"):
        Preference.Config(run=config.run_dir).build(replace(setting, data_path=other))
    with pytest.raises(ConfigError, match="holds a RewardSim, which does not score prefixes"):
        Process.Config(run=config.run_dir).build(setting)
    retriever = SimpleNamespace(config=config, model=SumOfCodes())
    with pytest.raises(ConfigError, match="holds a SumOfCodes, and a preference is scored by"):
        check_run(retriever, None, other)


def test_the_kind_of_a_run_is_known_before_its_model_is_built(config, setting):
    options = Process.Config(run=config.run_dir)
    with pytest.raises(ConfigError, match="holds a RewardSim, which does not score prefixes"):
        options.prepared(setting)
    of_prefixes = {config.run_dir: replace(config, model=Promise.Config())}
    assert options.prepared(replace(setting, runs=of_prefixes)).run == config.run_dir


def test_a_worker_that_replaces_another_rewards_by_the_same_step(config, setting, monkeypatch):
    """The run of the reward model may train on, and then has another best step."""
    step = load_frozen(config).step
    options = Preference.Config(run=config.run_dir).prepared(setting)
    of_prefixes = {config.run_dir: replace(config, model=Promise.Config())}
    process = Process.Config(run=config.run_dir).prepared(replace(setting, runs=of_prefixes))
    monkeypatch.setattr("trainer.checkpoint_reader.best_step", lambda storage: step + 1)
    assert options.build(setting).frozen.step == step and process.checkpoint == str(step)
    assert options.prepared(setting) == options


def test_rewards_are_put_together_by_name(config):
    from launch.reward_parts import reward_setting, reward_term
    from launch.run_directory import prepare

    prepare(config)
    terms = [reward_term("preference", run=config.run_dir), reward_term("hit", weight=2.0)]
    setting = reward_setting(terms, data_path=config.data.path, seed=3)
    assert setting.runs == {config.run_dir: config} and setting.seed == 3
    scored = build_scorer(terms, setting)([group([3, -1], positives=[3])])
    assert scored.rewards["hit"][0].values.tolist() == [1, 0]
    assert scored.rewards["preference"][0].values[1] == 0
    with pytest.raises(ConfigError, match="did you mean 'preference'"):
        reward_term("preferences")


def test_a_user_without_history_is_named(config, setting):
    with pytest.raises(DataError, match="history of user row 7 is empty"):
        score(Preference.Config(run=config.run_dir).build(setting), group([1], history=[]))


class SumOfCodes(torch.nn.Module):
    """Stands for a PRM: a prefix is worth the sum of its codes and of the history's items."""

    def prefix_ids(self, batch, paths):
        return {}

    def prefix_scores(self, rows, batch, paths):
        totals = torch.zeros(batch.num_users).index_add(
            0, batch.items.row_index(), batch.items.values.float()
        )
        return paths.cumsum(-1) + totals[:, None, None]


def test_process_rewards_are_the_scores_of_every_prefix(config):
    data = replace(config.data, columns=())
    function = Process(
        SimpleNamespace(
            config=replace(config, data=data),
            model=SumOfCodes(),
            lookup=lambda ids: {},
            device=torch.device("cpu"),
        )
    )
    assert function.of_codes
    first, second = score(function, group([1, 2], history=[10, 20]), group([1, 2], history=[1]))
    assert first.values.tolist() == [[30, 31], [32, 35]] and second.values.tolist() == [[1, 2], [3, 6]]


def test_a_process_reward_model_of_other_semantic_ids_is_refused(config, setting, tmp_path, monkeypatch):
    items = pl.Series("item_id", ["a", "b", "c"])
    codes = np.array([[0, 1], [1, 0], [1, 1]], dtype=np.int32)
    own, other = (
        SemanticIdTable(item_ids=items, codes=found, code_sizes=(2, 2)) for found in (codes, codes[::-1])
    )
    own.save(str(tmp_path))
    given, known = replace(setting, semantic_ids=str(tmp_path)), [own, other, None]
    frozen = lambda *_: SimpleNamespace(config=config, model=SumOfCodes(), semantic_ids=known.pop(0))  # noqa: E731
    monkeypatch.setattr("rl.rewards.process.load_frozen", frozen)
    Process.Config(run=config.run_dir).build(given)
    for _ in range(2):
        with pytest.raises(DataError, match=f"semantic IDs of the policy, {own.fingerprint}, and that of"):
            Process.Config(run=config.run_dir).build(given)
    assert not known


def test_calibration_is_asked_for_where_it_is_missing_or_of_another_checkpoint(config, setting, tmp_path):
    actions, step = ("click", "cart", "purchase"), load_frozen(config).step
    saved = Calibration.load(config.run_dir, actions, step=step, data_path=config.data.path)
    assert len(saved.scales) == 3
    moved = replace(config, run_dir=str(tmp_path))
    (tmp_path / "checkpoints").symlink_to(f"{config.run_dir}/checkpoints")
    with pytest.raises(DataError, match="must be calibrated"):
        Preference.Config(run="r").build(replace(setting, runs={"r": moved}))
    saved.save(str(tmp_path), actions, step=step + 1, data_path=config.data.path)
    with pytest.raises(
        DataError, match=f"must be fitted with the weights of step {step} .* --checkpoint {step}`"
    ):
        Preference.Config(run="r").build(replace(setting, runs={"r": moved}))
    saved.save(str(tmp_path), actions, step=step, data_path=config.data.path)
    Preference.Config(run="r").build(replace(setting, runs={"r": moved}))
