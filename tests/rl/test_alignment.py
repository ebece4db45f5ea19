"""Whole alignments on real processes: world sizes agree, a resumed run equals an undisturbed one, users come once."""

import dataclasses
import json

import pytest

from cluster.storage import Storage
from rl.configuration import AlignOptions
from rl.objectives.grpo import Grpo
from tests.process_group import run_on_processes
from tests.rl.tiny_alignment import EPOCHS, alignment, all_users, make_start, run_alignment, saved_state
from tests.tiny_run import assert_same_state
from trainer.audit import read_audit
from trainer.metric_log import read_metrics


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    config = alignment(start, tmp_path_factory.mktemp("undisturbed"))
    (result,) = run_on_processes(run_alignment, 1, config, start)
    return config, result


def numbers(run_dir, name):
    return {line["step"]: line[name] for line in read_metrics(str(run_dir)) if name in line}


def test_an_alignment_raises_its_reward_and_keeps_the_start_beside_the_best_step(undisturbed):
    config, result = undisturbed
    assert result["status"] == "finished" and result["epoch"] == EPOCHS
    rewards = list(numbers(config.run_dir, "align/reward").values())
    assert sum(rewards[-4:]) > sum(rewards[:4])
    held_out = result["notes"]["held_out"]
    assert {"0", str(result["step"])} <= set(held_out)
    assert max(metrics["ndcg@10"] for metrics in held_out.values()) == pytest.approx(result["best"])
    assert max(numbers(config.run_dir, "train/log_prob_difference").values()) < 1e-4
    assert set(numbers(config.run_dir, "align/policy_age").values()) == {0.0}
    shares = [f"time/{part}_share" for part in ("rollout", "reward", "update", "transfer")]
    assert all(
        0 < sum(line[name] for name in shares) <= 1
        for line in read_metrics(config.run_dir)
        if shares[0] in line
    )


def test_every_user_is_a_prompt_once_in_each_epoch(undisturbed):
    audit = read_audit(Storage(undisturbed[0].run_dir))
    assert [sorted(audit[epoch]) for epoch in range(EPOCHS)] == [all_users()] * EPOCHS


def test_two_learners_do_what_one_does(start, undisturbed, tmp_path):
    config = alignment(start, tmp_path)
    results = run_on_processes(run_alignment, 2, config, start)
    assert results[0]["step"] == undisturbed[1]["step"]
    for name in ("align/reward", "align/entropy", "train/loss"):
        expected = numbers(undisturbed[0].run_dir, name)
        assert numbers(tmp_path, name) == {
            step: pytest.approx(value, abs=1e-4) for step, value in expected.items()
        }
    assert_same_state(saved_state(tmp_path), saved_state(undisturbed[0].run_dir), tolerance=1e-5)


def test_a_resumed_run_equals_an_undisturbed_one_and_never_reuses_a_version(start, undisturbed, tmp_path):
    config = alignment(start, tmp_path)
    (stopped,) = run_on_processes(run_alignment, 1, config, start, 5)
    assert stopped["status"] == "stopped"
    (result,) = run_on_processes(run_alignment, 1, config, start)
    assert result["status"] == "finished"
    assert result["notes"]["held_out"] == undisturbed[1]["notes"]["held_out"]
    assert_same_state(saved_state(tmp_path), saved_state(undisturbed[0].run_dir), tolerance=0.0)
    audit = read_audit(Storage(tmp_path))
    assert [sorted(audit[epoch]) for epoch in range(EPOCHS)] == [all_users()] * EPOCHS
    versions = list(numbers(tmp_path, "align/policy_version").values())
    assert versions == sorted(set(versions))
    assert json.loads((tmp_path / "policy_starts.json").read_text()) == {"starts": 2}


def test_a_reference_an_alarm_and_constrained_draws(start, tmp_path):
    config = alignment(
        start,
        tmp_path,
        objective=Grpo.Config(kl_weight=0.1),
        align=AlignOptions(users_per_step=20, group_size=4, space="catalogue", stop_on=("entropy-collapse",)),
    )
    fast = dataclasses.replace(config.train, learning_rate=0.03, max_gradient_norm=None)
    (result,) = run_on_processes(run_alignment, 1, dataclasses.replace(config, train=fast), start)
    assert result["status"] == "halted" and result["notes"]["halted_by"] == ["entropy-collapse"]
    assert set(numbers(tmp_path, "align/hallucination").values()) == {0.0}
    divergences = numbers(tmp_path, "train/kl")
    assert divergences[1] == pytest.approx(0.0, abs=1e-6) and divergences[max(divergences)] > 0.01
