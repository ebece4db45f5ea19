"""Going on from the newest checkpoint that is intact: where a file is damaged, all ranks take an older step."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from cluster.errors import DamagedCheckpointError
from cluster.process import Process
from cluster.storage import Storage
from trainer.assembly import agree_on
from trainer.checkpoint_layout import committed_steps, latest_step
from trainer.checkpoint_pointers import BEST, read_pointer, write_pointer
from trainer.checkpoint_reader import CheckpointReader
from trainer.run_state import Progress

Restored = TypeVar("Restored")

logger = logging.getLogger(__name__)


def newest_step(checkpoints: Storage) -> int:
    """The step a run goes on from; -1 where there is none."""
    step = latest_step(checkpoints)
    return -1 if step is None else step


def restore_newest(
    checkpoints: Storage, step: int, process: Process, restore: Callable[[CheckpointReader], Restored]
) -> Restored:
    """Restore from `step` or, where any rank finds a damaged file, from the next older one; a collective call.

    `restore` overwrites all of the state, so what a failed one has filled does not matter. Steps after the one
    that is taken will be done again.

    Raises: DamagedCheckpointError naming the damaged file if no older checkpoint is left.
    """
    while True:
        restored, damage = None, ""
        try:
            restored = restore(CheckpointReader(checkpoints, step))
        except DamagedCheckpointError as error:
            damage = str(error)
        damage = _first_text(damage, process)
        if not damage:
            return restored
        older = [saved for saved in committed_steps(checkpoints) if saved < step] if process.rank == 0 else []
        next_step = agree_on(older[-1] if older else -1, process)
        if next_step < 0:
            raise DamagedCheckpointError(
                f"{damage} No older checkpoint is left in {checkpoints.path('')}: restore the file, or start with "
                "another run directory."
            )
        logger.warning(
            "The checkpoint of step %d is damaged, going on from step %d: %s", step, next_step, damage
        )
        step = next_step


def void_later_best(checkpoints: Storage, progress: Progress, process: Process) -> None:
    """Let BEST name no step after the one that was restored, since those will be done again; a collective call.

    It names what was best until then; where that is not there any more, the next validation is the first one.
    """
    named = read_pointer(checkpoints, BEST) if process.rank == 0 else None
    if agree_on(-1 if named is None else named, process) <= progress.step:
        return
    is_kept = bool(agree_on(int(progress.best_step in committed_steps(checkpoints)), process))
    if not is_kept:
        progress.forget_best()
    if process.rank == 0:
        _replace_best(checkpoints, progress.best_step)
        until_then = "none" if progress.best_step is None else f"that of step {progress.best_step}"
        logger.warning(
            "The best checkpoint was of step %d, which will be done again; until then the best is %s.",
            *(named, until_then),
        )


def _replace_best(checkpoints: Storage, step: int | None) -> None:
    if step is None:
        checkpoints.delete(BEST)
    else:
        write_pointer(checkpoints, BEST, step)


def _first_text(text: str, process: Process) -> str:
    """The text of the first rank that has one, on all ranks; empty where none has."""
    data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
    length = torch.tensor([len(text.encode())])
    lengths = [torch.zeros_like(length) for _ in range(process.world_size)]
    dist.all_gather(lengths, length, group=process.host_group)
    speaker = next((rank for rank, found in enumerate(lengths) if found), None)
    if speaker is None:
        return ""
    if speaker != process.rank:
        data = torch.zeros(int(lengths[speaker]), dtype=torch.uint8)
    dist.broadcast(data, speaker, group=process.host_group)
    return bytes(data.tolist()).decode()
