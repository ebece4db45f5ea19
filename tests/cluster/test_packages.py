import os
import shutil
import subprocess
import sys

import pytest

from cluster.errors import ClusterError
from cluster.packages import PACKAGES, check_same, root
from cluster.ray_start import _check_answers


@pytest.fixture
def copy(tmp_path):
    for package in PACKAGES:
        shutil.copytree(root() / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run_in(folder, program: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def check_in(folder, driver_root, driver_fingerprint: str) -> subprocess.CompletedProcess:
    return run_in(
        folder,
        "from pathlib import Path; from cluster.packages import check_same; "
        f"check_same(Path({str(driver_root)!r}), {driver_fingerprint!r})",
    )


def test_the_same_folder_is_accepted_whatever_was_edited_since_the_start():
    check_same(root(), "the fingerprint of another day")


def test_an_equal_copy_is_accepted_and_another_version_is_not(copy):
    own = run_in(copy, "from cluster.packages import fingerprint; print(fingerprint())").stdout.strip()
    shutil.copytree(copy, copy / "other")
    with open(copy / "other" / "models" / "tables.py", "a") as file:
        file.write("\nCHANGED = True\n")
    assert check_in(copy, root(), own).returncode == 0
    refused = check_in(copy / "other", root(), own)
    assert refused.returncode != 0
    assert "every worker must run the code of the driver" in refused.stderr and "/other" in refused.stderr


def test_an_address_where_nothing_listens_fails_at_once():
    with pytest.raises(ClusterError, match=r"must listen at --cluster\.address 127\.0\.0\.1:9"):
        _check_answers("127.0.0.1:9")
