"""What early exit saves M6-Rec and what it costs: `python -m benchmarks.experiments.m6rec_exits --help`.

A run that was trained with exits ranks the test exposures, while an answer has to be less and less certain to be the
last word. Times are of one processor thread, all of the ranking but the reading of the data, the fastest of several
passes that take turns.
"""

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro

from benchmarks.setting.commands import run_experiment
from benchmarks.setting.report import Table
from cluster.errors import ConfigError
from data_streams.exposures import NO_ITEM, ExposureBatch, ExposureStream
from launch.run_directory import load_config
from models.m6rec_ranking import ITEM
from models.text_reading import Reading
from trainer.frozen import FrozenRun, load_frozen
from trainer.ranking import auc, grouped_auc


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print a table of quality, layers and time by the certainty that is asked for."""

    run: str
    """Run directory of m6-rec-ranking with --model.exits."""
    confidences: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.5)
    """What the likelier answer must have to be the last word; 1 goes through all layers."""
    users_per_batch: int = 128
    """Users ranked together."""
    repeats: int = 3
    """Times each is measured."""


def main(arguments: list[str]) -> None:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.experiments.m6rec_exits")
    torch.set_num_threads(1)
    frozen = load_frozen(load_config(options.run))
    if not getattr(frozen.config.model, "exits", ()):
        raise ConfigError(f"{options.run} must be a run of m6-rec-ranking with --model.exits, and has none")
    stream = ExposureStream(
        frozen.config.data,
        split="test",
        actions=frozen.model.actions,
        rank=0,
        world_size=1,
        users_per_batch=options.users_per_batch,
    )
    batches = list(stream.batches())
    passes = [
        [ranked(frozen, batches, confidence) for confidence in options.confidences]
        for _ in range(options.repeats)
    ]
    rows = []
    for number, confidence in enumerate(options.confidences):
        measured = passes[0][number]
        fastest = min(each[number].seconds for each in passes)
        rows.append((f"{confidence:g}", *measured.shown(), f"{fastest:.2f}"))
    print(Table(("certainty", "click AUC", "click GAUC", "layers", "seconds"), rows))


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Shapes: n exposures."""

    users: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    layers: np.ndarray
    seconds: float

    def shown(self) -> tuple[str, ...]:
        found = auc(self.scores, self.labels), grouped_auc(self.scores, self.labels, self.users)
        return *(f"{value:.4f}" for value in found), f"{self.layers.mean():.2f}"


def ranked(frozen: FrozenRun, batches: list[ExposureBatch], confidence: float) -> Ranked:
    """Answers to the first action."""
    model, parts, seconds = frozen.model, [], 0.0
    model.exit_confidence = confidence
    for batch in batches:
        started = time.process_time()
        with torch.inference_mode():
            rows = frozen.lookup(model.candidate_ids(batch.histories, batch.candidates))
            logits, layers = model.answers_as_sure(Reading.of(rows), rows[ITEM].ids)
        seconds += time.process_time() - started
        real = batch.candidates != NO_ITEM
        users = batch.histories.user_ids[:, None].expand_as(real)[real]
        parts.append([part.numpy() for part in (users, logits[:, 0], batch.answers[..., 0][real], layers)])
    columns = map(np.concatenate, zip(*parts, strict=True))
    return Ranked(**dict(zip(("users", "scores", "labels", "layers"), columns, strict=True)), seconds=seconds)


if __name__ == "__main__":
    sys.exit(run_experiment(main))
