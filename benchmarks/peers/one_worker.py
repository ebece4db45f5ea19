"""The peer of two workers: the same recipe on one worker with all threads.

Runs as `python -m benchmarks.peers.one_worker FOLDER THREADS`; see benchmarks/setting/peer_process.py.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.answers import answer_questions
from benchmarks.setting.recipe import first_batches, start_recipe
from cluster.process import start_process


def main(folder: Path, num_threads: int) -> None:
    """Each line is answered by training on all users of the folder once."""
    logging.disable(logging.WARNING)
    process = start_process(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        rendezvous=f"file://{folder}/rendezvous-of-one",
        num_threads=num_threads,
        timeout_s=600.0,
    )
    recipe = start_recipe(process, (folder / "data").read_text(), (folder / "recipe").read_text())
    batches = first_batches(recipe.stream, 10**6)

    def answer(**_: Any) -> dict[str, Any]:
        started = time.process_time()
        recipe.take_steps(batches)
        return {"cpu_s": time.process_time() - started}

    answer_questions(answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
