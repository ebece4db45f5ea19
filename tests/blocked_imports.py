"""Programs that run as on a machine which lacks some packages."""

from collections.abc import Sequence


def without(packages: Sequence[str]) -> str:
    """Code that stands in front of a program; none of the packages can be imported behind it."""
    return f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {tuple(packages)}:
            raise ImportError(name + " is not there on small machines")
sys.meta_path.insert(0, Blocked())
"""
