"""A causal decoder over histories and pages: trained on packed pages, continued prefix by prefix."""

from torch import Tensor, nn

from models.generator import DecodeState
from models.kernels.page_attention import PageLayout, page_attention
from models.layers.dropout import Dropout
from models.layers.shared_prompt_attention import PromptKeyValues, PromptLayout
from models.layers.transformer import FeedForward, TransformerBlock


class PageDecoder(nn.Module):
    """Learned positions, blocks on top of each other and a last norm."""

    def __init__(
        self,
        *,
        width: int,
        num_blocks: int,
        num_heads: int,
        feedforward_width: int,
        num_positions: int,
        dropout: float,
    ):
        super().__init__()
        self.width = width
        self.positions = nn.Embedding(num_positions, width)
        self.input_dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            PageBlock(
                width=width,
                num_heads=num_heads,
                feedforward=FeedForward(width, feedforward_width),
                dropout=dropout,
            )
            for _ in range(num_blocks)
        )
        self.final_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, places: Tensor, layout: PageLayout) -> Tensor:
        """The states after all tokens of histories and, behind them, pages. Shapes: [N, D], [N] -> [N, D]."""
        hidden = self._begin(tokens, places)
        for block in self.blocks:
            hidden = block(hidden, layout)
        return self.final_norm(hidden)

    def remember(
        self, tokens: Tensor, places: Tensor, layout: PromptLayout
    ) -> tuple[Tensor, tuple[PromptKeyValues, ...]]:
        """The same over histories alone, with their keys and values by block. Shapes: [H, D], [H] -> [H, D]."""
        hidden, prompts = self._begin(tokens, places), []
        for block in self.blocks:
            hidden, prompt = block.remember(hidden, layout)
            prompts.append(prompt)
        return self.final_norm(hidden), tuple(prompts)

    def extend(self, tokens: Tensor, places: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
        """One more token for each of W prefixes per user. Shapes: [B, W, D], [B, W] -> [B, W, D]."""
        hidden, suffixes = self._begin(tokens, places), []
        for block, prompt, before in zip(self.blocks, state.prompt, state.suffix, strict=True):
            hidden, suffix = block.extend(hidden, prompt, before)
            suffixes.append(suffix)
        return self.final_norm(hidden), state.with_suffix(suffixes)

    def _begin(self, tokens: Tensor, places: Tensor) -> Tensor:
        return self.input_dropout(tokens * self.width**0.5 + self.positions(places))


class PageBlock(TransformerBlock):
    """A block over histories and the pages behind them; it remembers and extends like any other."""

    def forward(self, hidden: Tensor, layout: PageLayout) -> Tensor:
        """Shapes: [H + G, D] -> [H + G, D]."""
        return self._finish(hidden, page_attention(*self._project(hidden), layout))
