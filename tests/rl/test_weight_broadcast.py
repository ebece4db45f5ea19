"""Weights by broadcast to real workers: the same bits as from the object store, and no fault that lasts."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cluster import side_group
from cluster.configuration import ClusterConfig
from cluster.errors import ClusterError, PoolGoneError
from cluster.pool import Pool
from rl.weight_broadcast import HeldWeights, WeightCall, WeightSender
from rl.weight_sync import BUCKET_VALUES, FlatWeights

TWO = ClusterConfig(workers=2, start_timeout_s=60)
WIDTH = 2_100
TIMEOUT_S = 20.0


def make_model() -> nn.Module:
    """One bucket ends inside of its large matrix."""
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(3))


def build_holder():
    held = HeldWeights(make_model())

    def work(given: WeightCall | None) -> bool | tuple:
        if given is not None:
            return held.receive(given)
        time.sleep(0.2)
        state = {name: tensor.detach().numpy() for name, tensor in held.module.state_dict().items()}
        return os.getpid(), held.version, state

    return work


def make_weights(seed: int) -> FlatWeights:
    layout = tuple((name, tensor.numel()) for name, tensor in make_model().state_dict().items())
    size = sum(size for _, size in layout)
    assert size > BUCKET_VALUES
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    values[-1] = 3  # the counter of the normalisation is an integer
    return FlatWeights(layout=layout, values=values)


def check_holders(pool: Pool, version: int, weights: FlatWeights) -> None:
    """Every member has them, bit for bit."""
    for _ in pool.pids:
        pool.submit(None, repeats=False)
    answers = []
    while pool.pending:
        answers += pool.poll()
    assert len({pid for _, (pid, _, _) in answers}) == 2
    for _, (_, held, state) in answers:
        assert held == version
        for name, array in weights.arrays().items():
            assert (state[name].reshape(-1) == array).all(), name


@pytest.fixture
def pool():
    with Pool(build_holder, members=2, cluster=TWO, cpus_per_member=0.5, name="rollout pool") as made:
        yield made


def test_every_worker_gets_the_bits_of_the_learner_though_one_dies_and_one_hangs(pool, caplog):
    sender = WeightSender(pool, nccl=False, start_timeout_s=60, timeout_s=TIMEOUT_S)
    for version in (7, 8):
        assert sender.send(version, make_weights(version))
        check_holders(pool, version, make_weights(version))
    assert sender.groups == 1
    dead, halted = pool.pids
    os.kill(dead, signal.SIGKILL)
    begun = time.monotonic()
    assert not sender.send(9, make_weights(9))
    # Mostly at once; a send of gloo's that is on its way keeps the survivor connected until its own time-out.
    assert time.monotonic() - begun < 3 * TIMEOUT_S
    assert "weights 9 did not reach all rollout workers" in caplog.text and pool.deaths == 1
    os.kill(halted, signal.SIGSTOP)
    impatient = WeightSender(pool, nccl=False, start_timeout_s=0, timeout_s=1)
    assert not impatient.send(10, make_weights(10))
    assert pool.deaths == 2
    pool.wait_for_all(60)
    assert sender.send(11, make_weights(11)) and sender.groups > 1
    check_holders(pool, 11, make_weights(11))
    sender.leave()


def test_broadcasts_that_keep_failing_though_nobody_dies_end_the_run(monkeypatch, caplog):
    monkeypatch.setattr(side_group, "num_hosts", lambda: 1)
    tickets = []
    lame = SimpleNamespace(
        pids=[1],
        deaths=0,
        is_complete=True,
        submit=lambda call, repeats: tickets.append(call) or len(tickets) - 1,
        poll=lambda timeout_s: [(len(tickets) - 1, False)],
    )
    sender = WeightSender(lame, nccl=False, start_timeout_s=1, timeout_s=TIMEOUT_S)
    weights = FlatWeights(layout=(("bias", 2),), values=torch.ones(2))
    assert not sender.send(1, weights) and not sender.send(2, weights)
    with pytest.raises(ClusterError, match=r"3 broadcasts in a row failed.*--rollout.weights object-store"):
        sender.send(3, weights)
    assert len({call.invitation.rendezvous for call in tickets}) == 3


def test_a_transfer_that_ended_with_the_pool_is_not_waited_for_once_a_member_is_back(monkeypatch):
    monkeypatch.setattr(side_group, "num_hosts", lambda: 1)
    tickets, polls = [], []

    def poll(timeout_s: float) -> list:
        polls.append(timeout_s)
        if len(polls) == 1:
            raise PoolGoneError("the rollout pool needs at least one of its 1 members")
        assert len(polls) < 100, "the answer of a dead worker is waited for"
        return [(len(tickets) - 1, False)]

    back = SimpleNamespace(
        pids=[1],
        deaths=0,
        is_complete=True,
        submit=lambda call, repeats: tickets.append(call) or len(tickets) - 1,
        poll=poll,
    )
    sender = WeightSender(back, nccl=False, start_timeout_s=1, timeout_s=TIMEOUT_S)
    weights = FlatWeights(layout=(("bias", 2),), values=torch.ones(2))
    with pytest.raises(PoolGoneError):
        sender.send(1, weights)
    assert not sender.send(2, weights)
