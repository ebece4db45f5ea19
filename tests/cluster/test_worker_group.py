import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import ray
import torch
import torch.distributed as dist

from cluster.configuration import ClusterConfig
from cluster.errors import ClusterError, DivergenceError
from cluster.packages import root
from cluster.process import Process
from cluster.ray_start import start_ray
from cluster.reporter import Event, Reporter, StopSignal
from cluster.worker_group import run_gang

TWO = ClusterConfig(workers=2, start_timeout_s=60, collective_timeout_s=60, max_restarts=2)


def _sum_ranks(process: Process, addend: int, reporter: Reporter) -> dict:
    logging.getLogger("trainer.test").info("rank %d speaks", process.rank)
    logging.getLogger("trainer.test").debug("a detail of rank %d", process.rank)
    total = torch.tensor([process.rank + addend])
    dist.all_reduce(total)
    reporter.progress(step=1, total=int(total))
    return {"total": int(total), "threads": torch.get_num_threads(), "rank": process.rank}


def _wait_to_be_killed_once(process: Process, marker: str, reporter: Reporter) -> str:
    if not Path(marker).exists():
        reporter.progress(waiting=1)
        dist.barrier()
        Path(marker).touch()
        if process.rank == 1:
            time.sleep(60)
    dist.barrier()
    return "finished"


def _die(process: Process, reporter: Reporter) -> None:
    os._exit(3)


def _diverge_on_rank_one(process: Process, reporter: Reporter) -> None:
    if process.rank == 1:
        raise DivergenceError("the loss of step 7 on rank 1 is not finite")
    dist.barrier()


def _fail_on_rank_one(process: Process, reporter: Reporter) -> None:
    if process.rank == 1:
        raise KeyError("a mistake in the program")
    dist.barrier()


def _work_until_stopped(process: Process, reporter: Reporter) -> str:
    reporter.progress(step=0)
    while not reporter.stop_requested():
        time.sleep(0.05)
    return f"rank {process.rank} stopped"


def _list_sockets(process: Process, driver: int, reporter: Reporter) -> list[tuple[str, str, int]]:
    dist.barrier()
    if process.rank != 0:
        dist.barrier()
        return []
    family = [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]
    listening = [
        (member.name(), entry.laddr.ip, member.pid)
        for member in family
        for entry in member.net_connections()
        if entry.status == psutil.CONN_LISTEN
    ]
    dist.barrier()
    return listening


def test_a_gang_computes_together_and_reports_to_the_driver(tmp_path, caplog):
    events: list[Event] = []
    with caplog.at_level(logging.INFO):
        result = run_gang(_sum_ranks, 10, config=TWO, run_dir=str(tmp_path), on_event=events.append)
    assert result == {"total": 21, "threads": 1, "rank": 0}
    pids = {event.values["pid"] for event in events if event.kind == "started"}
    assert len(pids) == 2 and os.getpid() not in pids
    assert [event.values["total"] for event in events if event.kind == "progress"] == [21, 21]
    assert "[rank 0] rank 0 speaks" in caplog.text and "rank 1 speaks" not in caplog.text
    assert "a detail of rank 1" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_a_gang_starts_again_together_when_a_worker_is_killed(tmp_path, caplog):
    pids: dict[tuple[int, int], int] = {}
    marker = tmp_path / "marker"

    def kill_rank_one(event: Event) -> None:
        if event.kind == "started":
            pids[event.values["restarts"], event.rank] = event.values["pid"]

    def wait_and_kill() -> None:
        while not marker.exists():
            time.sleep(0.05)
        os.kill(pids[0, 1], signal.SIGKILL)

    killer = threading.Thread(target=wait_and_kill, daemon=True)
    killer.start()
    result = run_gang(
        _wait_to_be_killed_once, str(marker), config=TWO, run_dir=str(tmp_path), on_event=kill_rank_one
    )
    killer.join()
    assert result == "finished"
    assert len(set(pids.values())) == 4, "both ranks must have new processes after the restart"
    assert f"rank 1 (pid {pids[0, 1]}) died" in caplog.text and "restart 1 of 2" in caplog.text


def test_workers_that_die_again_and_again_end_the_run(tmp_path):
    config = ClusterConfig(workers=1, max_restarts=1)
    # The worker dies at once, on a busy machine before the gang counts as started.
    died = r"(rank 0 \(pid \d+\) died|a worker died while starting)"
    with pytest.raises(ClusterError, match=rf"must live to the end .* {died}.* after 1 restarts"):
        run_gang(_die, config=config, run_dir=str(tmp_path))


