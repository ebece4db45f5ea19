"""Counting what a rank sends to others."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


class CountedExchange:
    """Inside, the bytes of all-to-all exchanges that leave this rank add up."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.received_rows = 0
        """Of other ranks, in the first exchange whose split sizes were given."""
        self._exchange = dist.all_to_all_single

    def __enter__(self) -> "CountedExchange":
        dist.all_to_all_single = self._counted
        return self

    def __exit__(self, *_: Any) -> None:
        dist.all_to_all_single = self._exchange

    def _counted(
        self,
        output: Tensor,
        given: Tensor,
        output_splits: list[int] | None = None,
        input_splits: list[int] | None = None,
        group: Any = None,
    ) -> Any:
        own, size = dist.get_rank(group), dist.get_world_size(group)
        outgoing = input_splits or [len(given) // size] * size
        row_bytes = given[:1].numel() * given.element_size()
        self.sent_bytes += (sum(outgoing) - outgoing[own]) * row_bytes
        if output_splits and not self.received_rows:
            self.received_rows = sum(output_splits) - output_splits[own]
        return self._exchange(output, given, output_splits, input_splits, group=group)
