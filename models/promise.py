"""PROMISE: an encoder-decoder over semantic IDs with a process reward model (PRM) that steers the beam.

The history is one token per item; a decoder with attention to it writes the codes of the next item. The PRM shares the
encoder and both losses train it. In the search the decoder proposes the candidates of each depth and the PRM alone
chooses among them, so that more candidates cost queries of the PRM and no further pass of the decoder.

Source: PROMISE (Kuaishou, 2026), arXiv 2601.04674. Deviation: the encoder is causal, so that every position of a user
is trained in one pass; the paper encodes one history per target with full attention. The rest is said in
`models.path_reward`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from models.coded_history import fixed_length
from models.generator import DecodeState, next_code_loss
from models.kernels.length_buckets import bucket_layout
from models.layers.cross_attention import CrossDecoderBlock
from models.layers.linear import Linear
from models.layers.shared_prompt_attention import PromptLayout
from models.layers.transformer import FeedForward
from models.process_reward import GuidedState, RewardedHistory, RewardedHistoryConfig, detached
from models.recommender import LossSum, StepContext
from models.tables import Rows


class Promise(RewardedHistory):
    """A generator that brings its own PRM; a search without it is the plain beam."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardedHistoryConfig):
        num_decoder_blocks: int = 4
        """Blocks of the decoder."""
        label_smoothing: float = 0.0
        """Share of the target's probability that is spread over all codes of the level."""
        prm_weight: float = 1.0
        """Weight of the PRM's loss beside that of the codes; 0 trains the generator alone."""

        def build(self, **parts: Any) -> "Promise":
            return Promise(self, **parts)

    def __init__(self, config: Config, **parts: Any):
        super().__init__(config, **parts)
        self.begin = nn.Embedding(1, config.width)
        self.depths = nn.Embedding(len(self.code_sizes), config.width)
        self.decoder = Decoder(config)
        self.heads = nn.ModuleList(Linear(config.width, size) for size in self.code_sizes)
        self.initialise()

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        states, paths = self.encode(rows, batch), self.item_codes[batch.targets]
        codes = next_code_loss(self.teacher_forced(states, paths, batch), paths, self.config.label_smoothing)
        of_prefixes = self.prm.loss(states, paths, rows, batch)
        total = torch.stack([*of_prefixes.values()]).sum()
        return LossSum(
            sum=codes.sum + self.config.prm_weight * total,
            count=codes.count,
            metrics={**codes.metrics, "prm_loss": total.detach(), **detached(of_prefixes)},
        )

    def teacher_forced(self, states: Tensor, paths: Tensor, batch: SequenceBatch) -> list[Tensor]:
        """Scores of every level after each event. Shapes: states [T, D], paths [T, L] -> L x [T, K_l]."""
        given = self.codes(paths[:, :-1]) * self.config.width**0.5
        tokens = torch.cat((self._first(len(states)), given), dim=1)
        depths = self.depths(torch.arange(paths.shape[1], device=paths.device))
        hidden = self.decoder(tokens + depths, states, batch)
        return [head(hidden[:, level]) for level, head in enumerate(self.heads)]

    def prefill(self, rows: Rows, batch: SequenceBatch) -> GuidedState:
        states, layout = self.encode(rows, batch), PromptLayout.build(batch.items)
        tokens = self._first(batch.num_users)
        depth = self.depths(torch.zeros((), dtype=torch.int64, device=tokens.device))
        empty = GuidedState(
            last_hidden=tokens[:, 0],
            lengths=batch.items.lengths,
            prompt=tuple(block.cross_attention.remember(states, layout) for block in self.decoder.blocks),
            suffix=(None,) * len(self.decoder.blocks),
            prm_memory=self.remembered(states, layout, batch),
        )
        hidden, state = self.decoder.extend(tokens + depth, empty)
        return replace(state, last_hidden=hidden[:, 0])

    def step(
        self, state: DecodeState, level: int, codes: Tensor | None, parents: Tensor | None
    ) -> tuple[Tensor, DecodeState]:
        if level == 0:
            return self.heads[0](state.last_hidden)[:, None], state
        given = self.codes(codes[..., None], level - 1)[..., 0, :] * self.config.width**0.5
        hidden = given + self.depths(torch.full_like(codes, level))
        hidden, state = self.decoder.extend(hidden, state.reorder(parents))
        scores = self.heads[level](hidden.flatten(0, 1)).unflatten(0, codes.shape)
        return scores, state

    def _first(self, count: int) -> Tensor:
        """The token every path begins with. Shapes: [count, 1, D]."""
        index = torch.zeros(count, 1, dtype=torch.int64, device=self.item_codes.device)
        return self.begin(index) * self.config.width**0.5


class Decoder(nn.Module):
    """Blocks over the codes of an item and the encoded history, and a last norm."""

    def __init__(self, config: Promise.Config):
        super().__init__()
        self.blocks = nn.ModuleList(
            CrossDecoderBlock(
                width=config.width,
                num_heads=config.num_heads,
                feedforward=FeedForward(config.width, config.feedforward_width),
                dropout=config.dropout,
            )
            for _ in range(config.num_decoder_blocks)
        )
        self.final_norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor, states: Tensor, batch: SequenceBatch) -> Tensor:
        """Shapes: tokens [T, L, D], states [T, D] -> [T, L, D]."""
        own, layout = bucket_layout(fixed_length(tokens)), bucket_layout(batch.items)
        for block in self.blocks:
            tokens = block(tokens, own, states, layout)
        return self.final_norm(tokens)

    def extend(self, tokens: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
        """One more token for each prefix of a state. Shapes: tokens [B, W, D] -> [B, W, D]."""
        suffixes = []
        for block, memory, before in zip(self.blocks, state.prompt, state.suffix, strict=True):
            tokens, suffix = block.extend(tokens, memory, before)
            suffixes.append(suffix)
        return self.final_norm(tokens), state.with_suffix(suffixes)
