"""AUC within and over users, calibration, and a run of a reward model from shards to its evaluation."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from cluster.errors import ConfigError, DataError
from cluster.reporter import Reporter
from cluster.storage import Storage
from data_streams.build import build
from data_streams.build_config import BuildConfig
from data_streams.configuration import DataConfig
from data_streams.item_table import ItemTable
from data_streams.sources.world import WorldSource
from models.mtgr import MTGR
from models.objectives.sampled_softmax import SampledSoftmax
from models.reward_sim import RewardSim
from models.sasrec import SASRec
from sharding.unsharded import UnshardedTables
from tests.process_group import ALONE, run_on_processes
from tests.tiny_run import assert_same_state, read_all, run
from trainer.assembly import Assembly
from trainer.calibration import Calibration, fit_calibration
from trainer.checkpoint_reader import CheckpointReader
from trainer.checks import check
from trainer.configuration import EvaluationConfig, PretrainConfig, SearchConfig, TrainConfig
from trainer.frozen import load_frozen
from trainer.ranking import auc, calibration_error, grouped_auc


def naive_auc(scores, labels):
    wins = [(a > b) + (a == b) / 2 for a, b in product(scores[labels], scores[~labels])]
    return sum(wins) / len(wins)


def test_auc_equals_the_count_of_pairs_with_ties():
    random = np.random.default_rng(0)
    scores, labels = random.integers(0, 5, 60).astype(float), random.random(60) < 0.3
    assert auc(scores, labels) == pytest.approx(naive_auc(scores, labels))
    assert auc(scores, np.ones(60, dtype=bool)) == 0.5


def test_grouped_auc_weighs_users_by_exposures_and_leaves_out_those_with_one_class():
    random = np.random.default_rng(1)
    users = np.repeat([4, 9, 2], [5, 12, 3])
    scores, labels = random.integers(0, 6, 20).astype(float), random.random(20) < 0.5
    labels[users == 2] = True
    of_user = {user: naive_auc(scores[users == user], labels[users == user]) for user in (4, 9)}
    shuffled = random.permutation(20)
    found = grouped_auc(scores[shuffled], labels[shuffled], users[shuffled])
    assert found == pytest.approx((5 * of_user[4] + 12 * of_user[9]) / 17)


def test_platt_scaling_finds_the_scale_and_shift_of_the_truth():
    random = np.random.default_rng(2)
    logits = random.normal(size=(20_000, 2))
    truth = 1 / (1 + np.exp(-(logits * [2.0, 0.5] + [-1.0, 0.3])))
    labels = random.random(truth.shape) < truth
    found = fit_calibration(logits, labels)
    np.testing.assert_allclose(found.scales, [2.0, 0.5], atol=0.1)
    np.testing.assert_allclose(found.shifts, [-1.0, 0.3], atol=0.1)
    calibrated = found.probabilities(torch.from_numpy(logits).float()).numpy()
    assert calibration_error(calibrated[:, 0], labels[:, 0]) < 0.02
    assert calibration_error(1 / (1 + np.exp(-logits[:, 0])), labels[:, 0]) > 0.05
    assert fit_calibration(logits[:5], np.zeros((5, 2), dtype=bool)) == Calibration(
        scales=(1.0, 1.0), shifts=(0.0, 0.0)
    )


def test_a_model_that_is_worse_than_chance_is_not_turned_round():
    logits = np.linspace(-2, 2, 100)[:, None]
    found = fit_calibration(logits, logits < 0)
    assert found.scales == (0.0,) and found.shifts == pytest.approx((0.0,), abs=1e-6)


def test_a_calibration_belongs_to_its_run_and_actions(tmp_path):
    place = {"step": 7, "data_path": "shards"}
    with pytest.raises(DataError, match=r"run `grail evaluate .* --checkpoint 7`"):
        Calibration.load(str(tmp_path), ("click",), **place)
    saved = Calibration(scales=(1.5,), shifts=(-0.5,))
    saved.save(str(tmp_path), ("click",), **place)
    assert Calibration.load(str(tmp_path), ("click",), **place) == saved
    with pytest.raises(DataError, match="must be about the actions cart"):
        Calibration.load(str(tmp_path), ("cart",), **place)


def test_a_calibration_of_other_weights_or_data_is_refused(tmp_path):
    Calibration(scales=(1.5,), shifts=(-0.5,)).save(str(tmp_path), ("click",), step=4, data_path="shards")
    message = (
        "the weights of step 7 on shards, and is of step 4 on shards.* evaluate .* --checkpoint 7` again"
    )
    with pytest.raises(DataError, match=message):
        Calibration.load(str(tmp_path), ("click",), step=7, data_path="shards")
    with pytest.raises(DataError, match="of step 4 on others, and is of step 4 on shards"):
        Calibration.load(str(tmp_path), ("click",), step=4, data_path="others")


def test_a_calibration_written_without_a_step_is_still_read(tmp_path):
    (tmp_path / "calibration.json").write_text('{"click": {"scale": 1.5, "shift": -0.5}}')
    found = Calibration.load(str(tmp_path), ("click",), step=7, data_path="shards")
    assert found == Calibration(scales=(1.5,), shifts=(-0.5,))


def tiny_reward_run(
    folder: Path, *, epochs: int = 2, model: RewardSim.Config | MTGR.Config | None = None
) -> PretrainConfig:
    """Shards of a small world with exposures, and a run on them."""
    model = model or RewardSim.Config(width=8, num_heads=2)
    build(
        WorldSource.Config(num_users=150, num_items=80, num_clusters=4, mean_clicks=8),
        BuildConfig(
            out=str(folder / "shards"),
            chunk_users=16,
            ray="never",
            keep_exposures=True,
            sequence_actions=("click", "cart", "purchase"),
            split_actions=("click",),
        ),
    )
    return PretrainConfig(
        recipe="tiny",
        run_dir=str(folder / "run"),
        data=DataConfig(
            path=str(folder / "shards"),
            max_length=100,
            tokens_per_step=1024,
            num_streams=4,
            columns=model.event_columns,
            history_exposures=True,
        ),
        model=model,
        train=TrainConfig(
            epochs=epochs,
            learning_rate=1e-2,
            precision="fp32",
            selection_metric="auc",
            checkpoint_every_s=None,
        ),
    )


def train_and_evaluate(process, config):
    from trainer.assembly import assemble
    from trainer.ranking import evaluate_answers
    from trainer.run_state import load_weights
    from trainer.start import pretrain

    result = pretrain(process, config, {}, Reporter(process.rank))
    assembly = assemble(config, process)
    reader = CheckpointReader(Storage(f"{config.run_dir}/checkpoints"), "best")
    load_weights(reader, assembly)
    return result, evaluate_answers(assembly, config, split="test", step=reader.step).to_json()


def test_a_reward_model_is_trained_evaluated_and_frozen(tmp_path):
    config = tiny_reward_run(tmp_path)
    check(config)
    (result, evaluation), (_, same) = run_on_processes(train_and_evaluate, 2, config)
    assert evaluation == same and result["best"] > 0.5
    names = ("auc", "gauc", "logloss", "calibration_error", "auc/cart", "auc/purchase")
    assert all(0 < evaluation["metrics"][name] < 1 for name in names)
    assert evaluation["num_users"] > 100
    frozen = load_frozen(config)
    assert frozen.step == result["best_step"] and not any(p.requires_grad for p in frozen.model.parameters())
    reader = CheckpointReader(Storage(f"{config.run_dir}/checkpoints"), "best")
    saved = read_all(reader, "dense/heads.weight")
    torch.testing.assert_close(frozen.model.heads.weight.flatten(), saved.flatten())
    rows = frozen.lookup({"event": torch.arange(80)})["event"].rows
    torch.testing.assert_close(rows, read_all(reader, "table/item"))
    (alone,) = run_on_processes(evaluate_alone, 1, config)
    for name in names:
        assert alone["metrics"][name] == pytest.approx(evaluation["metrics"][name], abs=1e-5)


def test_mtgr_is_trained_and_evaluated_and_a_resumed_run_ends_where_another_does(tmp_path):
    model = MTGR.Config(
        width=8, num_blocks=1, hidden=16, dropout=0.0, window="drawn", user_rows=20, auxiliary_weight=0.5
    )
    whole = tiny_reward_run(tmp_path, model=model)
    check(whole)
    parts = replace(whole, run_dir=str(tmp_path / "parts"))
    (expected_result, expected), _ = run_on_processes(run, 2, whole)
    ((stopped, _),) = run_on_processes(run, 1, parts, 5)
    assert stopped["status"] == "stopped" and 0 < stopped["step"] < expected_result["step"]
    (result, state), _ = run_on_processes(run, 2, parts)
    assert result["step"] == expected_result["step"]
    assert_same_state(state, expected, tolerance=2e-5)
    (alone,) = run_on_processes(evaluate_alone, 1, whole)
    names = ("auc", "gauc", "auc/cart", "gauc/cart", "auc/purchase", "gauc/purchase")
    assert all(0 < alone["metrics"][name] < 1 for name in names)


def evaluate_alone(process, config):
    from launch.jobs import evaluate_job

    step = load_frozen(config).step
    return evaluate_job(process, config, step, "test", None, Reporter(0))


def test_a_reward_model_is_chosen_by_its_own_metrics():
    config = PretrainConfig(
        model=RewardSim.Config(),
        data=DataConfig(columns=RewardSim.Config.event_columns, history_exposures=True),
        train=TrainConfig(selection_metric="ndcg@10"),
    )
    with pytest.raises(ConfigError, match="must be one of auc, gauc; got ndcg@10"):
        check(config)
    fine = replace(config, train=TrainConfig(selection_metric="gauc"))
    check(fine)
    with pytest.raises(ConfigError, match=r"needs --data\.history-exposures"):
        check(replace(fine, data=replace(fine.data, history_exposures=False)))
    with pytest.raises(ConfigError, match="has a loss of its own; leave --objective out"):
        check(replace(fine, objective=SampledSoftmax.Config()))
    finds = replace(fine, model=SASRec.Config(), objective=SampledSoftmax.Config(), train=TrainConfig())
    with pytest.raises(ConfigError, match="SASRec finds items: what a page showed would stand in front"):
        check(finds)


def test_what_needs_a_search_is_refused_for_a_reward_model(tmp_path):
    from launch.commands.evaluate import evaluate

    config = PretrainConfig(model=RewardSim.Config(), run_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="leave --baselines out"):
        evaluate(config, baselines=True)
    with pytest.raises(ConfigError, match="--per-user keeps how each user's held-out item is ranked"):
        evaluate(config, per_user=str(tmp_path / "users.parquet"))
    with pytest.raises(ConfigError, match=r"search\.deny would narrow a search of all items"):
        evaluate(replace(config, search=SearchConfig(deny="items.txt")))
    with pytest.raises(ConfigError, match=r"evaluation\.held-out-action chooses users by the event"):
        evaluate(replace(config, evaluation=EvaluationConfig(held_out_action="click")))
    with pytest.raises(ConfigError, match=r"evaluation\.index hnsw searches all items, and this run's model"):
        evaluate(replace(config, evaluation=EvaluationConfig(index="hnsw")))
    model = RewardSim.Config().build(num_items=3, actions=("click", "exposure"))
    assembly = Assembly(
        config=config,
        process=replace(ALONE, host_group=torch.distributed.ProcessGroup(0, 1)),
        items=ItemTable(
            item_ids=pl.Series([0]),
            titles=pl.Series(["a"]),
            categories=None,
            train_counts=np.zeros(1, dtype=np.int64),
            embeddings=None,
        ),
        item_features=None,
        semantic_ids=None,
        model=model,
        tables=UnshardedTables(model.tables(), seed=0, learning_rate=0.0, device=torch.device("cpu")),
    )
    with pytest.raises(ConfigError, match="holds a RewardSim, which scores given items"):
        assembly.search()
