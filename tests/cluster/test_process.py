import os
import socket
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from cluster.errors import ConfigError
from cluster.process import Process, interface_towards, loopback_interface, start_process
from cluster.seeds import purpose_seed
from tests.process_group import run_on_processes


def _describe(process: Process, addend: int) -> dict:
    total = torch.tensor([process.rank + addend])
    dist.all_reduce(total)
    host_total = torch.tensor([1])
    dist.all_reduce(host_total, group=process.host_group)
    listening = [
        entry.laddr.ip for entry in psutil.Process().net_connections() if entry.status == psutil.CONN_LISTEN
    ]
    return {
        "rank": process.rank,
        "total": int(total),
        "host_total": int(host_total),
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")},
        "listening": listening,
    }


def _fail_on_rank_one(process: Process) -> None:
    if process.rank == 1:
        raise ValueError("rank one gives up")
    dist.barrier()


def _sleep(process: Process) -> None:
    time.sleep(60)


def test_processes_of_a_group_exchange_tensors_and_know_their_place():
    results = run_on_processes(_describe, 2, 10)
    assert [result["rank"] for result in results] == [0, 1]
    assert all(result["total"] == 21 and result["host_total"] == 2 for result in results)
    assert all(result["threads"] == 1 for result in results)
    assert results[1]["environment"] == {"RANK": "1", "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}


def test_a_group_on_one_machine_listens_on_loopback_addresses_only():
    results = run_on_processes(_describe, 2, 0)
    addresses = {address for result in results for address in result["listening"]}
    assert addresses
    assert all(address.startswith("127.") or address == "::1" for address in addresses), addresses


def test_the_traceback_of_the_rank_that_failed_is_shown():
    with pytest.raises(RuntimeError, match="rank one gives up"):
        run_on_processes(_fail_on_rank_one, 2)


def test_processes_that_do_not_end_are_killed_in_time():
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] did not end within 8 s"):
        run_on_processes(_sleep, 2, timeout_s=8)


def test_the_loopback_interface_is_one_of_this_machine():
    assert loopback_interface() in {name for _, name in socket.if_nameindex()}
    assert (
        interface_towards("tcp://127.0.0.1:29500")
        == loopback_interface()
        == interface_towards("file:///tmp/x")
    )


def test_seeds_differ_by_purpose_and_fit_in_63_bits():
    seeds = {purpose_seed(seed, "shuffle", epoch) for seed in range(20) for epoch in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)
    assert purpose_seed(0, "shuffle", 1) == purpose_seed(0, "shuffle", 1)
    assert purpose_seed(0, "a", 1) != purpose_seed(0, "a1")
    assert purpose_seed(7, "table", "item") == 6089275409163691560


@pytest.mark.parametrize("there", [0, 1])
def test_an_accelerator_that_is_not_there_is_an_error_in_words(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    where = {"rank": there, "local_rank": there, "world_size": 2, "local_world_size": 2}
    with pytest.raises(ConfigError, match=f"sees {there} here; give --cluster.gpus-per-worker 0"):
        start_process(**where, rendezvous="file:///nowhere", num_threads=1, use_gpu=True)
