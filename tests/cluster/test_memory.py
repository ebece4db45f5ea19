"""Memory that a step frees serves the next one."""

import subprocess
import sys

from cluster.packages import root

TOUCH = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from cluster.memory import keep_freed_memory
if sys.argv[2] == "kept":
    keep_freed_memory()
def fresh_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b'1' * int(sys.argv[3])
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fresh_pages()
print(fresh_pages())
"""


def fresh_pages(how: str) -> int:
    """Pages that the second of two blocks of 80 MB, the first of which is freed, gets from the system."""
    command = [sys.executable, "-c", TOUCH, str(root()), how, "80000000"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def test_a_large_block_takes_the_memory_of_the_one_before():
    assert fresh_pages("given back") > 10_000
    assert fresh_pages("kept") < 100
