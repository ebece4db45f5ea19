"""Whole alignments on real processes: world sizes agree, a resumed run equals an undisturbed one, users come once."""

import dataclasses
import json
import math
import random
import re
import signal
import time

import pytest

from cluster.configuration import ClusterConfig
from cluster.errors import CheckpointError
from cluster.storage import Storage
from data_streams.semantic_ids import SemanticIdTable
from launch.cli import run as grail
from launch.commands.align import _report, align
from launch.config_document import to_document, to_yaml
from launch.run_status import report_run
from rl.advantages.binary import Binary
from rl.advantages.step_wise import StepWise
from rl.configuration import AlignOptions, RolloutConfig
from rl.objectives.dpo import Dpo
from rl.objectives.ecpo import Ecpo
from rl.objectives.gbpo import Gbpo
from rl.objectives.grpo import Grpo
from rl.reward_mix import RewardTerm
from rl.reward_pool import RewardPoolConfig
from rl.rewards.process import Process as ProcessPrm
from tests.faults.training import Training, send
from tests.process_group import run_on_processes
from tests.rl.tiny_alignment import (
    EPOCHS,
    FAILS,
    HIT,
    NEAR,
    SLOWLY,
    alignment,
    all_users,
    make_prm,
    make_start,
    run_alignment,
    saved_state,
)
from tests.tiny_run import assert_same_state, with_train
from trainer.audit import read_audit
from trainer.metric_log import read_metrics

SEED = 20251125
SHORT = {"epochs": 1, "max_steps": 4, "validate_every_steps": 100}


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


def test_with_staleness_the_next_completions_are_drawn_during_an_update(start, tmp_path):
    config = alignment(
        start,
        tmp_path,
        objective=Ecpo.Config(),
        align=AlignOptions(users_per_step=20, group_size=4, max_staleness=1),
        rollout=RolloutConfig(workers=1, cpus_per_worker=0.5),
    )
    (result,) = run_on_processes(run_alignment, 1, with_train(config, epochs=1), start)
    ages = numbers(tmp_path, "align/policy_age")
    assert ages == {step: min(step - 1, 1) for step in range(1, result["step"] + 1)}
    differences = numbers(tmp_path, "train/log_prob_difference")
    assert differences[1] < 1e-4 < max(differences.values())
    assert sorted(read_audit(Storage(tmp_path))[0]) == all_users()


def test_a_reference_an_alarm_and_constrained_draws(start, tmp_path):
    config = alignment(
        start,
        tmp_path,
        objective=Grpo.Config(kl_weight=0.01),
        align=AlignOptions(users_per_step=20, group_size=4, space="catalogue", stop_on=("entropy-collapse",)),
    )
    fast = dataclasses.replace(config.train, learning_rate=0.02, epochs=8)
    (result,) = run_on_processes(run_alignment, 1, dataclasses.replace(config, train=fast), start)
    assert result["status"] == "halted" and result["notes"]["halted_by"] == ["entropy-collapse"]
    assert set(numbers(tmp_path, "align/hallucination").values()) == {0.0}
    divergences = numbers(tmp_path, "train/kl")
    assert divergences[1] == pytest.approx(0.0, abs=1e-6) and divergences[max(divergences)] > 0.01


def test_the_reference_reads_the_data_of_the_alignment(start, tmp_path):
    gone = dataclasses.replace(start.data, path=str(tmp_path / "gone"), semantic_ids=str(tmp_path / "gone"))
    config = alignment(start, tmp_path / "run", objective=Grpo.Config(kl_weight=0.01))
    begun = dataclasses.replace(start, data=gone)
    (result,) = run_on_processes(run_alignment, 1, with_train(config, **SHORT), begun)
    divergences = numbers(tmp_path / "run", "train/kl")
    assert result["status"] == "finished" and divergences[1] == pytest.approx(0.0, abs=1e-6)
    assert 0 < divergences[result["step"]]


