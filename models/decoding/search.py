"""What every search over semantic IDs is: from a batch of users to items, paths and log-probabilities."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from models.decoding.distribution import NOTHING, CodeDistribution
from models.decoding.space import Candidates, PathSpace
from models.generator import DecodeState, Generator
from models.tables import Rows


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What a search has found. Shapes: B users, k slots, L codes."""

    items: Tensor
    """[B, k] int64 item rows; -1 in empty slots and, in a free search, for paths of no item."""
    log_probs: Tensor
    """[B, k] fp32: of the path, in the distribution the search walked through; -inf in empty slots only."""
    scores: Tensor
    """[B, k] fp32: what the slots are ordered by; -inf in empty slots only."""
    paths: Tensor
    """[B, k, L] int64; -1 in empty slots."""
    code_log_probs: Tensor
    """[B, k, L] fp32: of each code in that distribution; -inf in empty slots only."""
    kept: tuple[Tensor, ...] = ()
    """By depth 1..L: [B, W] int64 nodes of the prefixes a beam kept, -1 where it had fewer; of beam search only."""

    @property
    def filled(self) -> Tensor:
        """Which slots hold a path. Shapes: [B, k] bool."""
        return self.paths[..., 0] >= 0

    @property
    def legal(self) -> Tensor:
        """Which slots hold a path of the catalogue. Shapes: [B, k] bool."""
        return self.items >= 0

    def hallucination_rate(self) -> Tensor:
        """HaR: share of the generated paths that belong to no item. Shapes: scalar fp32."""
        return 1 - self.legal.sum() / self.filled.sum()

    def hallucination_rates(self) -> Tensor:
        """The same for each user; 0 where no path was found. Shapes: [B] fp32."""
        return (self.filled & ~self.legal).sum(1) / self.filled.sum(1).clamp(min=1)

    def existing(self) -> tuple[Tensor, Tensor]:
        """Items and scores without the paths of no item, the others moved up. Shapes: [B, k], [B, k]."""
        order = (~self.legal).byte().sort(dim=1, stable=True).indices
        scores = self.scores.masked_fill(~self.legal, NOTHING)
        return self.items.gather(1, order), scores.gather(1, order)


class PathSearch(ABC):
    """One way to walk from the empty prefix to paths; the model should be in evaluation mode."""

    @abstractmethod
    def distribution(self) -> CodeDistribution:
        """The distribution of the returned log-probabilities."""

    @abstractmethod
    def search_from(
        self, model: Generator, state: DecodeState, space: PathSpace, *, k: int, seeds: Tensor | None = None
    ) -> Decoded:
        """k slots for each user of a prefilled state; `seeds` [B] int64 where the search draws."""

    @torch.no_grad()
    def search(
        self,
        model: Generator,
        rows: Rows,
        batch: SequenceBatch,
        space: PathSpace,
        *,
        k: int,
        seeds: Tensor | None = None,
    ) -> Decoded:
        """k slots for each user of a batch, whose prompts are encoded once.

        Raises: ConfigError where k or the width do not fit the catalogue, or the model has other codes.
        """
        self.check(model, space, k, batch.num_users)
        return self.search_from(model, model.prefill(rows, batch), space, k=k, seeds=seeds)

    def check(self, model: Generator, space: PathSpace, k: int, num_users: int) -> None:
        space.check(model.code_sizes, num_users)
        if k < 1:
            raise ConfigError(f"a search must return at least one item per user, and {k} were asked for")


def check_width(what: str, width: int, space: PathSpace) -> None:
    """Raises: ConfigError where more different items, or paths of a free search, are asked for than there are."""
    if width > space.num_results:
        raise ConfigError(
            f"{what} must not exceed the {space.num_results} items (of a free search, paths) there are, and it is "
            f"{width}; lower it"
        )


@dataclass(frozen=True, kw_only=True)
class Step:
    """The prefixes a search has kept at depth d. Shapes: W prefixes per user."""

    nodes: Tensor
    """[B, W] int64."""
    parents: Tensor
    """[B, W] int64: which prefix of the previous depth each one continues."""
    log_probs: Tensor
    """[B, W] fp32; -inf for a prefix that is only there to fill the row."""
    code_log_probs: Tensor
    """[B, W, d] fp32: what they are the sums of."""
    scores: Tensor
    """[B, W] fp32: what the search orders by."""

    @staticmethod
    def root(state: DecodeState) -> "Step":
        zeros = torch.zeros(state.num_users, 1, dtype=torch.int64, device=state.device)
        none = zeros.float()
        no_codes = none[..., None][..., :0]
        return Step(nodes=zeros, parents=zeros, log_probs=none, code_log_probs=no_codes, scores=none)

    def take(self, cells: Tensor) -> "Step":
        """Some of the prefixes, in another order. Shapes: [B, W']."""
        return Step(
            nodes=self.nodes.gather(1, cells),
            parents=self.parents.gather(1, cells),
            log_probs=self.log_probs.gather(1, cells),
            code_log_probs=_take_rows(self.code_log_probs, cells),
            scores=self.scores.gather(1, cells),
        )

    def longer(
        self, candidates: Candidates, of_codes: Tensor, cells: Tensor, scores: Tensor | None = None
    ) -> "Step":
        """Prefixes with one more code each; ordered by their log-probabilities where no other scores are given.

        Shapes: W prefixes, M candidates of each: of_codes [B, W, M] log-probabilities, cells [B, W'] in 0..W M - 1.
        """
        parents = cells // of_codes.shape[-1]
        own = of_codes.flatten(1).gather(1, cells)
        log_probs = self.log_probs.gather(1, parents) + own
        return Step(
            nodes=candidates.nodes.flatten(1).gather(1, cells),
            parents=parents,
            log_probs=log_probs,
            code_log_probs=torch.cat((_take_rows(self.code_log_probs, parents), own[..., None]), dim=-1),
            scores=log_probs if scores is None else scores,
        )

    def in_node_order(self) -> "Step":
        """The same prefixes in the order of their parents and codes.

        Candidates of the next level then lie in the order of their paths, so equal scores go to the smaller path.
        """
        return self.take(self.nodes.sort(dim=1, stable=True).indices)

    def decoded(self, space: PathSpace, k: int) -> Decoded:
        """The first k items of the leaves, which must be in the order wanted."""
        items, numbers = space.leaf_items(self.nodes, self.log_probs > NOTHING, k)
        leaves, is_empty = numbers.clamp(min=0), numbers < 0
        found = self.take(leaves)
        paths = space.codes(len(space.code_sizes), found.nodes)
        return Decoded(
            items=items,
            log_probs=found.log_probs.masked_fill(is_empty, NOTHING),
            code_log_probs=found.code_log_probs.masked_fill(is_empty[..., None], NOTHING),
            scores=found.scores.masked_fill(is_empty, NOTHING),
            paths=paths.masked_fill(is_empty[..., None], -1),
        )


def _take_rows(values: Tensor, cells: Tensor) -> Tensor:
    """Shapes: [B, W, d], [B, W'] -> [B, W', d]."""
    return values.gather(1, cells[..., None].expand(*cells.shape, values.shape[-1]))


def next_logits(
    model: Generator, state: DecodeState, level: int, kept: Step | None, space: PathSpace
) -> tuple[Tensor, DecodeState]:
    """The model's scores of a level after the prefixes a search has kept; before the first level it has kept none.

    Shapes: B users, W kept prefixes (one before the first level) -> [B, W, K_l].
    """
    if kept is None:
        return model.step(state, level, None, None)
    return model.step(state, level, space.codes(level, kept.nodes)[..., -1], kept.parents)
