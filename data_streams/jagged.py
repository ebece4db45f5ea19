"""Sequences of unequal length, side by side in one tensor and without padding."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On a device; the copy is waited for on the way to the host alone, which would read it before it is there."""
    return tensor.to(device, non_blocking=device.type != "cpu")


@dataclass(frozen=True, kw_only=True)
class Jagged:
    """Rows of unequal length stored one after another.

    Shapes: values [T, ...], offsets [B + 1] int64 with offsets[0] == 0 and offsets[B] == T.

    Example: rows (3, 5), () and (7) are values=[3, 5, 7], offsets=[0, 2, 2, 3], max_length=2.
    """

    values: Tensor
    """All rows, concatenated."""
    offsets: Tensor
    """Where each row begins; the last entry is the total length."""
    max_length: int
    """Length of the longest row, kept on the host so that no step waits for the device."""

    @staticmethod
    def from_lengths(values: Tensor, lengths: Tensor) -> "Jagged":
        """Build from row lengths [B]; meant for the host side of the pipeline (reads the maximum)."""
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=offsets[1:])
        return Jagged(values=values, offsets=offsets, max_length=int(lengths.max()) if len(lengths) else 0)

    @staticmethod
    def on_device(values: Tensor, lengths: Tensor, max_length: int) -> "Jagged":
        """Build from row lengths [B] wherever they lie, without waiting; `max_length` may be more than the longest."""
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return Jagged(values=values, offsets=offsets, max_length=max_length)

    @property
    def num_rows(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """Shapes: [B] int64."""
        return self.offsets[1:] - self.offsets[:-1]

    def with_values(self, values: Tensor) -> "Jagged":
        """The same row structure over other values of the same total length."""
        return replace(self, values=values)

    def row_index(self) -> Tensor:
        """Row of each value. Shapes: [T] int64."""
        rows = torch.arange(self.num_rows, device=self.offsets.device)
        return torch.repeat_interleave(rows, self.lengths, output_size=self.values.shape[0])

    def places(self) -> Tensor:
        """Place of each value in its row, from 0. Shapes: [T] int64."""
        place = torch.arange(self.values.shape[0], device=self.offsets.device)
        return place - self.offsets[self.row_index()]

    def repeat_rows(self, times: int) -> "Jagged":
        """Every row several times, one behind the other; meant for the host side.

        Example: rows (3, 5), (7) twice are (3, 5), (3, 5), (7), (7).
        """
        lengths = self.lengths.repeat_interleave(times)
        repeated = Jagged.from_lengths(torch.zeros(int(lengths.sum()), dtype=torch.int64), lengths)
        starts = self.offsets[:-1].repeat_interleave(times)
        return repeated.with_values(self.values[starts[repeated.row_index()] + repeated.places()])

    def to(self, device: torch.device) -> "Jagged":
        return replace(
            self,
            values=moved(self.values, device),
            offsets=moved(self.offsets, device),
        )


def gather_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices of the ranges starts[i] .. starts[i] + lengths[i], one after another.

    Example: starts [7, 2], lengths [2, 3] give [7, 8, 2, 3, 4].
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - ends + lengths, lengths) + np.arange(total)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Shapes: [U] -> [U + 1] int64."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
