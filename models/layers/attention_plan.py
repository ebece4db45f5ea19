"""What tokens see of each other, apart from the layers that compute with it."""

from abc import ABC, abstractmethod

from torch import Tensor


class Plan(ABC):
    """What the tokens of one call see, layer by layer."""

    @abstractmethod
    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Shapes: [N, heads, D] each -> [N, heads, D]."""
