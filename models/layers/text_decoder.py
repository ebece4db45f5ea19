"""A decoder over text from scratch, whose layers can be run some at a time and over any plan of who sees whom."""

import torch
from torch import Tensor, nn

from cluster.errors import ConfigError
from models.layers.attention_plan import Plan
from models.layers.dropout import Dropout
from models.layers.feedforward import FeedForward
from models.layers.heads import checked_heads
from models.layers.linear import Linear
from models.layers.norm import RMSNorm
from models.layers.rotary import turns_of
from models.layers.vocabulary import Vocabulary

MARK_SCALE = 0.1
"""Marks begin smaller than words, so that what they say is what they have read."""
QUERY_SCALE = 0.5
"""Queries and keys begin small, so that attention begins nearly even."""


class TextBlock(nn.Module):
    """Pre-norm attention with rotary positions and a gated feed-forward part, as of Llama.

    At first each token adds the mean of what it sees, unchanged: so a mark begins as the mean of the words it closes,
    and texts are alike as far as they share words. From random projections all users and items fell into one vector.
    """

    def __init__(self, *, width: int, num_heads: int, feedforward_width: int, dropout: float):
        super().__init__()
        self.num_heads = checked_heads(num_heads, width)
        self.attention_norm, self.feedforward_norm = RMSNorm(width), RMSNorm(width)
        self.query_key_value = Linear(width, 3 * width, bias=False)
        self.output = Linear(width, width, bias=False)
        self.feedforward = FeedForward(width, feedforward_width, init_scale=width**-0.5)
        self.dropout = Dropout(dropout)
        self._begin_as_mean(width)

    def _begin_as_mean(self, width: int) -> None:
        nn.init.normal_(self.query_key_value.weight, std=QUERY_SCALE * width**-0.5)
        with torch.no_grad():
            self.query_key_value.weight[-width:] = torch.eye(width)
        nn.init.eye_(self.output.weight)
        nn.init.zeros_(self.feedforward.contract.weight)

    def forward(self, hidden: Tensor, turns: Tensor, plan: Plan, layer: int) -> Tensor:
        """Shapes: hidden [N, D], turns [N, 2, D / heads / 2] -> [N, D]."""
        projected = self.query_key_value(self.attention_norm(hidden))
        projected = projected.unflatten(-1, (3, self.num_heads, -1))
        queries, keys = turned(projected[:, :2], turns).unbind(1)
        attended = plan.attend(layer, queries, keys, projected[:, 2])
        hidden = hidden + self.dropout(self.output(attended.flatten(1)))
        return hidden + self.dropout(self.feedforward(self.feedforward_norm(hidden)))


def turned(vectors: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions: elements i and i + D / 2 of each vector turned as a pair.

    In real numbers and in the dtype of the vectors: complex ones take several times as long on a processor.

    Shapes: vectors [N, n, heads, D], turns (cosines and sines) [N, 2, D / 2] -> [N, n, heads, D].
    """
    cosine, sine = turns.to(vectors.dtype)[:, :, None, None].unbind(1)
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class TextDecoder(nn.Module):
    """Tied word vectors, blocks on top of each other and a last norm."""

    is_tied = True

    def __init__(
        self,
        *,
        vocabulary_size: int,
        width: int,
        num_blocks: int,
        num_heads: int,
        feedforward_width: int,
        dropout: float,
        init_scale: float,
        distinct_blocks: int | None = None,
    ):
        """`distinct_blocks` have weights of their own; neighbouring layers share them, all alike as far as may be."""
        super().__init__()
        self.width, self.init_scale, self.num_layers = width, init_scale, num_blocks
        self.head_width = checked_heads(num_heads, width) and width // num_heads
        if self.head_width % 2:
            raise ConfigError(
                f"heads of a text decoder must have an even width, and {width} in {num_heads} heads have "
                f"{self.head_width}; change model.width or model.num-heads"
            )
        self.vocabulary = Vocabulary(torch.randn(vocabulary_size, width) * init_scale)
        self.blocks = nn.ModuleList(
            TextBlock(width=width, num_heads=num_heads, feedforward_width=feedforward_width, dropout=dropout)
            for _ in range(distinct_blocks or num_blocks)
        )
        self.final_norm = RMSNorm(width)

    def feedforwards(self) -> list[nn.Module]:
        """The feed-forward part of each block."""
        return [block.feedforward for block in self.blocks]

    def run_layers(self, hidden: Tensor, places: Tensor, plan: Plan, first: int, stop: int) -> Tensor:
        """Layers first..stop (exclusive) alone. Shapes: [N, D], [N] -> [N, D]."""
        turns = torch.view_as_real(turns_of(places, self.head_width)).transpose(1, 2)
        for number in range(first, stop):
            block = self.blocks[number * len(self.blocks) // self.num_layers]
            hidden = block(hidden, turns, plan, number)
        return hidden

    def finish(self, hidden: Tensor) -> Tensor:
        """The norm behind the last layer. Shapes: [n, D] -> [n, D]."""
        return self.final_norm(hidden)

    def initialise_like_vocabulary(self, vectors: nn.Embedding) -> None:
        """New tokens begin around zero, and smaller than words."""
        nn.init.normal_(vectors.weight, std=MARK_SCALE * self.init_scale)
