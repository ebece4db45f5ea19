"""The Slurm script, run with a srun that starts real Ray nodes on this machine, and ended as Slurm ends a job."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.training import ENVIRONMENT, last_step, latest_step, pretrain_line, send, wait_until_gone
from tests.source_tree import ROOT
from tests.tiny_run import build_tiny_data

FAKES = {
    "srun": """
        tasks=1
        while [[ $1 == --* ]]; do
            case $1 in --ntasks=*) tasks=${1#*=} ;; esac
            shift
        done
        for ((task = 0; task < tasks; task++)); do
            setsid "$@" &
            echo $! >>"$FAKE_SLURM/tasks"
        done
        wait""",
    "scontrol": """
        if [ "$1" = show ]; then printf 'localhost\\nlocalhost\\n'; fi
        echo "$@" >>"$FAKE_SLURM/scontrol" """,
    "scancel": """
        echo "$@" >>"$FAKE_SLURM/scancel"
        if [[ "${@: -1}" != *.* ]] || grep --quiet requeue "$FAKE_SLURM/scontrol"; then
            echo "the whole job, or the one that was queued again, would be cancelled" >&2
            exit 1
        fi
        for task in $(cat "$FAKE_SLURM/tasks"); do kill -KILL -- "-$task"; done""",
}


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job on two hosts, which are both this machine."""
    commands, checkout = tmp_path / "bin", tmp_path / "checkout"
    for name, text in FAKES.items():
        write_command(commands / name, text)
    write_command(checkout / ".venv/bin/ray", f'exec {sys.executable} -m ray.scripts.scripts "$@"')
    write_command(checkout / ".venv/bin/grail", f'exec {sys.executable} -m launch.cli "$@"')
    ray_folder = tempfile.mkdtemp(prefix="gr-", dir="/tmp")  # short, as the paths of Unix sockets must be
    yield {
        **{name: value for name, value in ENVIRONMENT.items() if not name.startswith("RAY_AUTH")},
        "PATH": f"{commands}:{os.environ['PATH']}",
        "GRAIL_HOME": str(checkout),
        "GRAIL_REQUEUE": "1",
        "FAKE_SLURM": str(tmp_path),
        "RAY_TMPDIR": ray_folder,
        "SLURM_JOB_ID": str(random.randrange(10_000)),
        "SLURM_JOB_NODELIST": "host[1-2]",
        "SLURM_CPUS_ON_NODE": "1",
    }
    shutil.rmtree(ray_folder, ignore_errors=True)


def write_command(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_a_job_spans_its_hosts_and_saves_when_it_is_cancelled(slurm, tmp_path):
    data, run_dir = build_tiny_data(tmp_path / "data"), tmp_path / "run"
    run_dir.mkdir()
    line = pretrain_line(data, run_dir, "--train.epochs", "200")
    script = [str(ROOT / "cluster/deploy/slurm.sh"), *line]
    log, family = tmp_path / "job.txt", []
    with open(log, "w") as file:
        job = subprocess.Popen(script, env=slurm, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while last_step(run_dir) < 5:
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        family = psutil.Process(job.pid).children(recursive=True)
        send([psutil.Process(job.pid), *family], signal.SIGTERM)
        assert job.wait(60) == 75, log.read_text()
        wait_until_gone(family, 30)
    finally:
        send([*family, psutil.Process(job.pid)] if job.poll() is None else family, signal.SIGKILL)
    output = log.read_text()
    assert "2 worker(s) on 2 host(s) started" in output
    assert f"Stopped at step {latest_step(run_dir)}" in output and latest_step(run_dir) >= 5
    assert "requeue" not in (tmp_path / "scontrol").read_text(), "who cancels a job does not want it back"
    assert steps_killed(tmp_path) == [f"{slurm['SLURM_JOB_ID']}.{step}" for step in (0, 1)]
    assert "would be cancelled" not in output


def steps_killed(folder: Path) -> list[str]:
    lines = (folder / "scancel").read_text().splitlines()
    assert all("--signal=KILL" in line for line in lines)
    return [line.split()[-1] for line in lines]


def test_a_job_that_is_warned_before_the_end_of_its_time_queues_again(slurm, tmp_path):
    """Ray and grail are made up here: one listens, the other saves on SIGTERM."""
    commands = tmp_path / "checkout/.venv/bin"
    port = 20000 + int(slurm["SLURM_JOB_ID"])
    listen = f"import socket, time; kept = socket.create_server(('127.0.0.1', {port})); time.sleep(60)"
    write_command(
        commands / "ray", f'[[ $* == *--head* ]] || exec sleep 60\nexec {sys.executable} -c "{listen}"'
    )
    write_command(
        commands / "grail", 'trap "exit 75" TERM; touch "$FAKE_SLURM/runs"; while :; do sleep 0.1; done'
    )
    script = [str(ROOT / "cluster/deploy/slurm.sh"), "pretrain", "sasrec"]
    job = subprocess.Popen(script, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 20
    while not (tmp_path / "runs").exists():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 75 and "would be cancelled" not in output, output
    assert f"requeue {slurm['SLURM_JOB_ID']}" in (tmp_path / "scontrol").read_text()
    assert len(steps_killed(tmp_path)) == 2


def test_a_job_without_a_command_says_what_is_missing(slurm):
    script = str(ROOT / "cluster/deploy/slurm.sh")
    ended = subprocess.run([script, "pretrain"], env=slurm, capture_output=True, text=True, timeout=20)
    assert (
        ended.returncode == 2
        and "a grail command and its recipe or run directory are required" in ended.stderr
    )
