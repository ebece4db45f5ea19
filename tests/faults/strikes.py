"""Faults that `make chaos` brings on a training, and how long it takes to recover from each."""

import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from launch.config_document import to_document, to_yaml
from rl.configuration import RolloutConfig
from rl.reward_pool import RewardPoolConfig
from tests.faults.training import (
    ENVIRONMENT,
    Training,
    last_step,
    metric_lines,
    pretrain_line,
    send,
    wait_until_gone,
)
from tests.faults.two_hosts import TwoHosts
from tests.rl.tiny_alignment import HIT, SLOWLY, alignment, make_start
from tests.tiny_run import with_train

WORKER, DRIVER, JOB, WRITE = (
    "a worker killed",
    "the driver killed",
    "the job killed",
    "the job killed in a write",
)
PAUSE, CLOCK, SLOW = "a worker paused", "the clock jumps", "a slow disk"
FULL, HOST = "a full disk", "a host lost"
ROLLOUT, REWARD = "a rollout worker killed", "a reward worker killed"
KINDS = (WORKER, DRIVER, JOB, WRITE, PAUSE, CLOCK, FULL, SLOW, HOST, ROLLOUT, REWARD)
SIGKILLS = (WORKER, DRIVER, JOB, WRITE, ROLLOUT, REWARD)
POOLS = {ROLLOUT: "rollout pool", REWARD: "reward pool"}
ENDS_THE_COMMAND = (DRIVER, JOB, WRITE, FULL)
"""After these the same command has to be started again; the others a running one mends by itself."""

WORKERS_GONE_S = 60.0
FULL_DISK_S = 120.0
PAUSE_S = (0.5, 3.0)
COLLECTIVE_TIMEOUT_S = 20
DISK_MIB = 24
EPOCHS = 10
"""Of 8 steps each."""


class NoDiskError(Exception):
    """A file system of its own cannot be mounted here."""


@dataclass(kw_only=True)
class Fault:
    """One strike, and what became of the run."""

    kind: str
    at: float = field(default_factory=time.monotonic)
    quiet_at: float = 0.0
    """When nothing of what was struck was left that could take a step."""
    recovery_s: float | None = None
    """Until the first step after it; None where the next fault came first."""
    survived: bool = False


@dataclass(kw_only=True)
class Scene:
    """Where a run takes place, and what can happen to it there."""

    run_dir: Path
    kinds: tuple[str, ...]
    """One of them is named as often as it shall come among so many."""
    most_faults: int = 12
    """Of one run."""
    same_workers: bool = True
    """Whether the number of workers stays, so that the run must be equal to an undisturbed one."""
    options: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=lambda: dict(ENVIRONMENT))
    hosts: TwoHosts | None = None
    line: tuple[str, ...] = ()
    """The command, if it is not the usual training."""
    undisturbed: Path | None = None
    """Run of that command without a fault, which must end in the same state."""

    @property
    def controls(self) -> Path:
        return self.run_dir.parent / "controls"

    def workers(self, training: Training) -> list[psutil.Process]:
        hosts = self.hosts
        return [*hosts.workers(1), *hosts.workers(2)] if hosts else training.workers()

    def mend(self) -> None:
        """Bring back a host that was lost."""
        if self.hosts and not self.hosts.runs(2):
            self.hosts.start_ray(2)

    def training(self, data: str) -> Training:
        if self.line:
            return Training(self.run_dir, [*self.line, "--run-dir", str(self.run_dir)])
        options = (
            "--train.epochs",
            str(EPOCHS),
            "--train.checkpoint-every-steps",
            "1",
            "--cluster.max-restarts",
            "9",
            *self.options,
        )
        line = pretrain_line(data, self.run_dir, *options)
        return Training(self.run_dir, line, prefix=self.prefix, environment=self.environment)


@contextmanager
def on_this_machine(folder: Path) -> Iterator[Scene]:
    """Two workers under a driver, with a clock that can be set."""
    folder.mkdir()
    scene = Scene(
        run_dir=folder / "run",
        kinds=(*[WORKER] * 4, DRIVER, JOB, WRITE, WRITE, PAUSE, CLOCK),
        options=("--cluster.collective-timeout-s", str(COLLECTIVE_TIMEOUT_S)),
    )
    _make_hostile(scene)
    yield scene


@contextmanager
def on_a_small_disk(folder: Path) -> Iterator[Scene]:
    """The run directory is a file system of a few MiB. Raises: NoDiskError without root."""
    scene = Scene(run_dir=folder / "run", kinds=(FULL, SLOW, WRITE, WORKER, WORKER), most_faults=6)
    scene.run_dir.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(scene.run_dir)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        raise NoDiskError(mounted.stderr)
    try:
        _make_hostile(scene)
        yield scene
    finally:
        shutil.copytree(scene.run_dir, folder / "kept")
        subprocess.run(["umount", "--lazy", str(scene.run_dir)], check=True)


@contextmanager
def on_two_hosts(folder: Path) -> Iterator[Scene]:
    """One worker on each of two network namespaces. Raises: NoHostsError without root."""
    folder.mkdir()
    with TwoHosts() as hosts:
        yield Scene(
            run_dir=folder / "run",
            kinds=(HOST, DRIVER),
            most_faults=4,
            same_workers=False,
            options=("--cluster.address", hosts.ray_address, "--cluster.min-workers", "1"),
            prefix=tuple(hosts.prefix(1)),
            environment=hosts.environment,
            hosts=hosts,
        )


