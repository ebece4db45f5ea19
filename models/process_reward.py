"""Models with a process reward model (PRM) over their encoder, and the PRM as the guide of a beam search.

`models.path_reward` says what the PRM is. Source: PROMISE (Kuaishou, 2026), arXiv 2601.04674.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from data_streams.batch import SequenceBatch
from models.coded_history import CodedHistory, CodedHistoryConfig
from models.drawn_positions import draw_positions, with_seen_places
from models.generator import DecodeState
from models.layers.shared_prompt_attention import PromptLayout
from models.path_reward import ROLES, Memory, PathReward, ProcessRewardConfig
from models.recommender import LossSum, StepContext
from models.semantic_ids import SemanticIds
from models.tables import Ids, Lookup, Rows, TableSpec


@dataclass(frozen=True, kw_only=True)
class RewardedHistoryConfig(CodedHistoryConfig):
    """Options of every model with a PRM over its coded history."""

    prm: ProcessRewardConfig = field(default_factory=ProcessRewardConfig)
    """The PRM."""


class RewardedHistory(CodedHistory):
    """An encoder with a PRM, which can also be asked by itself about the prefixes of given paths."""

    added_parameters = ("prm.",)

    def __init__(self, config: RewardedHistoryConfig, *, semantic_ids: SemanticIds, **parts: Any):
        super().__init__(config, semantic_ids=semantic_ids, **parts)
        self.prm = PathReward(config.prm, self, semantic_ids)

    def initialise(self) -> None:
        super().initialise()
        self.prm.initialise()

    def tables(self) -> list[TableSpec]:
        return [*map(_for_paths_too, super().tables()), *self.prm.tables()]

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        drawn = with_seen_places(draw_positions(batch, context, self.config.prm.positions))
        return self.prm.with_negatives(drawn, context)

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        return {**self.prompt_ids(batch), **self.prm.training_ids(batch)}

    def prefix_ids(self, batch: SequenceBatch, paths: Tensor) -> Ids:
        """What `prefix_scores` looks up; host side. Shapes: paths [B, N, L], -1 for none."""
        ids = dict(self.prompt_ids(batch))
        for depth in self.prm.depths:
            ids |= self.prm.path_ids(paths[..., :depth])
        return ids

    def prefix_scores(self, rows: Rows, batch: SequenceBatch, paths: Tensor) -> Tensor:
        """How well each prefix of each path fits the user. Shapes: paths [B, N, L] -> [B, N, L] fp32."""
        memory = self.prefix_memory(rows, batch)
        scores = [
            self.prm.score(self.prm.candidates(paths[..., :depth], rows), memory) for depth in self.prm.depths
        ]
        return torch.stack(scores, dim=-1)

    def prefix_memory(self, rows: Rows, batch: SequenceBatch) -> Memory:
        """The users' whole histories, as the PRM looks at them."""
        return self.remembered(self.encode(rows, batch), PromptLayout.build(batch.items), batch)

    def remembered(self, states: Tensor, layout: PromptLayout, batch: SequenceBatch) -> Memory:
        """Encoded users, as the PRM looks at them. Shapes: states [T, D]."""
        return self.prm.remember(states, layout, batch.items.offsets[1:] - 1)


@dataclass(frozen=True, kw_only=True)
class GuidedState(DecodeState):
    """With the users' histories as the model's own PRM looks at them: they are encoded once for both."""

    prm_memory: Memory


class PrefixGuide:
    """Lets a PRM choose the prefixes of a beam search.

    Cost: one collective lookup of the candidates' rows for each depth from 2 on, also of a rank without users.
    """

    def __init__(self, prm: PathReward, memory: Memory, lookup: Lookup):
        self.prm, self.memory, self.lookup = prm, memory, lookup

    def __call__(self, depth: int, prefixes: Tensor) -> Tensor:
        """Shapes: prefixes [B, C, depth] -> [B, C]."""
        ids = self.prm.path_ids(prefixes.cpu())
        rows = self.lookup(ids) if ids else {}
        return self.prm.score(self.prm.candidates(prefixes, rows), self.memory)


class ProcessReward(RewardedHistory):
    """A PRM with an encoder of its own, for a generator that stays as it is.

    `--init-from` the run of a generator over coded histories gives it a snapshot of that encoder. In a search by itself
    all codes are equally likely and the PRM alone chooses among all prefixes.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardedHistoryConfig):
        proposes_codes: ClassVar[bool] = False
        """Whether its scores of codes say anything; else a guide alone chooses among all prefixes."""
        needs_prm: ClassVar[bool] = True
        """Whether only searches steered by a PRM find anything."""

        def build(self, **parts: Any) -> "ProcessReward":
            return ProcessReward(self, **parts)

    proposes_codes = Config.proposes_codes

    def __init__(self, config: Config, **parts: Any):
        super().__init__(config, **parts)
        self.initialise()

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        states = self.encode(rows, batch)
        losses = self.prm.loss(states, self.item_codes[batch.targets], rows, batch)
        return LossSum(
            sum=torch.stack([*losses.values()]).sum(), count=batch.num_tokens, metrics=detached(losses)
        )

    def prefill(self, rows: Rows, batch: SequenceBatch) -> GuidedState:
        states = self.encode(rows, batch)
        return GuidedState(
            last_hidden=states[batch.items.offsets[1:] - 1],
            lengths=batch.items.lengths,
            prompt=(),
            suffix=(),
            prm_memory=self.remembered(states, PromptLayout.build(batch.items), batch),
        )

    def step(
        self, state: DecodeState, level: int, codes: Tensor | None, parents: Tensor | None
    ) -> tuple[Tensor, DecodeState]:
        width = 1 if codes is None else codes.shape[1]
        return state.last_hidden.new_zeros(state.num_users, width, self.code_sizes[level]), state


def _for_paths_too(items: TableSpec) -> TableSpec:
    """The encoder's table of items, which also serves the whole paths of a PRM."""
    return replace(items, features=(*items.features, *(f"{role}_item" for role in ROLES)))


def detached(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same losses as metrics, without a gradient."""
    return {name: loss.detach() for name, loss in losses.items()}
