"""Which part of which global tensor lies on this rank."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of a global tensor that this rank owns, as the live tensor: reading saves it, writing restores it.

    Example: rows 500..999 of a table of 1,000 x 64 are name="table/item", start=500, global_shape=(1000, 64)
    and a tensor of shape [500, 64].
    """

    name: str
    start: int
    """First row along dimension 0 of the global tensor."""
    global_shape: tuple[int, ...]
    tensor: Tensor

    @property
    def num_rows(self) -> int:
        """Rows of this piece; a scalar is one row."""
        return self.tensor.shape[0] if self.tensor.dim() else 1
