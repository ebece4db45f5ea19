"""Faults that a start from the latest checkpoint mends, and those that it does not."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, ObjectLostError, OutOfMemoryError
from torch.distributed import distributed_c10d

from cluster import gang_worker, worker_group
from cluster.configuration import ClusterConfig
from cluster.errors import CheckpointError, ClusterError, MeetingError, MissingRanksError
from cluster.faults import COLLECTIVE, DEATH, MEMORY, FaultHistory, kind_of, kind_of_death
from cluster.gang_worker import Assignment, Seat
from cluster.process import Process, start_process
from cluster.reporter import Pulse, Reporter, StopSignal
from cluster.watchdog import Watchdog
from cluster.worker_group import run_gang

TWO = ClusterConfig(workers=2, start_timeout_s=60, collective_timeout_s=60)


def _run_out_of_memory(process: Process, reporter: Reporter) -> None:
    reporter.stepped(8)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def _halt_once(process: Process, marker: str, reporter: Reporter) -> str:
    first = not Path(marker).exists()
    # Made as DeepSpeed makes its own, without a word about time-outs.
    group = dist.new_group()
    dist.barrier(group=group)
    for step in range(1, 9):
        time.sleep(0.05)
        dist.barrier(group=group)
        reporter.stepped(step)
        if step == 7 and first and process.rank == 1:
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGSTOP)
    return "finished"


def _work_until_stopped(process: Process, reporter: Reporter) -> str:
    reporter.progress(pid=os.getpid())
    while not reporter.stop_requested():
        time.sleep(0.05)
    return "saved"


def test_the_same_fault_at_the_same_step_three_times_ends_the_job_with_a_report(tmp_path, caplog):
    config = ClusterConfig(workers=1, max_restarts=10, start_timeout_s=60)
    with pytest.raises(ClusterError) as ended:
        run_gang(_run_out_of_memory, config=config, run_dir=str(tmp_path))
    lines = str(ended.value).splitlines()
    assert lines[0].startswith("out of memory at step 8 must not come back") and "3 times" in lines[0]
    assert len(lines) == 5 and "raise --train.micro-batches" in lines[-1]
    assert all("1 workers" in line and "CUDA out of memory. Tried to" in line for line in lines[1:4])
    assert "rank 0 failed: out of memory" in caplog.text and "restart 1 of 10" in caplog.text
    written = json.loads((tmp_path / "faults.json").read_text())
    assert [(fault["kind"], fault["step"]) for fault in written] == [(MEMORY, 8)] * 3


def test_a_halted_worker_is_shown_by_the_watchdog_and_left_behind_after_the_time_out(tmp_path, caplog):
    config = ClusterConfig(workers=2, start_timeout_s=60, collective_timeout_s=3)
    result = run_gang(_halt_once, str(tmp_path / "marker"), config=config, run_dir=str(tmp_path))
    assert result == "finished"
    assert "step 8 has taken" in caplog.text and "what every rank is doing" in caplog.text
    assert "dist.barrier(group=group)" in caplog.text, "the stack of the rank that waits"
    assert "it does not answer" in caplog.text, "the rank that is halted"
    assert "rank 0 failed: a failed collective" in caplog.text and "restart 1 of 3" in caplog.text


def test_sigterm_to_a_worker_alone_stops_the_whole_gang_in_good_order(tmp_path, caplog):
    stop = StopSignal()

    def send(event) -> None:
        if event.kind == "progress" and event.rank == 1:
            os.kill(event.values["pid"], signal.SIGTERM)

    result = run_gang(_work_until_stopped, config=TWO, run_dir=str(tmp_path), on_event=send, stop=stop)
    assert result == "saved" and stop.requested
    assert "SIGTERM on rank 1: saving and stopping" in caplog.text


def test_errors_are_told_apart():
    gloo = (
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:9"
    )
    assert kind_of(torch.OutOfMemoryError("no")) == MEMORY
    assert kind_of(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")) == MEMORY
    assert kind_of(dist.DistBackendError("NCCL communicator was aborted")) == COLLECTIVE
    assert kind_of(RuntimeError(gloo)) == COLLECTIVE
    assert kind_of(MeetingError("2 processes were expected")) == COLLECTIVE
    assert kind_of(MissingRanksError("the checkpoint of step 7 needs the files of 2 ranks")) == COLLECTIVE
    assert kind_of(CheckpointError("another model's")) is None
    assert kind_of(RuntimeError("shapes cannot be multiplied")) is None


@pytest.mark.parametrize("way", ["a file alone", "no host", "a taken port"])
def test_workers_that_do_not_meet_are_a_fault_that_a_new_start_may_mend(way, tmp_path, monkeypatch):
    """Each in a process group of its own, never made: the torch of this process stays as it was."""
    monkeypatch.setattr(distributed_c10d, "default_pg_timeout", distributed_c10d.default_pg_timeout)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        if way == "no host":
            taken.close()
        with pytest.raises(
            MeetingError, match=r"2 processes were expected at .* within 1 s, and rank"
        ) as met:
            start_process(
                rank=int(way == "no host"),
                world_size=2,
                local_rank=0,
                local_world_size=2,
                rendezvous=f"file://{tmp_path}/x" if way == "a file alone" else f"tcp://127.0.0.1:{port}",
                num_threads=1,
                timeout_s=1,
            )
    assert kind_of(met.value) == COLLECTIVE


def test_workers_that_did_not_meet_start_again(tmp_path, monkeypatch):
    def alone(**_: object) -> None:
        raise MeetingError("2 processes were expected")

    monkeypatch.setattr(gang_worker, "start_process", alone)
    reporter = Reporter()
    assignment = Assignment(
        function=_work_until_stopped, arguments=(), rendezvous="", world_size=2, config=TWO, logs=None
    )
    gang_worker._run(Seat(pid=1, host="a", address="a", gpus=()), assignment, reporter)
    (event,) = reporter.drain()
    assert (event.kind, event.values["error"], event.values["kind"]) == ("failure", None, COLLECTIVE)


def test_a_worker_that_halts_while_it_starts_is_a_fault(tmp_path, monkeypatch):
    def late(*_: object, **__: object) -> None:
        raise GetTimeoutError

    monkeypatch.setattr(worker_group.ray, "get", late)
    gang = worker_group._Gang(TWO, [2], tmp_path, StopSignal(), None, None)
    with pytest.raises(worker_group._Fault, match="2 workers were to start within 60 s") as ended:
        gang._get([None, None])
    assert ended.value.kind == COLLECTIVE


@pytest.mark.parametrize(
    ("error", "kind", "cause"),
    [
        (OutOfMemoryError("1 worker(s) were killed: low on memory"), MEMORY, "low on memory"),
        (ObjectLostError("f00d", None, ""), DEATH, "Failed to retrieve object f00d"),
    ],
)
def test_a_worker_whose_end_ray_tells_of_in_other_words_is_a_fault(tmp_path, monkeypatch, error, kind, cause):
    def ended(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(worker_group.ray, "get", ended)
    monkeypatch.setattr(worker_group.ray, "wait", lambda references, **_: (references, []))
    gang = worker_group._Gang(TWO, [2], tmp_path, StopSignal(), None, None)
    gang.seats = [Seat(pid=1, host="a", address="a", gpus=())]
    for died in (lambda: gang._get([None]), lambda: gang._poll({"an answer": 0})):
        with pytest.raises(worker_group._Fault, match=f"died.*{cause}") as fault:
            died()
        assert fault.value.kind == kind


def test_the_log_of_a_dead_worker_tells_a_time_out_from_other_deaths(tmp_path):
    log = tmp_path / "rank-0.log"
    assert kind_of_death(log, 0) == (DEATH, "")
    old = "torch.OutOfMemoryError: CUDA out of memory.\n"
    line = "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3) ran for 600000 milliseconds"
    log.write_text(f"{old}step 4\n")
    assert kind_of_death(log, 0)[0] == MEMORY
    assert kind_of_death(log, len(old)) == (DEATH, ""), "lines of an earlier start do not count"
    log.write_text(f"step 4\n{line}\nterminate called\n")
    assert kind_of_death(log, 0) == (COLLECTIVE, line)


def _add(history: FaultHistory, step: int | None, kind: str = DEATH) -> None:
    history.add(kind, "rank 0 died", step=step, workers=2, lasted_s=1.0)


def test_restarts_are_counted_anew_once_the_gang_gets_further(tmp_path):
    history = FaultHistory(str(tmp_path), max_restarts=2)
    for step in (0, 10, 20, 30):
        _add(history, step)
    _add(history, 30, COLLECTIVE)
    with pytest.raises(ClusterError, match=r"the 2 workers must live to the end .* after 2 restarts"):
        _add(history, 25)


def test_different_faults_at_one_step_are_not_the_same(tmp_path):
    history = FaultHistory(str(tmp_path), max_restarts=9)
    for kind in (DEATH, DEATH, MEMORY, DEATH, DEATH):
        _add(history, 7, kind)
    with pytest.raises(ClusterError, match="a dead worker at step 7 must not come back"):
        _add(history, 7)


def test_a_fault_in_the_first_step_is_the_same_and_one_before_any_step_is_not(tmp_path):
    history = FaultHistory(str(tmp_path), max_restarts=9)
    for step in (None, None, None, 0, 0):
        _add(history, step)
    with pytest.raises(ClusterError, match="a dead worker at step 0 must not come back"):
        _add(history, 0)


def test_the_same_fault_counts_over_starts_of_the_command(tmp_path):
    for _ in range(2):
        _add(FaultHistory(str(tmp_path), max_restarts=1), 7)
    again = FaultHistory(str(tmp_path), max_restarts=9)
    with pytest.raises(ClusterError, match="a dead worker at step 7 must not come back"):
        _add(again, 7)
    assert len(json.loads((tmp_path / "faults.json").read_text())) == 3


def test_a_damaged_list_of_faults_is_begun_anew(tmp_path, caplog):
    (tmp_path / "faults.json").write_text('[{"kind"')
    assert FaultHistory(str(tmp_path), max_restarts=9).faults == []
    assert "faults.json is begun anew" in caplog.text


def test_a_worker_tells_no_step_before_its_first(tmp_path):
    reporter, watchdog = Reporter(), Watchdog()
    watchdog.hear(0, reporter.pulse())
    assert watchdog.step is None and watchdog.late() is None
    reporter.stepped(0)
    watchdog.hear(0, reporter.pulse())
    assert watchdog.step == 0


def test_the_watchdog_speaks_once_for_a_step_of_ten_times_the_median():
    watchdog = Watchdog()
    watchdog.hear(0, Pulse(step=7, steps_s=(1.0,) * 7, waiting_s=9.0))
    assert watchdog.late() is None, "nine times the median is not enough"
    watchdog.hear(0, Pulse(step=7, waiting_s=10.1))
    assert "step 8 has taken 10.1 s so far, and the median is 1.000 s" in watchdog.late()
    assert watchdog.late() is None
    watchdog.hear(0, Pulse(step=7))
    watchdog.hear(0, Pulse(step=8, waiting_s=99.0))
    assert "step 9" in watchdog.late()