def test_process_rewards_teach_each_code_and_every_reward_is_logged_by_itself(start, tmp_path):
    prm = make_prm(start, tmp_path)
    promising = RewardTerm(name="process", reward=ProcessPrm.Config(run=prm.run_dir), weight=0.5)
    config = alignment(
        start,
        tmp_path / "run",
        objective=Grpo.Config(),
        advantage=StepWise.Config(),
        rewards=(NEAR, promising),
    )
    (result,) = run_on_processes(run_alignment, 1, with_train(config, **SHORT), start)
    assert result["status"] == "finished"
    found = {
        (name, number): numbers(tmp_path / "run", f"align/reward/{name}/{number}")
        for name in ("near", "process")
        for number in ("mean", "spread", "share")
    }
    assert all(len(values) == result["step"] for values in found.values())
    assert min(found["process", "spread"].values()) > 0
    for step, share in found["near", "share"].items():
        spreads = found["near", "spread"][step], 0.5 * found["process", "spread"][step]
        assert share == pytest.approx(spreads[0] / sum(spreads), abs=1e-6)
        assert share + found["process", "share"][step] == pytest.approx(1)
    assert max(numbers(tmp_path / "run", "train/log_prob_difference").values()) < 1e-4


def test_gbpo_learns_from_binary_advantages(start, tmp_path):
    config = alignment(start, tmp_path, objective=Gbpo.Config(), advantage=Binary.Config(), rewards=(NEAR,))
    (result,) = run_on_processes(run_alignment, 1, with_train(config, **SHORT), start)
    assert result["status"] == "finished" and numbers(tmp_path, "align/reward")
    # No advantage is below 0, so no ratio is above 1; groups without a difference have none.
    ratios = list(numbers(tmp_path, "train/ratio").values())
    assert len(ratios) == 4 and 0 < min(ratios) <= max(ratios) <= 1 + 1e-4


def test_dpo_moves_the_best_of_different_completions_away_from_the_reference(start, tmp_path):
    config = alignment(
        start,
        tmp_path,
        objective=Dpo.Config(alpha=0.0),
        align=AlignOptions(users_per_step=20, group_size=4, draws="distinct"),
    )
    (result,) = run_on_processes(run_alignment, 1, with_train(config, epochs=1), start)
    margins, last = numbers(tmp_path, "train/margin"), result["step"]
    assert margins[1] == pytest.approx(0.0, abs=1e-5) and margins[last] > 1e-3
    assert numbers(tmp_path, "train/policy")[1] == pytest.approx(
        math.log(2) * numbers(tmp_path, "train/paired_share")[1], rel=1e-4
    )
    assert max(numbers(tmp_path, "train/log_prob_difference").values()) < 1e-4


@pytest.mark.parametrize(
    ("world_size", "num_pools"), [(2, 0), (1, 1)], ids=["learners do everything", "workers draw and score"]
)
def test_a_step_without_users_changes_no_number_and_is_no_end(start, tmp_path, world_size, num_pools):
    config = alignment(
        start,
        tmp_path,
        objective=Grpo.Config(kl_weight=0.01),
        align=AlignOptions(users_per_step=1, group_size=4),
        rollout=RolloutConfig(workers=num_pools, cpus_per_worker=0.5),
        reward=RewardPoolConfig(workers=num_pools, cpus_per_worker=0.5),
    )
    results = run_on_processes(run_alignment, world_size, with_train(config, **SHORT), start)
    assert [result["status"] for result in results] == ["finished"] * world_size
    users, rewards = numbers(tmp_path, "train/targets_per_step"), numbers(tmp_path, "align/reward")
    assert 0 in users.values() and rewards.keys() == {step for step, count in users.items() if count}
    told = [value for line in read_metrics(str(tmp_path)) for value in line.values()]
    assert all(map(math.isfinite, [*told, *results[0]["notes"]["guards"]["now"].values()]))
    assert all(tensor.isfinite().all() for tensor in saved_state(tmp_path).values())


