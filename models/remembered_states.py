"""What the lower layers have said of texts, remembered from one reading to the next while the weights stay as they are.

For serving and evaluation alone. Rows are given out when a reading is laid out and filled when it is read, so readings
must be read in the order they were laid out in.
"""

from collections.abc import Hashable

import numpy as np
from torch import Tensor

MOST_ROWS = 2**18
"""States that are remembered; beyond that all are forgotten, and the memory fills up again."""
UNKNOWN = -1


class RememberedStates:
    """Shapes: R rows of D."""

    def __init__(self, most_rows: int = MOST_ROWS):
        self.most_rows = most_rows
        self.forget()

    def forget(self) -> None:
        self.begins: dict[Hashable, np.ndarray] = {}
        self.lengths: dict[Hashable, np.ndarray] = {}
        self.num_given = self.num_filled = 0
        self.states: Tensor | None = None

    def begin(self) -> int:
        """A reading is laid out -> how many states there are. Forgets all where there are too many, or where an earlier
        reading was never read."""
        if self.num_given > self.most_rows or self.num_given != self.num_filled:
            self.forget()
        return self.num_given

    def find(self, kind: Hashable, items: np.ndarray, num_items: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the states of texts begin, or UNKNOWN, and how many each has. Shapes: items [n] -> [n], [n]."""
        if kind not in self.begins:
            self.begins[kind] = np.full(num_items, UNKNOWN, dtype=np.int64)
            self.lengths[kind] = np.zeros(num_items, dtype=np.int64)
        return self.begins[kind][items], self.lengths[kind][items]

    def give(self, kind: Hashable, items: np.ndarray, lengths: np.ndarray) -> None:
        """Rows for the states of texts that are about to be read. Shapes: items, lengths [n]."""
        self.begins[kind][items] = self.num_given + np.cumsum(lengths) - lengths
        self.lengths[kind][items] = lengths
        self.num_given += int(lengths.sum())

    def fill(self, states: Tensor, first: int) -> None:
        """The states of the texts that a reading brought, whose rows begin at `first`. Shapes: [n, D].

        Raises: RuntimeError where an earlier reading was laid out and never read.
        """
        if first != self.num_filled:
            raise RuntimeError(
                f"texts must be read in the order they were laid out in: rows from {first} on were given out, and "
                f"{self.num_filled} are filled"
            )
        self.num_filled = first + len(states)
        if self.states is None or self.num_filled > len(self.states):
            larger = states.new_empty(max(2 * self.num_filled, 1024), states.shape[1])
            if self.states is not None:
                larger[:first] = self.states[:first]
            self.states = larger
        self.states[first : self.num_filled] = states
