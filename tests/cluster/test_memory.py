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


GROW = """
import sys
sys.path.insert(0, sys.argv[1])
from cluster.memory import FreedMemory, keep_freed_memory, resident_bytes
keep_freed_memory()
memory, sizes = FreedMemory(growth=2.0), []
memory.give_back_excess()
for step in range(2):
    # The last block is kept: what lies before it cannot be given back by making the heap shorter.
    blocks = [b"1" * (40_000_000 + step) for _ in range(5)]
    kept = blocks[-1][:100_000]
    del blocks
    sizes.append(resident_bytes())
    memory.give_back_excess()
    sizes.append(resident_bytes())
print(*sizes)
"""


def fresh_pages(how: str) -> int:
    """Pages that the second of two blocks of 80 MB, the first of which is freed, gets from the system."""
    command = [sys.executable, "-c", TOUCH, str(root()), how, "80000000"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def test_a_large_block_takes_the_memory_of_the_one_before():
    assert fresh_pages("given back") > 10_000
    assert fresh_pages("kept") < 100


def test_memory_far_beyond_what_is_needed_is_given_back():
    command = [sys.executable, "-c", GROW, str(root())]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    grown, given_back, grown_again, given_back_again = map(int, said.split())
    assert min(grown, grown_again) > 200_000_000
    assert max(given_back, given_back_again) < 100_000_000
