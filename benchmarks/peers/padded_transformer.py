"""The peer of the training step: a padded torch.nn.TransformerEncoder over a plain embedding, with Adam."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from models.sasrec import SASRec

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class PaddedTrainer:
    """How the peer pads and computes."""

    precision: torch.dtype
    trimmed: bool
    """Pad to the longest user of the batch and score real positions only; else pad to the maximum length and
    score every position, as most published code does."""

    def build(
        self, config: SASRec.Config, *, num_items: int, max_length: int, learning_rate: float
    ) -> "PaddedStep":
        torch.manual_seed(0)
        model = PaddedTransformer(config, num_items, max_length)
        return PaddedStep(self, model, torch.optim.Adam(model.parameters(), lr=learning_rate), max_length)


class PaddedTransformer(nn.Module):
    """The same width, blocks, heads, feed-forward width and dropout as the model it is compared with."""

    def __init__(self, config: SASRec.Config, num_items: int, max_length: int):
        super().__init__()
        self.items = nn.Embedding(num_items, config.width)
        self.positions = nn.Embedding(max_length, config.width)
        self.dropout = nn.Dropout(config.dropout)
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.num_heads,
            dim_feedforward=config.feedforward_width or config.width,
            dropout=config.dropout,
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            layer, config.num_blocks, norm=nn.LayerNorm(config.width), enable_nested_tensor=False
        )

    def forward(self, items: Tensor, is_padding: Tensor) -> Tensor:
        """Shapes: items, is_padding [B, L] -> states [B, L, D]."""
        length, device = items.shape[1], items.device
        hidden = self.dropout(self.items(items) + self.positions(torch.arange(length, device=device)))
        is_later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        return self.encoder(hidden, mask=is_later, src_key_padding_mask=is_padding, is_causal=True)


class PaddedStep:
    """One optimizer step on the users of a batch."""

    def __init__(
        self, options: PaddedTrainer, model: PaddedTransformer, optimizer: torch.optim.Adam, max_length: int
    ):
        self.options, self.model, self.optimizer, self.max_length = options, model, optimizer, max_length

    def take(self, batch: SequenceBatch) -> Tensor:
        """Pad, forward, backward, update -> mean loss."""
        self.model.train()
        items, targets, is_padding = self._pad(batch)
        bf16 = self.options.precision == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            states, targets = self.model(items, is_padding).flatten(0, 1), targets.flatten()
            if self.options.trimmed:
                real = ~is_padding.flatten()
                states, targets = states[real], targets[real]
            scores = states @ self.model.items.weight.T
        loss = F.cross_entropy(scores.float(), targets, ignore_index=IGNORED)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _pad(self, batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Items, targets and which places are padding, [B, L] each; users begin at place 0."""
        length = batch.items.max_length if self.options.trimmed else self.max_length
        is_padding = torch.arange(length) >= batch.items.lengths[:, None]
        items = torch.zeros(is_padding.shape, dtype=torch.int64)
        targets = torch.full(is_padding.shape, IGNORED)
        items[~is_padding], targets[~is_padding] = batch.items.values, batch.targets
        return items, targets, is_padding
