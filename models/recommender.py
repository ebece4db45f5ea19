"""What every model is, to the learner, the evaluation and the rollouts."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from models.tables import Ids, Rows, TableSpec


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


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a step knows beside its users: the same on every rank but for `rank`."""

    step: int
    seed: int
    rank: int = 0
    world_size: int = 1
    targets_per_rank: tuple[int, ...] = ()
    """Supervised targets of each rank in this micro-batch; exchanged on the host one batch ahead."""
    item_features: Tensor | None = None
    """Frozen feature vectors of the candidates, filled in by the learner where the model asks for them."""


class Recommender(nn.Module, ABC):
    """The dense part of a model with its objective; table rows are looked up outside and handed in.

    Every parameter must live in a submodule that is called (ZeRO-3 gathers parameters per called submodule).
    """

    @abstractmethod
    def tables(self) -> list[TableSpec]:
        """The huge tables this model reads."""

    @abstractmethod
    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        """Everything a training step looks up, per feature; computed on the host, ahead of the step."""

    @abstractmethod
    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        """The summed training loss of a batch."""
