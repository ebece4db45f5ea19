"""Print what a checkpoint holds: grail checkpoint inspect RUN_DIR [--checkpoint latest]"""

from dataclasses import dataclass

from cluster.storage import Storage
from launch.run_directory import CHECKPOINTS, parse_checkpoint
from launch.served_run import parse_served


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Print what a checkpoint holds."""

    checkpoint: str = "latest"
    """latest, best or the number of a step."""


def run(arguments: list[str]) -> int:
    config, options = parse_served("checkpoint inspect", arguments, InspectOptions)
    from rich.console import Console

    from trainer.checkpoint_layout import best_step, committed_steps
    from trainer.checkpoint_reader import CheckpointReader
    from trainer.export import inspect_checkpoint

    storage = Storage(f"{config.run_dir}/{CHECKPOINTS}")
    reader = CheckpointReader(storage, parse_checkpoint(options.checkpoint))
    Console().print(inspect_checkpoint(reader))
    best = best_step(storage)
    print(
        f"steps: {', '.join(map(str, committed_steps(storage)))}; best: {'none yet' if best is None else best}"
    )
    return 0
