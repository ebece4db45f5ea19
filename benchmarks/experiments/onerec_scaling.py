"""How the loss of OneRec-V2 falls with its size: `python -m benchmarks.experiments.onerec_scaling --help`.

Each size sees every event once, so the loss of a step is that of events it was not trained on. The mean over the last
part of the epoch is fitted by L(N) = E + A / N^alpha, as in the report, where N counts the parameters of the decoder's
blocks. The rate falls with the square root of the width.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from scipy.optimize import curve_fit

from benchmarks.setting.commands import option_words, pretrain_once
from cluster.errors import ConfigError
from trainer.metric_log import read_metrics

SHAPES = {16: (2, 2), 32: (2, 2), 48: (3, 2), 64: (4, 2), 96: (4, 4), 128: (6, 4), 192: (8, 6)}
"""Width -> blocks, heads."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train once per width and seed, fit the law and draw it; finished runs are not repeated."""

    data: str
    """Shards of `grail data build`, such as the synthetic world."""
    semantic_ids: str
    """Semantic IDs of its items."""
    out: str = "runs/onerec-scaling"
    """Folder of the runs, of law.json and of picture.png."""
    widths: tuple[int, ...] = (16, 32, 48, 64, 96, 128)
    """Widths to train, at least 4 of those with a shape."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of each width."""
    learning_rate: float = 4e-3
    """Rate of a model of width 16."""
    last_part: float = 0.2
    """Share of the epoch whose loss counts."""
    extra: tuple[str, ...] = ()
    """Further options of all training runs as NAME=VALUE, such as cluster.workers=1."""


def main(arguments: list[str]) -> None:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.experiments.onerec_scaling")
    unknown = [width for width in options.widths if width not in SHAPES]
    if unknown or len(options.widths) < 4:
        raise ConfigError(f"widths must be at least 4 of {list(SHAPES)}, got {options.widths}")
    points = []
    for width in options.widths:
        losses = [_loss(options, width, seed) for seed in options.seeds]
        points.append((block_parameters(width), float(np.mean(losses))))
        print(f"width {width}: {points[-1][0]:,} parameters, loss {points[-1][1]:.4f}", flush=True)
    sizes, losses = (np.array(column) for column in zip(*points, strict=True))
    law = fit_law(sizes, losses)
    (Path(options.out) / "law.json").write_text(json.dumps({"points": points, **law}, indent=2) + "\n")
    print(f"L(N) = {law['floor']:.3f} + {law['scale']:.4g} / N^{law['exponent']:.3f}")
    _draw(Path(options.out) / "picture.png", sizes, losses, law)


def block_parameters(width: int) -> int:
    """Of blocks with three norms, 6 width^2 of attention and 12 of feed-forward."""
    blocks, _ = SHAPES[width]
    return blocks * (18 * width**2 + 3 * width)


def fit_law(sizes: Sequence[float], losses: Sequence[float]) -> dict[str, float]:
    """Least squares of L(N) = floor + scale / N^exponent, all of them at least 0."""
    sizes, losses = np.asarray(sizes, dtype=float), np.asarray(losses, dtype=float)
    unit = sizes.min()
    fitted, _ = curve_fit(
        lambda size, floor, drop, exponent: floor + drop * (size / unit) ** -exponent,
        sizes,
        losses,
        p0=(losses.min(), max(np.ptp(losses), 1e-3), 0.3),
        bounds=(0, (losses.min(), np.inf, 3.0)),
        max_nfev=20_000,
    )
    floor, drop, exponent = map(float, fitted)
    return {"floor": floor, "scale": drop * unit**exponent, "exponent": exponent}


def _loss(options: Options, width: int, seed: int) -> float:
    run_dir, (blocks, heads) = Path(options.out) / f"width-{width}-seed-{seed}", SHAPES[width]
    pretrain_once(
        *(run_dir, "onerec-v2-world", "--data.path", options.data),
        *("--data.semantic-ids", options.semantic_ids, "--seed", str(seed)),
        *("--train.epochs", "1", "--train.validate-every-steps", "1000000", "--log.every-steps", "1"),
        *("--train.learning-rate", str(options.learning_rate * (16 / width) ** 0.5)),
        *("--model.width", str(width), "--model.num-blocks", str(blocks)),
        *("--model.num-heads", str(heads), "--model.dropout", "0.0"),
        *option_words(options.extra),
        *("model.feedforward:feed-forward-config", "--model.feedforward.hidden", str(4 * width)),
    )
    losses = [line["train/loss"] for line in read_metrics(str(run_dir)) if "train/loss" in line]
    return float(np.mean(losses[-max(int(options.last_part * len(losses)), 1) :]))


def _draw(path: Path, sizes: np.ndarray, losses: np.ndarray, law: dict[str, float]) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    line = np.geomspace(sizes.min(), sizes.max(), 100)
    axes.plot(line, law["floor"] + law["scale"] / line ** law["exponent"], color="tab:blue", alpha=0.5)
    axes.plot(sizes, losses, "o", color="tab:blue")
    axes.set_xscale("log")
    axes.set_xlabel("parameters of the decoder's blocks")
    axes.set_ylabel("loss per item")
    axes.set_title(f"L(N) = {law['floor']:.3f} + {law['scale']:.3g} / N^{law['exponent']:.3f}")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
