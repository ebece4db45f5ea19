"""Running the runs of a sweep as `grail pretrain` in processes of their own, some at once."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cluster.logs import duration
from cluster.packages import search_path
from cluster.reporter import StopSignal
from cluster.storage import Storage
from launch.run_directory import EVALUATION
from launch.run_status import read_status

logger = logging.getLogger(__name__)

GRAIL = (sys.executable, "-m", "launch.cli")
_LOOK_EVERY_S = 1.0
_LAST_LINES = 5
_STOPPED = (os.EX_TEMPFAIL, 128 + signal.SIGTERM, -signal.SIGTERM)
"""Exit codes of a run that was told to stop: it has saved, or it was starting and had nothing to save."""


@dataclass(kw_only=True)
class _Working:
    """A run that is being worked on."""

    process: subprocess.Popen
    output: IO[bytes]
    task: TaskID


class SweepRunner:
    """Works off the runs of a sweep below a folder or address; those that are finished already are left alone."""

    def __init__(self, out: str, commands: Mapping[str, list[str]], *, at_once: int, evaluate: bool):
        """`commands` are the words behind `grail pretrain` of each run, by the name of its folder."""
        self.out, self.commands, self.at_once, self.evaluate = out, dict(commands), at_once, evaluate
        self.waiting = [name for name in self.commands if not self._is_done(name)]
        self.working: dict[str, _Working] = {}
        self.failed: list[str] = []
        self.stopped: list[str] = []

    def run(self, console: Console, stop: StopSignal) -> bool:
        """Whether all were worked off; a stop lets those at work save first, and what fails does not end the others."""
        self.done_before, self.begun = self._num_done(), time.monotonic()
        logger.info("%d runs, %d of them finished before", len(self.commands), self.done_before)
        columns = (BarColumn(bar_width=12), TextColumn("{task.description}"))
        with Progress(*columns, console=console, disable=not console.is_terminal) as self.bar:
            self.whole = self.bar.add_task("", total=len(self.commands), completed=self._num_done())
            try:
                while (self.waiting and not stop.requested) or self.working:
                    while self.waiting and len(self.working) < self.at_once and not stop.requested:
                        self._begin(self.waiting.pop(0))
                    if stop.requested:
                        self._end_all()
                    self._look()
            finally:
                self._end_all()
        return not (self.waiting or self.stopped)

    def _num_done(self) -> int:
        return len(self.commands) - len(self.waiting) - len(self.working) - len(self.stopped)

    def _is_trained(self, name: str) -> bool:
        return read_status(Storage(f"{self.out}/{name}")).state == "finished"

    def _is_done(self, name: str) -> bool:
        is_shown = not self.evaluate or Storage(f"{self.out}/{name}").exists(EVALUATION)
        return self._is_trained(name) and is_shown

    def _begin(self, name: str) -> None:
        run_dir = f"{self.out}/{name}"
        if self._is_trained(name):
            words = ["evaluate", run_dir]
        else:
            recipe, *rest = self.commands[name]
            words = ["pretrain", recipe, "--run-dir", run_dir, *rest]
        output = tempfile.TemporaryFile()
        # A group of its own, so that Ctrl-C reaches it once, through us.
        process = subprocess.Popen(
            [*GRAIL, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
            env={**os.environ, "PYTHONPATH": search_path()},
        )
        task = self.bar.add_task(f"{name}: starting", total=None)
        self.working[name] = _Working(process=process, output=output, task=task)

    def _look(self) -> None:
        """Wait a moment, then show how far each is and take those that have ended."""
        time.sleep(_LOOK_EVERY_S)
        for name, work in list(self.working.items()):
            status = read_status(Storage(f"{self.out}/{name}"))
            if status.total_steps and status.updated_at_s:
                told = f"{name}: step {status.step}/{status.total_steps}, loss {status.loss:.4f}"
                self.bar.update(work.task, total=status.total_steps, completed=status.step, description=told)
            if work.process.poll() is not None:
                self._take(name)

    def _take(self, name: str) -> None:
        work = self.working.pop(name)
        self.bar.remove_task(work.task)
        with work.output as output:
            output.seek(0)
            text = output.read()
        Storage(self.out).write(f"{name}.log", text)
        if work.process.returncode in _STOPPED:
            self.stopped.append(name)
            logger.info("%s was stopped and goes on next time", name)
            return
        if work.process.returncode or not self._is_trained(name):
            self._tell_failure(name, work.process.returncode, text.decode(errors="replace"))
        elif not self._is_done(name):
            self.waiting.insert(0, name)  # to be evaluated
            return
        done, total = self._num_done(), len(self.commands)
        per_run = (time.monotonic() - self.begun) / (done - self.done_before)
        told = f"{done} of {total} runs worked off, about {duration((total - done) * per_run)} left"
        self.bar.update(self.whole, completed=done, description=told)
        logger.info("%s: %s", name, told)

    def _tell_failure(self, name: str, code: int, text: str) -> None:
        self.failed.append(name)
        last = "\n".join(text.strip().splitlines()[-_LAST_LINES:])
        whole = f"{self.out}/{name}.log"
        logger.warning("%s failed with exit code %d; all it said is in %s:\n%s", name, code, whole, last)

    def _end_all(self) -> None:
        """Let those at work save and stop."""
        for work in self.working.values():
            with suppress(ProcessLookupError):
                work.process.terminate()
        for name, work in list(self.working.items()):
            work.process.wait()
            self._take(name)
