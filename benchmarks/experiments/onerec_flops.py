"""What a training step of OneRec-V2 costs beside an encoder-decoder of equal size: `--help` tells the options.

Every number is counted from the operations of the real models at their published sizes (on the meta device, so this
takes seconds and no memory): forward and backward of one user with one target, two operations for each multiplication
and addition. Experts are counted as the dense layer of the size that a token visits.
"""

import sys
from dataclasses import dataclass, replace

import tyro

from benchmarks.setting.commands import require_known, run_experiment
from benchmarks.setting.flops import build_on_meta, dense_of_active_size, made_up_batch, training_flops
from launch.recipes import onerec_v2
from models.onerec import OneRec
from models.onerec_v2 import PUBLISHED, OneRecV2

REPORTED = {"0.1b": (25.64, 1.98), "0.5b": (142.73, 9.55), "1b": (296.36, 18.89)}
"""GFLOPs in the report at a context of 512: encoder-decoder (1:1), lazy decoder."""
CODE_SIZES = (8192,) * 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print the table of costs."""

    contexts: tuple[int, ...] = (512,)
    """Events of the history."""
    sizes: tuple[str, ...] = tuple(PUBLISHED)
    """Published sizes of OneRec-V2."""

    def __post_init__(self) -> None:
        require_known("--sizes", self.sizes, PUBLISHED)


def main(arguments: list[str]) -> None:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.experiments.onerec_flops")
    lines = ["| size | context | parameters | lazy, GFLOPs (report) | encoder-decoder (report) | saved |"]
    lines.append("|---" * 6 + "|")
    lines += [_line(size, context) for size in options.sizes for context in options.contexts]
    print("\n".join(lines))


def _line(size: str, context: int) -> str:
    lazy = lazy_decoder(size)
    other = encoder_decoder(lazy)
    parameters = sum(parameter.numel() for parameter in _build(lazy).parameters())
    ours, theirs = (gigaflops(config, context) for config in (lazy, other))
    told = REPORTED.get(size) if context == 512 else None
    said = ("", "") if told is None else (f" ({told[1]:g})", f" ({told[0]:g})")
    return (
        f"| {size} | {context} | {parameters / 1e9:.3f}B | {ours:.2f}{said[0]} | {theirs:.1f}{said[1]} "
        f"| {1 - ours / theirs:.1%} |"
    )


def lazy_decoder(size: str) -> OneRecV2.Config:
    return replace(onerec_v2.recipe().model, size=size).resolved()


def encoder_decoder(lazy: OneRecV2.Config) -> OneRec.Config:
    """As many blocks, as wide, half of them in the encoder: the same number of parameters to 1 in 1,000.

    A block of the encoder has 16 x width^2 parameters, one of the decoder 20, a lazy one 18.
    """
    part = lazy.feedforward
    return OneRec.Config(
        width=lazy.width,
        num_encoder_blocks=lazy.num_blocks // 2,
        num_decoder_blocks=lazy.num_blocks - lazy.num_blocks // 2,
        num_heads=lazy.num_heads,
        encoder_feedforward=part,
        decoder_feedforward=part,
        context=lazy.context,
        targets_per_user=1,
        dropout=lazy.dropout,
    )


def gigaflops(config: OneRecV2.Config | OneRec.Config, context: int) -> float:
    return training_flops(_build(dense_of_active_size(config), context), made_up_batch([context])) / 1e9


def _build(config: OneRecV2.Config | OneRec.Config, context: int = 512) -> OneRecV2 | OneRec:
    return build_on_meta(config, code_sizes=CODE_SIZES, max_length=context)


if __name__ == "__main__":
    sys.exit(run_experiment(main))
