"""Dropout whose random numbers cost little on a processor."""

import torch
from torch import Tensor, nn

from cluster.errors import ConfigError


class Dropout(nn.Module):
    """Zeroes each element with a given probability and scales the others up.

    On a processor, drawing one float per element took a third of a small training step; here one random byte per
    element is compared, so the probability is rounded to 1/256 (and the scale to match). The draws come from the
    global generator, which the learner seeds at every step.
    """

    def __init__(self, probability: float):
        super().__init__()
        if not 0 <= probability < 1:
            raise ConfigError(f"a dropout of the model must be at least 0 and below 1, got {probability}")
        self.threshold = round(probability * 256)

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or self.threshold == 0 or values.numel() == 0:
            return values
        probability = self.threshold / 256
        # torch.compile cannot take words as bytes on a processor (torch 2.13).
        if values.device.type != "cpu" or torch.compiler.is_compiling():
            return nn.functional.dropout(values, probability)
        keep = _random_bytes(values.numel()) >= self.threshold
        return values * (keep.view(values.shape).to(values.dtype) * (1 / (1 - probability)))


def _random_bytes(count: int) -> Tensor:
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.uint8)[:count]