@contextmanager
def on_an_alignment(folder: Path) -> Iterator[Scene]:
    """A learner between a pool of rollout workers and one of reward workers."""
    start = make_start(folder)
    config = alignment(
        start,
        folder / "undisturbed",
        rewards=(SLOWLY, HIT),
        rollout=RolloutConfig(workers=1, cpus_per_worker=0.5),
        reward=RewardPoolConfig(workers=2, cpus_per_worker=0.25),
    )
    config = with_train(config, epochs=EPOCHS, checkpoint_every_steps=1, validate_every_steps=40)
    cluster = replace(config.cluster, max_restarts=9)
    (folder / "align.yaml").write_text(to_yaml(to_document(replace(config, cluster=cluster))))
    line = ("align", str(folder / "align.yaml"))
    with Training(folder / "undisturbed", list(line)) as training:
        assert training.exit_code() == 0, training.output()
    yield Scene(
        run_dir=folder / "run",
        kinds=(ROLLOUT, ROLLOUT, REWARD, REWARD, WORKER, DRIVER),
        line=line,
        undisturbed=folder / "undisturbed",
    )


def _make_hostile(scene: Scene) -> None:
    scene.controls.mkdir()
    hostile = Path(__file__).parent / "hostile_machine"
    scene.environment["GRAIL_HOSTILE"] = str(scene.controls)
    scene.environment["PYTHONPATH"] = f"{hostile}:{scene.environment['PYTHONPATH']}"


def strike(scene: Scene, training: Training, kind: str, choice: random.Random) -> Fault:
    """Let a fault happen; where there is no worker or no step yet, the whole job is killed as it is."""
    workers = scene.workers(training)
    if kind in (WORKER, WRITE, PAUSE) and not (workers and last_step(scene.run_dir)):
        kind = JOB
    if kind in POOLS and not training.members(POOLS[kind]):
        kind = JOB
    if kind == HOST and len(workers) < 2:
        kind = DRIVER
    fault = Fault(kind=kind)
    try:
        _STRIKES[kind](scene, training, choice, workers)
    except psutil.NoSuchProcess:  # the victim had ended since it was listed
        fault.kind = JOB
        training.kill_everything()
    fault.quiet_at = time.monotonic()
    return fault


Workers = list[psutil.Process]


def _kill_worker(scene: Scene, training: Training, choice: random.Random, workers: Workers) -> None:
    choice.choice(workers).kill()


def _kill_member(pool: str, training: Training, choice: random.Random) -> None:
    choice.choice(training.members(pool)).kill()


def _kill_driver(scene: Scene, training: Training, choice: random.Random, workers: Workers) -> None:
    training.driver.kill()
    training.driver.wait(30)
    wait_until_gone(workers, WORKERS_GONE_S)


def _pause_worker(scene: Scene, training: Training, choice: random.Random, workers: Workers) -> None:
    """Half of them go on before the others lose patience, half never do."""
    victim = choice.choice(workers)
    victim.suspend()
    if choice.random() < 0.5:
        time.sleep(choice.uniform(*PAUSE_S))
        send([victim], signal.SIGCONT)


def _jump(scene: Scene, training: Training, choice: random.Random, workers: Workers) -> None:
    hours = choice.choice([-1, 1]) * choice.uniform(0.5, 48)
    (scene.controls / "clock").write_text(str(3600 * hours))


def _fill_disk(scene: Scene, training: Training, choice: random.Random, workers: Workers) -> None:
    """Not a byte is left until the job has ended, which must say why; then there is room again."""
    ballast = scene.run_dir / "ballast"
    deadline = time.monotonic() + FULL_DISK_S
    with open(ballast, "wb", buffering=0) as file:
        # What the job deletes is taken too.
        while training.driver.poll() is None:
            assert time.monotonic() < deadline, f"goes on with a full disk:\n{training.output()}"
            with suppress(OSError):
                while True:
                    file.write(bytes(4096))
            time.sleep(0.01)
    ballast.unlink()
    code, output = training.exit_code(), training.output()
    assert code == 1, f"ended with {code} on a full disk:\n{output}"
    assert "No space left on device" in output and "Traceback" not in output, output


def _slow_disk(scene: Scene, training: Training, choice: random.Random, workers: Workers) -> None:
    """Every write takes up to a second longer for a few steps."""
    control = scene.controls / "slow"
    control.write_text(str(choice.uniform(0.2, 1.0)))
    reached = last_step(scene.run_dir)
    training.wait_for(lambda: training.driver.poll() is not None or last_step(scene.run_dir) > reached + 3)
    control.unlink()


_STRIKES: dict[str, Callable[[Scene, Training, random.Random, Workers], None]] = {
    WORKER: _kill_worker,
    DRIVER: _kill_driver,
    JOB: lambda scene, training, choice, workers: training.kill_everything(),
    WRITE: lambda scene, training, choice, workers: training.kill_everything_during_a_write(),
    PAUSE: _pause_worker,
    CLOCK: _jump,
    FULL: _fill_disk,
    SLOW: _slow_disk,
    ROLLOUT: lambda scene, training, choice, workers: _kill_member(POOLS[ROLLOUT], training, choice),
    REWARD: lambda scene, training, choice, workers: _kill_member(POOLS[REWARD], training, choice),
    HOST: lambda scene, training, choice, workers: scene.hosts.kill_host(2),
}


class StepWatch:
    """Notes by the steady clock when steps are taken: the times written into metrics.jsonl jump with the clock."""

    def __init__(self, run_dir: Path):
        self._run_dir, self._seen, self._instants = run_dir, set(), []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "StepWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def first_after(self, instant: float) -> float | None:
        return next((seen for seen in self._instants if seen > instant), None)

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            lines = {(line["step"], line["time_s"]) for line in metric_lines(self._run_dir)}
            if lines - self._seen:
                self._seen |= lines
                self._instants.append(time.monotonic())
