"""Seeds for the many independent random generators of a run, all derived from one number."""

import hashlib


def purpose_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed that belongs to one purpose of a run, such as ("shuffle", epoch) or ("table", name).

    Hashed, so that neighbouring seeds and purposes give unrelated generators, on every machine alike.

    Example: `torch.Generator().manual_seed(purpose_seed(config.seed, "dropout", epoch, rank))`.
    """
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
