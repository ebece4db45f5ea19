"""Decoder-only baseline: a causal transformer over items whose every state is unfolded into the next item's codes.

Each item of the history is one token: the sum of its code vectors and, if wanted, its own row and projected
features. A small depth decoder reads the state after a position and writes the codes of the next item one after
another, so all positions of a user are trained in one pass. Source: the depth transformer follows RQ-Transformer
(Lee et al., 2022); RECONSTRUCTED for recommendation.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.generator import DecodeState, Generator, next_code_loss
from models.item_sequence import ITEM_TABLE
from models.kernels.length_buckets import bucket_layout
from models.layers.code_embedding import CodeEmbedding
from models.layers.dropout import Dropout
from models.layers.linear import Linear
from models.layers.shared_prompt_attention import PromptLayout
from models.layers.transformer import FeedForward, TransformerBlock
from models.recommender import LossSum, StepContext
from models.semantic_ids import SemanticIds
from models.tables import Ids, LookedUp, Rows, TableSpec


class DecoderOnly(Generator):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        needs_semantic_ids: ClassVar[bool] = True
        has_own_objective: ClassVar[bool] = True

        width: int = 192
        """Size of the residual stream."""
        num_blocks: int = 4
        """Blocks over the items of a user."""
        num_depth_blocks: int = 2
        """Blocks of the depth decoder."""
        num_heads: int = 4
        """Attention heads per block."""
        feedforward_width: int = 512
        """Hidden size of the feed-forward part."""
        dropout: float = 0.3
        """Dropout on the input and on what blocks add."""
        item_rows: bool = True
        """Add a trained row of its own to every item of the history; without, an item is its codes alone."""
        item_features: bool = False
        """Add a projection of the items' feature vectors (such as text embeddings)."""
        label_smoothing: float = 0.0
        """Share of the target's probability that is spread over all codes of the level."""
        init_scale: float = 0.02
        """Standard deviation of the initial rows and weights."""

        def __post_init__(self) -> None:
            if self.item_features and not self.item_rows:
                raise ConfigError(
                    "model.item-features are added to the items' rows; leave them out or keep model.item-rows on"
                )

        def build(self, **parts: Any) -> "DecoderOnly":
            return DecoderOnly(self, **parts)

    def __init__(
        self,
        config: Config,
        *,
        num_items: int,
        max_length: int,
        item_feature_dim: int,
        semantic_ids: SemanticIds,
    ):
        super().__init__()
        self.config, self.num_items = config, num_items
        self.code_sizes = semantic_ids.code_sizes
        self.uses_item_features = config.item_features
        self.register_buffer("item_codes", semantic_ids.codes, persistent=False)
        self.codes = CodeEmbedding(self.code_sizes, config.width)
        self.positions = nn.Embedding(max_length, config.width)
        self.depths = nn.Embedding(len(self.code_sizes), config.width)
        if config.item_features:
            self.feature_projection = Linear(item_feature_dim, config.width, bias=False)
        self.input_dropout = Dropout(config.dropout)
        self.history = Stack(config, config.num_blocks)
        self.depth = Stack(config, config.num_depth_blocks)
        self.heads = nn.ModuleList(Linear(config.width, size) for size in self.code_sizes)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_scale)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def tables(self) -> list[TableSpec]:
        if not self.config.item_rows:
            return []
        return [
            TableSpec(
                name=ITEM_TABLE,
                num_rows=self.num_items,
                dim=self.config.width,
                features=("history",),
                init_scale=self.config.init_scale,
                placement="row_wise",
            )
        ]

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        return self.prompt_ids(batch)

    def prompt_ids(self, batch: SequenceBatch) -> Ids:
        return {"history": batch.items.values} if self.config.item_rows else {}

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        paths = self.item_codes[batch.targets]
        logits = self.teacher_forced(self.encode(rows, batch), paths)
        return next_code_loss(logits, paths, self.config.label_smoothing)

    def encode(self, rows: Rows, batch: SequenceBatch) -> Tensor:
        """The state after each event. Shapes: [T, D]."""
        items = batch.items
        hidden = self.codes(self.item_codes[items.values]).sum(1)
        if self.config.item_rows:
            hidden = hidden + self._own_vectors(rows["history"])
        within = torch.arange(items.values.shape[0], device=hidden.device)
        within = within - items.offsets[items.row_index()]
        scaled = hidden * self.config.width**0.5
        return self.history(self.input_dropout(scaled + self.positions(within)), items)

    def teacher_forced(self, states: Tensor, paths: Tensor) -> list[Tensor]:
        """Scores of every level after each state. Shapes: states [T, D], paths [T, L] -> L x [T, K_l]."""
        given = self.codes(paths[:, :-1]) * self.config.width**0.5
        num_states, num_levels = paths.shape
        depths = torch.arange(num_levels, device=paths.device)
        tokens = torch.cat((states[:, None], given), dim=1) + self.depths(depths)
        lengths = Jagged(
            values=tokens.flatten(0, 1),
            offsets=torch.arange(num_states + 1, device=tokens.device) * num_levels,
            max_length=num_levels,
        )
        hidden = self.depth(lengths.values, lengths).unflatten(0, (num_states, num_levels))
        return [head(hidden[:, level]) for level, head in enumerate(self.heads)]

    def prefill(self, rows: Rows, batch: SequenceBatch) -> DecodeState:
        last = self.encode(rows, batch)[batch.items.offsets[1:] - 1]
        tokens = last + self.depths(torch.zeros((), dtype=torch.int64, device=last.device))
        ones = torch.arange(batch.num_users + 1, device=tokens.device)
        layout = PromptLayout.build(Jagged(values=tokens, offsets=ones, max_length=1))
        hidden, prompt = tokens, []
        for block in self.depth.blocks:
            hidden, key_values = block.remember(hidden, layout)
            prompt.append(key_values)
        return DecodeState(
            last_hidden=self.depth.final_norm(hidden),
            lengths=torch.ones_like(ones[1:]),
            prompt=tuple(prompt),
            suffix=(None,) * len(prompt),
        )

    def step(
        self, state: DecodeState, level: int, codes: Tensor | None, parents: Tensor | None
    ) -> tuple[Tensor, DecodeState]:
        if level == 0:
            return self.heads[0](state.last_hidden)[:, None], state
        state, suffixes = state.reorder(parents), []
        given = self.codes(codes[..., None], level - 1)[..., 0, :] * self.config.width**0.5
        hidden = given + self.depths(torch.full_like(codes, level))
        for block, prompt, before in zip(self.depth.blocks, state.prompt, state.suffix, strict=True):
            hidden, suffix = block.extend(hidden, prompt, before)
            suffixes.append(suffix)
        hidden = self.depth.final_norm(hidden)
        scores = self.heads[level](hidden.flatten(0, 1)).unflatten(0, codes.shape)
        return scores, state.with_suffix(suffixes)

    def _own_vectors(self, found: LookedUp) -> Tensor:
        if not self.config.item_features:
            return found.rows
        return found.rows + self.feature_projection(found.item_features.float())


class Stack(nn.Module):
    """Causal blocks on top of each other and a last norm."""

    def __init__(self, config: DecoderOnly.Config, num_blocks: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            TransformerBlock(
                width=config.width,
                num_heads=config.num_heads,
                feedforward=FeedForward(config.width, config.feedforward_width),
                dropout=config.dropout,
            )
            for _ in range(num_blocks)
        )
        self.final_norm = nn.LayerNorm(config.width)

    def forward(self, hidden: Tensor, sequences: Jagged) -> Tensor:
        """Shapes: hidden [T, D] -> [T, D]."""
        layout = bucket_layout(sequences)
        for block in self.blocks:
            hidden = block(hidden, layout)
        return self.final_norm(hidden)
