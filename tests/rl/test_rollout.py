"""The queue of rollouts without workers: completions of a policy that was lost are dropped and drawn again."""

import logging
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cluster.configuration import ClusterConfig
from cluster.errors import DivergenceError
from rl import rollout
from rl.configuration import AlignOptions, RolloutConfig
from rl.policy_version import version_of
from rl.prompts import POSITIVES
from rl.rollout import PooledRollouts
from rl.types import Completions
from sharding.collectives import scatter_objects
from tests.process_group import ALONE, impatient, run_on_processes
from tests.training_cases import make_batch

LOST, NOW = version_of(1, 7), version_of(2, 5)
TIMEOUT_S, LATE_S = 2.0, 5.0


class StubPool:
    """Answers the last submitted first; each of the first answers is by the version that is named for it."""

    def __init__(self, *_, **__):
        self.submitted, self.left, self.versions, self.lacks_weights = [], [], [], False

    @property
    def pending(self):
        return len(self.left)

    def submit(self, work):
        self.submitted.append(work)
        self.left.append(len(self.submitted) - 1)
        return self.left[-1]

    def poll(self, timeout_s):
        ticket = self.left.pop()
        work = self.submitted[ticket]
        if self.lacks_weights and work.weights is None:
            return [(ticket, None)]
        prompts = work.part.prompts
        shape = (prompts.num_users, 2, 3)
        return [
            (
                ticket,
                Completions(
                    prompts=prompts,
                    paths=np.full(shape, ticket),
                    items=np.zeros(shape[:2], dtype=np.int64),
                    log_probs=np.zeros(shape, dtype=np.float32),
                    policy_version=self.versions.pop(0) if self.versions else work.version,
                ),
            )
        ]


class LatePool(StubPool):
    """Answers after the others would have given up."""

    def poll(self, timeout_s):
        due = self.__dict__.setdefault("due", time.monotonic() + LATE_S)
        time.sleep(min(timeout_s, max(due - time.monotonic(), 0)))
        return super().poll(timeout_s) if time.monotonic() >= due else []


@pytest.fixture
def rollouts(monkeypatch):
    return make_rollouts(monkeypatch, RolloutConfig(workers=2))


def make_rollouts(monkeypatch, config, process=ALONE, pool=StubPool):
    monkeypatch.setattr(rollout, "Pool", pool)
    monkeypatch.setattr(rollout, "gather_weights", lambda engine, process: SimpleNamespace(arrays=dict))
    monkeypatch.setattr(rollout.SharedObject, "put", lambda weights: weights)
    assembly = SimpleNamespace(
        process=process,
        config=None,
        semantic_ids=SimpleNamespace(codes=np.zeros((12, 3), dtype=np.int32)),
        lookup=lambda: lambda ids: {},
        model=SimpleNamespace(prompt_ids=lambda part: {}),
    )
    made = PooledRollouts(
        *(assembly, None, SimpleNamespace(options=AlignOptions())),
        config=config,
        cluster=ClusterConfig(collective_timeout_s=TIMEOUT_S),
    )
    made.publish(NOW)
    return made


def make_step():
    batch = make_batch([torch.arange(1, length) for length in (5, 3, 9, 12)])
    prompts = replace(batch, targets=None, target_features={}, supervision={POSITIVES: batch.items})
    return SimpleNamespace(prompts=prompts, serials=torch.arange(4) + 40)


def test_lost_completions_are_dropped_and_drawn_again(rollouts, caplog):
    rollouts._pool.versions = [NOW - 1, LOST, LOST]
    begun = rollouts.begin(make_step())
    with caplog.at_level(logging.WARNING):
        (drawn,) = rollouts.finish(begun)
    assert len(rollouts._pool.submitted) == 4 and caplog.text.count("dropped and drawn again") == 2
    assert drawn.prompts.serials.tolist() == [40, 41, 42, 43]
    # The first part was lost twice: by its own ticket and by the one it got instead.
    assert drawn.paths[:, 0, 0].tolist() == [3, 3, 3, 1]
    assert drawn.policy_version == NOW - 1
    assert not rollouts._asked and not rollouts._done


def test_completions_of_this_start_are_kept_however_old(rollouts):
    rollouts._pool.versions = [NOW - 4, NOW - 4]
    (drawn,) = rollouts.finish(rollouts.begin(make_step()))
    assert len(rollouts._pool.submitted) == 2 and drawn.policy_version == NOW - 4


