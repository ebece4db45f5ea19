"""One optimizer step across the border between sharded tables and dense module.

The step looks everything up once, detaches the rows, lets micro-batches add up gradients in them, checks that
all gradients of all ranks are finite, and only then sends the rows' gradients back to the tables and steps the
dense optimizer. So accumulation is exact and a bad step touches nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import DivergenceError
from cluster.seeds import purpose_seed
from models.recommender import StepContext
from sharding.collectives import gather_rows_with_gradient
from sharding.lookup import rows_of_request
from sharding.tables import EmbeddingTables
from sharding.vocabulary_parallel import vocabulary_parallel_cross_entropy
from trainer.dense_module import DenseModule, GradientCheck
from trainer.expert_balance import balance_experts
from trainer.step_input import MicroBatch, StepInput

_LISTED_USERS = 20


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step reports; tensors stay on the device until they are logged."""

    loss_sum: Tensor
    """Scalar: summed loss of this rank's targets."""
    metrics: Mapping[str, Tensor]
    """Further sums over the same targets, scalars or vectors."""
    global_count: int
    """Supervised targets of all ranks."""


class Learner:
    """Takes optimizer steps; there is one on each of `world_size` ranks, and all step together.

    `engine` runs and steps `module` (trainer/dense_engine.py, or trainer/plain_engine.py without DeepSpeed); `tables`
    are those the module declares.
    """

    def __init__(
        self, module: DenseModule, engine, tables: EmbeddingTables, *, seed: int, rank: int, world_size: int
    ):
        self.module, self.engine, self.tables = module, engine, tables
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.specs = module.model.all_tables()
        self.check = GradientCheck(module)

    def step(self, step: StepInput, learning_rate: float, table_learning_rate: float) -> StepResult:
        """Take one optimizer step; a collective call.

        Raises: DivergenceError on every rank if any rank's loss or gradient is not finite; nothing was changed.
        """
        # The fused optimizer reads its rate during the lookup.
        self.tables.set_learning_rate(table_learning_rate)
        rows = self.tables.lookup(step.merged.tables)
        leaves = {name: values.detach().requires_grad_() for name, values in rows.items()}
        self.module.train()
        sums = [self._backward(step, index, micro, leaves) for index, micro in enumerate(step.micro_batches)]
        gradients = {name: _gradient(leaf) for name, leaf in leaves.items()}
        self._require_finite(step, sums, gradients)
        self.tables.update(step.merged.tables, rows, gradients)
        self.engine.step(learning_rate)
        balance_experts(self.module.mixtures)
        return StepResult(
            loss_sum=torch.stack([loss for loss, _ in sums]).sum(),
            metrics=_add_up([metrics for _, metrics in sums]),
            global_count=step.global_count,
        )

    def _backward(
        self, step: StepInput, index: int, micro: MicroBatch, leaves: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Forward and backward of one micro-batch -> its summed loss and metrics."""
        torch.manual_seed(purpose_seed(self.seed, "dropout", step.step, index, self.rank))
        rows = rows_of_request(
            self.specs, leaves, micro.ids, step.merged.positions[index], micro.item_features
        )
        # Both DeepSpeed and TorchRec average over ranks; the loss of the step is one sum over one count.
        scale = self.world_size / max(step.global_count, 1)
        context = self._connect(micro.context)
        self.engine.backward(rows, micro.batch, context, scale)
        last = self.module.last
        return last.sum.detach(), last.metrics

    def _connect(self, context: StepContext) -> StepContext:
        """Let objectives reach what the other ranks hold."""
        if self.world_size == 1:
            return context
        return replace(
            context,
            cross_entropy=vocabulary_parallel_cross_entropy(context),
            gather=gather_rows_with_gradient(context.targets_per_rank),
        )

    def _require_finite(self, step: StepInput, sums: list, gradients: Mapping[str, Tensor]) -> None:
        self.check.watch(loss for loss, _ in sums)
        self.check.watch(iter(gradients.values()))
        own = self.check.take()
        finite = own.clone()
        if self.world_size > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if finite.item():
            return
        where = self._first_of("" if own.item() else f"rank {self.rank} with users {_listed(step.user_ids)}")
        raise DivergenceError(
            f"loss and gradients must be finite; at step {step.step} they are not on {where}. Nothing was updated "
            "and the last checkpoint is intact: lower train.learning-rate or train.table-learning-rate, raise "
            "train.warmup-steps, or look at these users' events"
        )

    def _first_of(self, text: str) -> str:
        """The text of the first rank that has one: the rank whose error is shown may be any; a collective call."""
        texts = [text] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(texts, text)
        return next(filter(None, texts))


def _listed(users: Tensor) -> str:
    return f"{users[:_LISTED_USERS].tolist()}{' and more' if len(users) > _LISTED_USERS else ''}"


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _add_up(metrics: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([entry[name] for entry in metrics]).sum(0) for name in metrics[0]}
