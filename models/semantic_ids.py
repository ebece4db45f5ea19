"""What a model knows of the catalogue's semantic IDs: every item is a path of L codes."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SemanticIds:
    """Shapes: N items, L levels."""

    codes: Tensor
    """[N, L] int64, row i for item row i."""
    code_sizes: tuple[int, ...]
    """Number of codes of each level."""
