"""One learning-rate schedule for both optimizers."""

import math

from trainer.configuration import TrainConfig


def rate_fraction(step: int, total_steps: int, config: TrainConfig) -> float:
    """Fraction of the peak rate at optimizer step 0, 1, ...: linear warm-up, then what `config.schedule` says.

    Example: warmup_steps=10, total_steps=110: step 4 gives 0.5; a cosine or a line gives 0.5 at step 60 and the final
    fraction from step 110 on, inverse-sqrt 0.5 at step 39.
    """
    warmup = min(config.warmup_steps, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    return config.final_rate_fraction + (1 - config.final_rate_fraction) * _decay(
        step, warmup, total_steps, config.schedule
    )


def _decay(step: int, warmup: int, total_steps: int, schedule: str) -> float:
    """How much of the way from the final to the peak rate is left after the warm-up, from 1 down to 0."""
    if schedule == "constant":
        return 1.0
    if schedule == "inverse-sqrt":
        return math.sqrt(max(warmup, 1) / (step + 1))
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
