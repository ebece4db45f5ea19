"""What the objectives of retrieval models share: who asks for which candidates, and how scores are formed."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import ConfigError
from models.recommender import LossSum, StepContext
from models.tables import Ids


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a query and an item vector become a score."""

    normalised: bool = True
    """Scale queries and item vectors to length one, so that the score is a cosine."""
    temperature: float = 0.07
    """Scores are divided by it."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(
                f"objective.temperature must be above 0, since scores are divided by it, got {self.temperature}"
            )

    @property
    def needs_item_counts(self) -> bool:
        """Whether `build` is to be given `item_counts`, the training events of every item [N]."""
        return False


class RetrievalObjective(nn.Module, ABC):
    """A loss over the states of all positions and the vectors of some candidates; it has no parameters."""

    features: tuple[str, ...]
    """Features of the item table whose rows the objective needs beside the history."""
    takes_several_queries: bool = False
    """Whether `forward` also takes queries [T, M, D], of which the best one counts for each item."""

    def __init__(self, scoring: Scoring, num_items: int):
        super().__init__()
        self.scoring, self.num_items = scoring, num_items

    @abstractmethod
    def ids(self, targets: Tensor, context: StepContext) -> Ids:
        """The candidates to look up. Shapes: targets [T]."""

    @abstractmethod
    def forward(
        self,
        queries: Tensor,
        targets: Tensor,
        vectors: Mapping[str, Tensor],
        ids: Mapping[str, Tensor],
        context: StepContext,
    ) -> LossSum:
        """Shapes: queries [T, D], targets [T], vectors and ids per feature [n, D] and [n]."""

    def queries(self, states: Tensor) -> Tensor:
        """What item vectors are multiplied with; carries the temperature. Shapes: [..., D] -> [..., D] fp32."""
        states = states.float()
        scaled = F.normalize(states, dim=-1, eps=1e-6) if self.scoring.normalised else states
        return scaled / self.scoring.temperature

    def candidates(self, vectors: Tensor) -> Tensor:
        """Shapes: [n, D] -> [n, D] fp32."""
        vectors = vectors.float()
        return F.normalize(vectors, dim=-1, eps=1e-6) if self.scoring.normalised else vectors
