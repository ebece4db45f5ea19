"""Decoder-only baseline: a causal transformer over items whose every state is unfolded into the next item's codes.

Each item of the history is one token: the sum of its code vectors and, if wanted, its own row and projected
features. A small depth decoder reads the state after a position and writes the codes of the next item one after
another, so all positions of a user are trained in one pass. Source: the depth transformer follows RQ-Transformer
(Lee et al., 2022); RECONSTRUCTED for recommendation.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.coded_history import CodedHistory, CodedHistoryConfig, Stack, fixed_length
from models.generator import DecodeState, next_code_loss
from models.layers.linear import Linear
from models.layers.shared_prompt_attention import PromptLayout
from models.recommender import LossSum, StepContext
from models.tables import Rows


class DecoderOnly(CodedHistory):
    """A generator whose depth decoder attends to codes alone: the state is all it knows of the history."""

    @dataclass(frozen=True, kw_only=True)
    class Config(CodedHistoryConfig):
        num_depth_blocks: int = 2
        """Blocks of the depth decoder."""
        label_smoothing: float = 0.0
        """Share of the target's probability that is spread over all codes of the level."""

        def build(self, **parts: Any) -> "DecoderOnly":
            return DecoderOnly(self, **parts)

    def __init__(self, config: Config, **parts: Any):
        super().__init__(config, **parts)
        self.depths = nn.Embedding(len(self.code_sizes), config.width)
        self.depth = Stack(config, config.num_depth_blocks)
        self.heads = nn.ModuleList(Linear(config.width, size) for size in self.code_sizes)
        self.initialise()

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        paths = self.item_codes[batch.targets]
        logits = self.teacher_forced(self.encode(rows, batch), paths)
        return next_code_loss(logits, paths, self.config.label_smoothing)

    def teacher_forced(self, states: Tensor, paths: Tensor) -> list[Tensor]:
        """Scores of every level after each state. Shapes: states [T, D], paths [T, L] -> L x [T, K_l]."""
        given = self.codes(paths[:, :-1]) * self.config.width**0.5
        num_states, num_levels = paths.shape
        depths = torch.arange(num_levels, device=paths.device)
        tokens = torch.cat((states[:, None], given), dim=1) + self.depths(depths)
        lengths = fixed_length(tokens)
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