def test_an_alignment_that_ends_worse_than_its_start_says_so(start, tmp_path, capsys):
    config = alignment(start, tmp_path)
    held_out = {"0": {"ndcg@10": 0.3}, "6": {"ndcg@10": 0.2}, "12": {"ndcg@10": 0.1}}
    result = {"status": "finished", "step": 12, "best_step": 0, "notes": {"held_out": held_out}}
    assert _report(config, result) == 0
    assert "WORSE than the start in ndcg@10; the best one, which is kept, is the start itself" in (
        " ".join(capsys.readouterr().out.split())
    )
    held_out["6"]["ndcg@10"] = 0.4
    assert _report(config, {**result, "best_step": 6}) == 0
    assert "WORSE" in (told := capsys.readouterr().out) and "which is kept, is step 6" in told
    held_out["12"]["ndcg@10"] = 0.35
    assert _report(config, {**result, "best_step": 6}) == 0 and "WORSE" not in capsys.readouterr().out
    held_out["12"] = {"recall@20": 0.5}
    assert _report(config, {**result, "best_step": 6}) == 0, "it may go on with other cutoffs"
    assert re.search(r"recall@20\W+-\W+0.5000\W+-", capsys.readouterr().out)
    held_out["12"] = {"ndcg@10": 0.35}
    assert _report(config, {**result, "best_step": 6}) == 0
    shown = json.loads((tmp_path / "alignment.json").read_text())["shown"]
    assert shown["start"] == held_out["0"] and shown["last (12)"] == held_out["12"]


def kill_one_of(training, pool, choice):
    training.wait_for(lambda: training.members(pool))
    choice.choice(training.members(pool)).kill()


def kill_until_the_end(training, pool):
    deadline = time.monotonic() + 60
    while training.driver.poll() is None and time.monotonic() < deadline:
        send(training.members(pool), signal.SIGKILL)
        time.sleep(0.05)


def test_whoever_is_killed_the_users_and_the_result_stay_the_same(start, undisturbed, tmp_path):
    config = with_train(
        alignment(
            start,
            tmp_path / "run",
            rewards=(SLOWLY, HIT),
            rollout=RolloutConfig(workers=1, cpus_per_worker=0.5),
            reward=RewardPoolConfig(workers=2, cpus_per_worker=0.25, wait_s=0.2),
        ),
        checkpoint_every_steps=2,
    )
    (tmp_path / "align.yaml").write_text(to_yaml(to_document(config)))
    choice = random.Random(SEED)
    with Training(tmp_path / "run", ["align", str(tmp_path / "align.yaml")]) as training:
        training.wait_for_step(2)
        kill_one_of(training, "rollout pool", choice)
        training.wait_for_step(4)
        kill_one_of(training, "reward pool", choice)
        training.wait_for_step(7)
        (learner,) = training.workers()
        learner.kill()
        training.wait_for(lambda: "reward pool is ready" in training.output().partition("restart 1 of 3")[2])
        kill_until_the_end(training, "reward pool")
        assert training.exit_code() == 75, training.output()
        output = training.output()
    assert report_run(f"{tmp_path}/run").state == "stopped"
    assert "member 0 of the rollout pool died" in output
    assert "the reward pool needs at least one of its 2 members" in output
    assert f"Go on with: grail align {tmp_path}/run/align.yaml" in output
    assert (
        grail(["align", f"{tmp_path}/run/align.yaml", "--reward.workers", "0", "--rollout.workers", "0"]) == 0
    )
    assert report_run(f"{tmp_path}/run").state == "finished"
    audit = read_audit(Storage(tmp_path / "run"))
    assert [sorted(audit[epoch]) for epoch in range(EPOCHS)] == [all_users()] * EPOCHS
    assert_same_state(saved_state(tmp_path / "run"), saved_state(undisturbed[0].run_dir), tolerance=1e-5)


