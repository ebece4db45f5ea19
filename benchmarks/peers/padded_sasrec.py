"""The peer of long sequences: the usual padded SASRec of torch.nn, with negatives of their own per position."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.padded_transformer import PaddedTransformer
from data_streams.batch import SequenceBatch
from models.sasrec import SASRec


@dataclass(frozen=True, kw_only=True)
class PaddedSASRec:
    """How the peer samples and computes."""

    num_negatives: int
    precision: torch.dtype

    def build(
        self, config: SASRec.Config, *, num_items: int, max_length: int, device: torch.device
    ) -> "PaddedSASRecStep":
        torch.manual_seed(0)
        model = PaddedTransformer(config, num_items, max_length).to(device)
        return PaddedSASRecStep(self, model, torch.optim.Adam(model.parameters(), lr=1e-3), num_items)


class PaddedSASRecStep:
    """One optimizer step of binary cross-entropy on the users of a batch, padded to the longest of them."""

    def __init__(
        self, options: PaddedSASRec, model: PaddedTransformer, optimizer: torch.optim.Adam, num_items: int
    ):
        self.options, self.model, self.optimizer, self.num_items = options, model, optimizer, num_items

    def take(self, batch: SequenceBatch) -> Tensor:
        """Pad, draw negatives, forward, backward, update -> mean loss."""
        self.model.train()
        device = batch.items.values.device
        is_real = torch.arange(batch.items.max_length, device=device) < batch.items.lengths[:, None]
        items = torch.zeros(is_real.shape, dtype=torch.int64, device=device)
        items[is_real] = batch.items.values
        size = (batch.num_tokens, self.options.num_negatives)
        negatives = torch.randint(self.num_items, size, device=device)
        bf16 = self.options.precision == torch.bfloat16
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            states = self.model(items, ~is_real)[is_real]
            loss = self._loss(states.float(), batch.targets, negatives, self.model.items)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @staticmethod
    def _loss(states: Tensor, targets: Tensor, negatives: Tensor, table: nn.Embedding) -> Tensor:
        """Shapes: states [T, D], targets [T], negatives [T, R]."""
        positive = (states * table(targets)).sum(-1)
        scores = torch.einsum("td,trd->tr", states, table(negatives))
        return (F.softplus(-positive) + F.softplus(scores).mean(-1)).mean()
