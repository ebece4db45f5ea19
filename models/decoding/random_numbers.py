"""Random numbers that depend on a user's seed and on what they are for, not on the batch they are drawn in."""

from torch import Tensor

_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def uniform(seeds: Tensor, *purpose: Tensor | int) -> Tensor:
    """Independent numbers in (0, 1), one for each combination of seed and purpose.

    A user's rollout is thereby the same alone, in any batch and on any number of workers.

    Shapes: seeds and purposes int64 that broadcast -> fp64.
    Source: the mixing function of SplitMix64 (Steele, Lea and Flood, 2014), applied once per argument.
    """
    state = _mix(seeds + _STEP)
    for part in purpose:
        state = _mix((state ^ part) + _STEP)
    return ((state >> 11 & (1 << 53) - 1).double() + 0.5) * 2.0**-53


def gumbel(seeds: Tensor, *purpose: Tensor | int) -> Tensor:
    """Independent standard Gumbel numbers; shapes as in `uniform`, fp32."""
    return -(-uniform(seeds, *purpose).log()).log().float()


def _mix(state: Tensor) -> Tensor:
    state = (state ^ (state >> 30 & (1 << 34) - 1)) * _FIRST
    state = (state ^ (state >> 27 & (1 << 37) - 1)) * _SECOND
    return state ^ (state >> 31 & (1 << 33) - 1)
