"""An auxiliary loss that ties items together which are taken after each other (after the idea of the Deep Interest
Evolution Network, Zhou et al., 2019): the next taken item among some drawn at random."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.seeds import purpose_seed
from data_streams.jagged import Jagged
from models.layers.linear import Linear
from models.recommender import StepContext
from models.tables import Ids, LookedUp, Rows

TEMPERATURE = 0.1
TAKEN, NEXT, NEGATIVE = "taken", "next", "negative"


class NextTaken(Linear):
    """Cosines of the projected item and those that may follow it; the projection is the identity at first."""

    features = (TAKEN, NEXT, NEGATIVE)
    """Of the item table."""

    def __init__(self, width: int):
        super().__init__(width, width, bias=False)
        nn.init.eye_(self.weight)

    @staticmethod
    def ids(taken: Jagged, context: StepContext, *, num_items: int, num_negatives: int) -> Ids:
        """Each taken item of a user that another follows, that other one, and items drawn from (seed, step)."""
        follows = torch.nonzero(taken.places() > 0)[:, 0]
        generator = torch.Generator().manual_seed(purpose_seed(context.seed, "auxiliary", context.step))
        return {
            TAKEN: taken.values[follows - 1],
            NEXT: taken.values[follows],
            NEGATIVE: torch.randint(num_items, (num_negatives,), generator=generator),
        }

    def forward(self, rows: Rows) -> Tensor:
        """Summed cross-entropy of what was taken next among it and the negatives."""
        following: LookedUp = rows[NEXT]
        queries = F.normalize(super().forward(rows[TAKEN].rows).float(), dim=-1) / TEMPERATURE
        positive = (queries * F.normalize(following.rows.float(), dim=-1)).sum(-1)
        others = queries @ F.normalize(rows[NEGATIVE].rows.float(), dim=-1).T
        others = others.masked_fill(following.ids[:, None] == rows[NEGATIVE].ids, float("-inf"))
        return (torch.cat((positive[:, None], others), dim=-1).logsumexp(-1) - positive).sum()