def test_two_learners_with_a_reference_and_broadcast_weights_outlive_kills(start, tmp_path):
    def configured(name, **options):
        made = alignment(start, tmp_path / name, objective=Grpo.Config(kl_weight=0.05), **options)
        return with_train(made, epochs=1, checkpoint_every_steps=2)

    (alone,) = run_on_processes(run_alignment, 1, configured("alone"), start)
    config = configured(
        "run",
        rewards=(SLOWLY, HIT),
        rollout=RolloutConfig(workers=1, cpus_per_worker=0.5, weights="broadcast"),
        cluster=ClusterConfig(workers=2, cpus_per_worker=0.5),
    )
    (tmp_path / "align.yaml").write_text(to_yaml(to_document(config)))
    with Training(tmp_path / "run", ["align", str(tmp_path / "align.yaml")]) as training:
        training.wait_for_step(1)
        kill_one_of(training, "rollout pool", random.Random(SEED))
        training.wait_for_step(3)
        random.Random(SEED).choice(training.workers()).kill()
        assert training.exit_code() == 0, training.output()
        output = training.output()
    assert "member 0 of the rollout pool died" in output and "restart 1 of 3" in output
    # One group at each start of the learners, and one with the worker that was replaced.
    assert output.count("weights go to 1 rollout workers by gloo (group 1)") == 2
    assert output.count("weights go to 1 rollout workers by gloo (group 2)") == 1
    assert f"Finished at step {alone['step']}" in output
    assert sorted(read_audit(Storage(tmp_path / "run"))[0]) == all_users()
    for name in ("train/kl", "align/reward"):
        expected = numbers(tmp_path / "alone", name)
        assert expected[alone["step"]] > 0
        assert numbers(tmp_path / "run", name) == pytest.approx(expected, abs=1e-4)
    assert_same_state(saved_state(tmp_path / "run"), saved_state(tmp_path / "alone"), tolerance=1e-5)


def test_sigterm_before_ray_runs_ends_with_the_code_of_a_stop(start, tmp_path, monkeypatch, capsys):
    config = alignment(start, tmp_path / "run", rollout=RolloutConfig(workers=1))
    # First of all, since it takes the function over when it is imported.
    monkeypatch.setattr("cluster.worker_group.start_ray", lambda config: None)
    monkeypatch.setattr(
        "cluster.ray_start.start_ray", lambda config, num_cpus: signal.raise_signal(signal.SIGTERM)
    )
    before = signal.getsignal(signal.SIGTERM)
    assert align(config) == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert f"Go on with: grail align {tmp_path}/run/align.yaml" in capsys.readouterr().err
    assert (tmp_path / "run" / "align.yaml").exists() and report_run(f"{tmp_path}/run").state == "stopped"


def test_semantic_ids_that_the_start_does_not_write_are_refused_before_any_worker(
    start, tmp_path, monkeypatch
):
    monkeypatch.setattr("cluster.ray_start.start_ray", lambda *_, **__: pytest.fail("workers were started"))
    table, other = SemanticIdTable.load(start.data.semantic_ids), str(tmp_path / "ids")
    dataclasses.replace(table, codes=table.codes[::-1].copy()).save(other)
    data = dataclasses.replace(start.data, semantic_ids=other)
    with pytest.raises(CheckpointError, match=f"trained with the semantic IDs {table.fingerprint}"):
        align(alignment(start, tmp_path / "run", data=data))
    assert not (tmp_path / "run").exists()


def test_a_reward_that_raises_ends_the_command_with_its_name_and_the_user(start, tmp_path, capsys):
    config = alignment(start, tmp_path / "run", rewards=(FAILS,))
    (tmp_path / "align.yaml").write_text(to_yaml(to_document(config)))
    assert grail(["align", str(tmp_path / "align.yaml")]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"grail: .*the reward broken failed for user row \d+ \(prompt \d+\): KeyError", told)
    assert report_run(f"{tmp_path}/run").state == "failed"
