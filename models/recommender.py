"""What every model is, to the learner, the evaluation and the rollouts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from models.kernels.cross_entropy import candidate_cross_entropy
from models.tables import Attributes, Ids, LookedUp, Rows, TableSpec


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
    """Further detached scalars or vectors, each a sum over the same targets."""


CandidateCrossEntropy = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(queries [T, D], own candidates [C, D], target ids [T], candidates of all ranks) -> summed loss, scalar fp32."""

Gather = Callable[[Tensor], Tensor]
"""[targets of this rank, ...] -> [targets of all ranks, ...] in the order of ranks, with gradients."""


def _own(rows: Tensor) -> Tensor:
    return rows


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
    gather: Gather = _own
    """What all ranks hold for their targets, one row per target; a collective call in both directions."""

    def ranges(self, num_rows: int) -> list[tuple[int, int]]:
        """Rows start..stop (exclusive) of a vocabulary that each rank scores; the blocks of row-wise sharding."""
        block = -(-num_rows // self.world_size)
        cuts = [min(rank * block, num_rows) for rank in range(self.world_size + 1)]
        return list(pairwise(cuts))

    def own_range(self, num_rows: int) -> tuple[int, int]:
        """This rank's part of `ranges`."""
        return self.ranges(num_rows)[self.rank]


class Recommender(nn.Module, ABC):
    """The dense part of a model with its objective; table rows are looked up outside and handed in.

    Every parameter must live in a submodule that is called (ZeRO-3 gathers parameters per called submodule).
    """

    uses_item_features: bool = False
    """Whether looked-up rows come with the frozen feature vectors of their items."""

    item_attributes: Attributes | None = None
    """What the rows of items are described by beside themselves."""
    user_attributes: Attributes | None = None
    """The same of the rows of users."""
    added_parameters: tuple[str, ...] = ()
    """Beginnings of names of weights that a run this one starts from (--init-from) may lack."""
    condition_names: tuple[str, ...] = ()
    """What the numbers of the conditions it learns stand for."""

    @abstractmethod
    def tables(self) -> list[TableSpec]:
        """The huge tables this model reads."""

    def all_tables(self) -> list[TableSpec]:
        """Those tables, and the tables of attributes that describe their rows."""
        own = self.tables()
        users = [
            self.user_attributes.table(spec) for spec in own if self.user_attributes and spec.rows_are_users
        ]
        items = [
            self.item_attributes.table(spec) for spec in own if self.item_attributes and spec.rows_are_items
        ]
        return [*own, *items, *users]

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        """What of a batch is trained on, chosen on the host ahead of the step; all of it unless a model says less."""
        return batch

    def num_targets(self, batch: SequenceBatch) -> int:
        """Supervised targets of a training batch, the count of its loss; known on the host, ahead of the step."""
        return batch.num_tokens

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
        """The user after the whole history, by one query or by M, of which the best counts for each item.

        Shapes: [B, D] or [B, M, D] fp32.
        """

    @abstractmethod
    def item_ids(self, items: Tensor) -> Ids:
        """What `item_vectors` looks up for item rows [N]; its first feature has one id per item."""

    @abstractmethod
    def item_vectors(self, rows: LookedUp) -> Tensor:
        """What queries are multiplied with; need not be the table's row. Shapes: [N, D] fp32."""


class Ranker(Recommender):
    """A model that says how likely a user answers given items with each of some actions."""

    actions: tuple[str, ...]
    """Names of the A actions it knows."""

    @abstractmethod
    def candidate_ids(self, batch: SequenceBatch, candidates: Tensor) -> Ids:
        """What `logits` looks up. Shapes: candidates [B, C], -1 for none."""

    @abstractmethod
    def logits(self, rows: Rows, batch: SequenceBatch, candidates: Tensor) -> Tensor:
        """Log-odds of each action on items shown after the history.

        Shapes: candidates [B, C], -1 for none (any number comes back for those) -> [B, C, A] fp32.
        """