def test_a_worker_that_missed_a_broadcast_gets_the_weights_with_its_work(monkeypatch):
    sent = []
    sender = SimpleNamespace(send=lambda version, weights: sent.append(version), leave=lambda: None)
    monkeypatch.setattr(rollout, "WeightSender", lambda pool, **options: sender)
    rollouts = make_rollouts(monkeypatch, RolloutConfig(workers=2, weights="broadcast"))
    (drawn,) = rollouts.finish(rollouts.begin(make_step()))
    assert [work.weights for work in rollouts._pool.submitted] == [None, None]
    rollouts._pool.lacks_weights = True
    (drawn,) = rollouts.finish(rollouts.begin(make_step()))
    assert [work.weights for work in rollouts._pool.submitted[2:]] == [None, None, {}, {}]
    assert drawn.policy_version == NOW and drawn.prompts.serials.tolist() == [40, 41, 42, 43]
    rollouts.begin(make_step())
    rollouts.settle()
    rollouts.publish(NOW + 1)
    assert sent == [NOW, NOW + 1] and not rollouts._pool.pending


def settle_late(process):
    process = impatient(process, TIMEOUT_S)
    with pytest.MonkeyPatch.context() as monkeypatch:
        sender = SimpleNamespace(send=lambda version, weights: None, leave=lambda: None)
        monkeypatch.setattr(rollout, "WeightSender", lambda pool, **options: sender)
        config = RolloutConfig(workers=2, weights="broadcast")
        rollouts = make_rollouts(monkeypatch, config, process, LatePool)
        begun = rollouts.begin(make_step())
        rollouts.settle()
        return scatter_objects(rollouts.finish(begun), process).prompts.num_users


def publish_late(process):
    process = impatient(process, TIMEOUT_S)

    class SlowSender:
        def __init__(self, pool, *, on_wait, **_):
            self.on_wait = on_wait

        def send(self, version, weights):
            until = time.monotonic() + LATE_S
            while time.monotonic() < until:
                time.sleep(0.01)
                self.on_wait()

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(rollout, "WeightSender", SlowSender)
        config = RolloutConfig(workers=2, weights="broadcast")
        return make_rollouts(monkeypatch, config, process).version


def test_no_rank_gives_up_while_the_first_one_sends_weights():
    assert run_on_processes(publish_late, 2) == [NOW, NOW]


def test_no_rank_gives_up_while_the_first_one_waits_for_completions():
    assert run_on_processes(settle_late, 2) == [4, 4]


def test_completions_that_are_not_finite_are_drawn_again_a_few_times(rollouts, monkeypatch, caplog):
    poll, broken = rollouts._pool.poll, [True, False, False]

    def faulty(timeout_s):
        ((ticket, drawn),) = poll(timeout_s)
        log_probs = np.where(broken.pop(0) if broken else False, np.nan, drawn.log_probs)
        return [(ticket, replace(drawn, log_probs=log_probs))]

    monkeypatch.setattr(rollouts._pool, "poll", faulty)
    (drawn,) = rollouts.finish(rollouts.begin(make_step()))
    assert np.isfinite(drawn.log_probs).all() and len(rollouts._pool.submitted) == 3
    assert "not finite; they are drawn again" in caplog.text
    broken += [True] * 9
    with pytest.raises(DivergenceError, match="those of 4 parts of prompts were not"):
        rollouts.finish(rollouts.begin(make_step()))


def test_a_wish_to_stop_ends_the_wait_for_completions(rollouts):
    begun = rollouts.begin(make_step())
    rollouts._stop_requested = lambda: True
    assert rollouts.finish(begun) is None


def test_a_wish_to_stop_ends_the_wait_before_a_broadcast_too(monkeypatch):
    sent = []
    sender = SimpleNamespace(send=lambda version, weights: sent.append(version), leave=lambda: None)
    monkeypatch.setattr(rollout, "WeightSender", lambda pool, **options: sender)
    rollouts = make_rollouts(monkeypatch, RolloutConfig(workers=2, weights="broadcast"))
    begun = rollouts.begin(make_step())
    monkeypatch.setattr(rollouts._pool, "poll", lambda timeout_s: pytest.fail("it waits for completions"))
    rollouts._stop_requested = lambda: True
    rollouts.settle()
    rollouts.publish(NOW + 1)
    assert sent == [NOW] and rollouts.finish(begun) is None
