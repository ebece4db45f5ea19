"""The import packages of the project: where they lie, and that all workers run the same ones."""

import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from cluster.errors import ClusterError

# `tests` is not among them: it is not installed.
PACKAGES = ("cluster", "data_streams", "models", "sharding", "trainer", "rl", "launch")


def root() -> Path:
    """The folder that holds the packages of this process."""
    return Path(__file__).resolve().parents[1]


@cache
def fingerprint() -> str:
    """A digest of the source of all packages as this process would import them.

    Raises: ClusterError if one package would be imported from somewhere else than the others.
    """
    digest = hashlib.blake2b(digest_size=8)
    for package in PACKAGES:
        folder = _folder(package)
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(folder)}".encode() + path.read_bytes())
    return digest.hexdigest()


def check_same(expected: str) -> None:
    """Compare this process's packages with the fingerprint of those of the driver.

    Raises: ClusterError if they differ.
    """
    if fingerprint() != expected:
        raise ClusterError(
            f"every worker must run the same code as the driver ({expected}), and the packages at {root()} on "
            f"this worker are others ({fingerprint()}); install the same version everywhere, or remove the "
            "second copy from PYTHONPATH"
        )


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    if not locations:
        raise ClusterError(f"the package {package} is not installed beside the others in {root()}")
    return Path(locations[0])