def test_an_error_on_purpose_reaches_the_driver_as_it_is_and_starts_nothing_again(tmp_path, caplog):
    with pytest.raises(DivergenceError, match="the loss of step 7 on rank 1 is not finite"):
        run_gang(_diverge_on_rank_one, config=TWO, run_dir=str(tmp_path))
    assert "restart" not in caplog.text


def test_a_mistake_in_the_program_reaches_the_driver_with_its_traceback(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"rank 1 failed:[\s\S]*_fail_on_rank_one[\s\S]*a mistake in the program"
    ):
        run_gang(_fail_on_rank_one, config=TWO, run_dir=str(tmp_path))


def test_a_requested_stop_reaches_every_worker(tmp_path):
    stop = StopSignal()
    result = run_gang(
        _work_until_stopped, config=TWO, run_dir=str(tmp_path), stop=stop, on_event=lambda _: stop.request()
    )
    assert result == "rank 0 stopped"


def test_workers_without_room_end_with_what_was_asked_and_what_there_is(tmp_path):
    config = ClusterConfig(workers=3, gpus_per_worker=1, start_timeout_s=1)
    with pytest.raises(ClusterError, match=r"3 workers with .*'GPU': 1.* has .* of 0 GPU free"):
        run_gang(_die, config=config, run_dir=str(tmp_path))


def test_a_run_that_is_ended_while_it_waits_for_room_says_why():
    stop, config = StopSignal(), ClusterConfig(workers=3, gpus_per_worker=1, start_timeout_s=60)
    start_ray(config)  # takes longer than what follows
    threading.Timer(1, stop.abort, [ClusterError("another job has taken the run")]).start()
    with pytest.raises(ClusterError, match="another job has taken the run"):
        run_gang(_die, config=config, run_dir="memory://waiting", stop=stop)


def test_a_run_listens_on_the_ports_of_ray_only(tmp_path):
    sockets = run_gang(_list_sockets, os.getpid(), config=TWO, run_dir=str(tmp_path))
    open_to_all = Counter((name, pid) for name, ip, pid in sockets if not ip.startswith("127."))
    allowed = {"gcs_server": 1, "raylet": 2, "ray::RuntimeEnvAgent": 1, psutil.Process().name(): 1}
    for (name, _), count in open_to_all.items():
        limit = 1 if name.startswith("ray::") else allowed.get(name, 0)
        assert count <= limit, f"{name} listens on {count} open ports: {sockets}"
    assert any(name == "ray::GangWorker" and ip.startswith("127.") for name, ip, _ in sockets), (
        "gloo is on loopback"
    )


def test_ray_refuses_a_client_without_the_token():
    start_ray(TWO)
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    program = (
        f"from ray._raylet import GcsClient; GcsClient(address={address!r}).get_all_node_info(timeout=5)"
    )
    refused = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert refused.returncode != 0 and "InvalidAuthToken" in refused.stderr
    accepted = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "RAY_AUTH_MODE": "token"}, timeout=60
    )
    assert accepted.returncode == 0


def test_workers_end_when_the_driver_is_killed(tmp_path):
    program = (
        "from tests.cluster import test_worker_group as gang\n"
        "show = lambda event: print(event.values.get('pid', 0), flush=True)\n"
        f"gang.run_gang(gang._work_until_stopped, config=gang.TWO, run_dir={str(tmp_path)!r}, on_event=show)"
    )
    environment = {**os.environ, "PYTHONPATH": str(root())}
    driver = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    pids = [int(driver.stdout.readline()) for _ in range(2)]
    assert all(psutil.pid_exists(pid) for pid in pids)
    # Ray's two agents take up to a minute to notice; they hold no data of the run.
    family = [
        member.pid
        for member in psutil.Process(driver.pid).children(recursive=True)
        if not member.name().endswith("Agent")
    ]
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 20
    while (left := [pid for pid in pids + family if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _sleep_outside_of_collectives(process: Process, reporter: Reporter) -> None:
    for step in range(7):
        reporter.stepped(step)
    time.sleep(3600)


def test_a_gang_that_hangs_outside_of_collectives_is_ended_by_a_stop_and_by_time(tmp_path):
    # A single one: on a busy machine two would not meet within so short a time.
    config = ClusterConfig(workers=1, start_timeout_s=60, collective_timeout_s=1, max_restarts=0)
    stop = StopSignal()
    threading.Timer(4, stop.request).start()
    begun = time.monotonic()
    assert run_gang(_sleep_outside_of_collectives, config=config, run_dir=str(tmp_path), stop=stop) is None
    assert time.monotonic() - begun < 40
    with pytest.raises(ClusterError, match="a step has taken 6 s, and nothing in it gave up"):
        run_gang(_sleep_outside_of_collectives, config=config, run_dir=str(tmp_path))
