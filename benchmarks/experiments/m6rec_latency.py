"""What late interaction saves M6-Rec at a request: `python -m benchmarks.experiments.m6rec_latency --help`.

One user with a history and some candidates is scored by an untrained model, with more and more of the layers reading
each text alone. What these layers say of a text does not depend on the request, so it can be kept from one request to
the next; the joint layers have to be run each time. Times are of the processor, the fastest of several.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from benchmarks.setting.commands import run_experiment
from benchmarks.setting.report import Table
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.m6rec_ranking import M6RecRanking
from models.text_encoder import Joint
from models.texts import Texts

NUM_ITEMS, WORDS = 1_000, 2_048


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print a table of times by number of separate layers."""

    width: int = 256
    """Of the language model."""
    layers: int = 8
    """Of the language model (L)."""
    events: int = 50
    """Behaviours of the user."""
    candidates: int = 100
    """Items that are scored."""
    tokens: int = 24
    """Words of each item."""
    repeats: int = 5
    """Times each is measured."""


def main(arguments: list[str]) -> None:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.experiments.m6rec_latency")
    torch.set_num_threads(1)
    rows = [
        measured(options, separate, joint)
        for joint in ("all", "last")
        for separate in range(joint == "last", options.layers + 1)
    ]
    print(Table(("joint tokens", "separate layers (L')", "texts alone, ms", "at the request, ms"), rows))


def measured(options: Options, separate: int, joint: Literal["all", "last"]) -> tuple[str, ...]:
    """A line of the table."""
    model = build(options, separate, joint)
    generator = torch.Generator().manual_seed(1)
    items = torch.randperm(NUM_ITEMS, generator=generator)
    history = items[: options.events]
    shown = items[options.events : options.events + options.candidates]
    batch = SequenceBatch(
        user_ids=torch.zeros(1, dtype=torch.int64),
        items=Jagged.from_lengths(history, torch.tensor([options.events])),
    )
    known = Jagged.from_lengths(torch.full_like(shown, options.events), torch.tensor([len(shown)]))
    reading = model.encoder.reader.scoring(batch, known, shown.numpy())
    with torch.inference_mode():
        states = model.encoder.joint_input(reading)
        times = [
            fastest_ms(options.repeats, call)
            for call in (
                lambda: model.encoder.separate(reading),
                lambda: model.encoder.join(states, Joint.build(reading), separate, options.layers),
            )
        ]
    return joint, str(separate), *(f"{milliseconds:.0f}" for milliseconds in times)


def build(options: Options, separate: int, joint: Literal["all", "last"]) -> M6RecRanking:
    torch.manual_seed(0)
    words = torch.randint(WORDS, (NUM_ITEMS * options.tokens,), dtype=torch.int32)
    lengths = torch.full((NUM_ITEMS,), options.tokens)
    items = Jagged.from_lengths(words, lengths)
    config = M6RecRanking.Config(
        width=options.width,
        num_blocks=options.layers,
        feedforward_width=2 * options.width,
        separate_blocks=separate,
        joint_tokens=joint,
    )
    texts = Texts(items=items, users=None, vocabulary_size=WORDS, fingerprint="")
    return config.build(texts=texts, actions=("click", "exposure")).eval()


def fastest_ms(repeats: int, call: Callable[[], object]) -> float:
    found = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        found.append(1e3 * (time.process_time() - started))
    return min(found)


if __name__ == "__main__":
    sys.exit(run_experiment(main))
