"""Random numbers that belong to a user, whatever worker, batch or order it comes in."""

import numpy as np

from cluster.seeds import purpose_seed

STEP = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: multiples of it are far from each other."""


def mix_bits(values: np.ndarray) -> np.ndarray:
    """Neighbouring numbers become unrelated ones: the output function of SplitMix64 (Steele, Lea, Flood 2014).

    Shapes: uint64 [...] -> uint64 [...].
    """
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def uniform_of_events(seed: int, users: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A random number in (0, 1) for each user and place. Shapes: users, places [n] -> [n] float64."""
    values = np.uint64(seed & (2**64 - 1)) + users.astype(np.uint64) * STEP
    values += places.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    return (mix_bits(values) >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54


def drawn_users(users: np.ndarray, share: float) -> np.ndarray:
    """Which users are of a share of them: by their rows alone, so always the same. Shapes: [U] -> [U] bool."""
    seed = purpose_seed(0, "evaluated users")
    return uniform_of_events(seed, users, np.zeros_like(users)) < share
