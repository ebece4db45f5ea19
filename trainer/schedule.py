"""One learning-rate schedule for both optimizers."""

import math

from trainer.configuration import TrainConfig


def rate_fraction(step: int, total_steps: int, config: TrainConfig) -> float:
    """Fraction of the peak rate at optimizer step 0, 1, ...: linear warm-up, then half a cosine.

    Example: warmup_steps=10, total_steps=110: step 4 gives 0.5, step 60 gives 0.5, step 110 and later the final
    fraction.
    """
    warmup = min(config.warmup_steps, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_rate_fraction + (1 - config.final_rate_fraction) * cosine
