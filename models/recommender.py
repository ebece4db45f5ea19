"""What every model is, to the learner, the evaluation and the rollouts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from models.kernels.cross_entropy import candidate_cross_entropy
from models.tables import Ids, LookedUp, Rows, TableSpec


@dataclass(frozen=True, kw_only=True)
class LossSum:
    """A loss before normalisation: the learner divides once, by the count over all ranks.

    Losses are sums so that a rank with short users weighs no more than its events.
    """

    sum: Tensor
    """Scalar, fp32, attached to the graph."""
    count: int
    """Number of supervised targets in `sum`, known on the host."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Further detached scalars, each a sum over the same targets."""


CandidateCrossEntropy = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(queries [T, D], own candidates [C, D], target ids [T], id of the first own candidate) -> losses [T]."""


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a step knows beside its users: the same on every rank but for `rank`."""

    step: int
    """Optimizer steps taken before this one; with `seed` it determines every random draw of the step."""
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    targets_per_rank: tuple[int, ...] = ()
    """Supervised targets of each rank in this micro-batch; exchanged on the host one batch ahead."""
    cross_entropy: CandidateCrossEntropy = candidate_cross_entropy
    """Softmax cross-entropy over candidates spread over the ranks, each holding its `own_range`."""

    def own_range(self, num_rows: int) -> tuple[int, int]:
        """Rows start..stop (exclusive) of a vocabulary that this rank scores; the blocks of row-wise sharding."""
        block = -(-num_rows // self.world_size)
        return min(self.rank * block, num_rows), min((self.rank + 1) * block, num_rows)


class Recommender(nn.Module, ABC):
    """The dense part of a model with its objective; table rows are looked up outside and handed in.

    Every parameter must live in a submodule that is called (ZeRO-3 gathers parameters per called submodule).
    """

    uses_item_features: bool = False
    """Whether looked-up rows come with the frozen feature vectors of their items."""

    @abstractmethod
    def tables(self) -> list[TableSpec]:
        """The huge tables this model reads."""

    @abstractmethod
    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        """Everything a training step looks up, per feature; computed on the host, ahead of the step."""

    @abstractmethod
    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        """The summed training loss of a batch."""


class Retriever(Recommender):
    """A model that recommends the items whose vectors have the largest inner product with a user's query."""

    @abstractmethod
    def query_ids(self, batch: SequenceBatch) -> Ids:
        """What `query` looks up."""

    @abstractmethod
    def query(self, rows: Rows, batch: SequenceBatch) -> Tensor:
        """The user after the whole history. Shapes: [B, D] fp32."""

    @abstractmethod
    def item_ids(self, items: Tensor) -> Ids:
        """What `item_vectors` looks up for item rows [N]; its first feature has one id per item."""

    @abstractmethod
    def item_vectors(self, rows: LookedUp) -> Tensor:
        """What queries are multiplied with; need not be the table's row. Shapes: [N, D] fp32."""
