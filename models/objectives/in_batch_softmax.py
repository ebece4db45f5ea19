"""Softmax over the targets of all positions of all ranks: no rows are looked up beside them.

Source: Yi et al., Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations (2019). Deviations:
items are counted in the training data instead of being estimated from the stream; the positive, which is always
there, is not corrected, and further occurrences of the position's target are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.kernels.sampled_softmax import shared_negative_softmax
from models.objectives.negatives import item_probabilities
from models.objectives.retrieval import RetrievalObjective, Scoring
from models.recommender import LossSum, StepContext
from models.tables import Ids


class InBatchSoftmax(RetrievalObjective):
    """L_t = -s_t+ + log(exp s_t+ + sum_u exp s_tu) over the targets u of other positions, other than t's own.

    With `log_q`, log(n p_u) is taken from s_tu, where p_u is the item's share of the training events and n the
    number of positions. A micro-batch sees its own targets only, so micro-batches change the loss.

    Cost: the targets' vectors of all ranks are gathered, and their gradients sent back.
    """

    features = ("target",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Scoring):
        log_q: bool = True
        """Correct the scores for how often items are targets."""

        @property
        def needs_item_counts(self) -> bool:
            return self.log_q

        def build(self, *, num_items: int, item_counts: np.ndarray | None = None) -> "InBatchSoftmax":
            return InBatchSoftmax(self, num_items, item_counts)

    def __init__(self, config: Config, num_items: int, item_counts: np.ndarray | None):
        super().__init__(config, num_items)
        self.log_q = config.log_q
        if config.log_q:
            # An item outside of the counted events would have the weight 1 / 0.
            counts = None if item_counts is None else np.maximum(item_counts, 1)
            probabilities = item_probabilities(counts, 1.0).astype(np.float32)
            self.register_buffer("probabilities", torch.from_numpy(probabilities), persistent=False)

    def ids(self, targets: Tensor, context: StepContext) -> Ids:
        return {"target": targets}

    def forward(
        self,
        queries: Tensor,
        targets: Tensor,
        vectors: Mapping[str, Tensor],
        ids: Mapping[str, Tensor],
        context: StepContext,
    ) -> LossSum:
        candidates, candidate_ids = context.gather(vectors["target"]), context.gather(targets)
        weights = torch.ones(candidate_ids.shape, device=queries.device)
        if self.log_q:
            weights /= len(candidate_ids) * self.probabilities[candidate_ids]
        positive = (queries * vectors["target"]).sum(-1)
        loss = shared_negative_softmax(queries, candidates, positive, targets, candidate_ids, weights)
        return LossSum(sum=loss, count=targets.shape[0])
