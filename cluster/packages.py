"""The import packages of the project: where they lie, and that all workers run the same ones."""

import hashlib
import importlib.util
import os
from functools import cache
from pathlib import Path

from cluster.errors import ClusterError

# `tests` is not among them: it is not installed.
PACKAGES = ("cluster", "data_streams", "models", "sharding", "trainer", "rl", "launch")


def root() -> Path:
    """The folder that holds the packages of this process."""
    return Path(__file__).resolve().parents[1]


def search_path() -> str:
    """PYTHONPATH for other processes: they find the packages from any working directory, installed or not."""
    return os.pathsep.join(filter(None, (str(root()), os.environ.get("PYTHONPATH"))))


@cache
def fingerprint() -> str:
    """A digest of the source of all packages as this process would import them."""
    digest = hashlib.blake2b(digest_size=8)
    for package, folder in _folders().items():
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(folder)}".encode() + path.read_bytes())
    return digest.hexdigest()


def check_same(driver_root: Path, driver_fingerprint: str) -> None:
    """Compare this process's packages with those of the driver: the same folder, or the same content.

    Raises: ClusterError if they differ or one of them is missing.
    """
    folders = _folders()
    if all(folder.parent == driver_root for folder in folders.values()):
        return
    if fingerprint() != driver_fingerprint:
        places = sorted({str(folder.parent) for folder in folders.values()})
        raise ClusterError(
            f"every worker must run the code of the driver at {driver_root}, and this worker finds another "
            f"one in {', '.join(places)}; install the same version everywhere, or remove the second copy "
            "from PYTHONPATH"
        )


def _folders() -> dict[str, Path]:
    return {package: _folder(package) for package in PACKAGES}


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    if not locations:
        raise ClusterError(f"the package {package} is not installed beside the others in {root()}")
    return Path(locations[0]).resolve()
