"""What a model is that recommends by writing semantic IDs, code after code."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data_streams.batch import SequenceBatch
from models.decoding.distribution import CodeDistribution, path_log_probabilities
from models.decoding.space import FreeSpace, PathSpace
from models.layers.shared_prompt_attention import PromptKeyValues, SuffixKeyValues
from models.recommender import LossSum, Recommender
from models.tables import Ids, Rows


@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """Prompts that were encoded once per user, and the codes that each of a user's prefixes has added.

    Nothing in it is changed in place: a state can be continued several times and differentiated through.

    Shapes: B users, W prefixes per user; one entry per layer that attends.
    """

    last_hidden: Tensor
    """[B, D]: what the first code is predicted from."""
    lengths: Tensor
    """[B] int64: number of prompt tokens, so the position of the first code."""
    prompt: tuple[PromptKeyValues, ...]
    suffix: tuple[SuffixKeyValues | None, ...]
    """Before the first code None, or the key and value of a first token of the model's own, as of one prefix."""

    @property
    def num_users(self) -> int:
        return self.last_hidden.shape[0]

    @property
    def device(self) -> torch.device:
        return self.last_hidden.device

    def reorder(self, parents: Tensor) -> "DecodeState":
        """The state of prefixes that continue others. Shapes: parents [B, W'] in 0..W-1."""
        suffix = tuple(None if layer is None else layer.reorder(parents) for layer in self.suffix)
        return replace(self, suffix=suffix)

    def with_suffix(self, suffix: Sequence[SuffixKeyValues]) -> "DecodeState":
        """The same prompts with one more code in every prefix."""
        return replace(self, suffix=tuple(suffix))


class Generator(Recommender):
    """A model of the L codes of an item, given the user: what `models.decoding` searches with."""

    code_sizes: tuple[int, ...]
    """Number of codes of each level."""
    proposes_codes: bool = True
    """Whether its scores of codes say anything; else a guide alone chooses among all prefixes."""

    @abstractmethod
    def prompt_ids(self, batch: SequenceBatch) -> Ids:
        """What `prefill` looks up."""

    @abstractmethod
    def prefill(self, rows: Rows, batch: SequenceBatch) -> DecodeState:
        """Encode each user once."""

    @abstractmethod
    def step(
        self, state: DecodeState, level: int, codes: Tensor | None, parents: Tensor | None
    ) -> tuple[Tensor, DecodeState]:
        """Scores of the codes of a level after each prefix, and the state that holds the prefixes' last codes.

        Shapes: at level 0 codes and parents are None and scores are [B, 1, K]. Else codes [B, W] are the last ones
        of the prefixes, which continue prefixes number parents [B, W] of the state -> [B, W, K].
        """

    def path_logits(self, rows: Rows, batch: SequenceBatch, paths: Tensor) -> list[Tensor]:
        """Teacher-forced scores of every level of given paths; all paths of a user share one prompt.

        Shapes: paths [B, N, L] (-1 for none) -> L times [B, N, K_l]; differentiable.
        """
        codes = paths.clamp(min=0)
        own = torch.arange(paths.shape[1], device=paths.device).expand(paths.shape[:2])
        logits, state = self.step(self.prefill(rows, batch), 0, None, None)
        result = [logits.expand(-1, paths.shape[1], -1)]
        for level in range(1, len(self.code_sizes)):
            parents = torch.zeros_like(own) if level == 1 else own
            logits, state = self.step(state, level, codes[..., level - 1], parents)
            result.append(logits)
        return result

    def log_probabilities(
        self,
        rows: Rows,
        batch: SequenceBatch,
        paths: Tensor,
        *,
        space: PathSpace | None = None,
        distribution: CodeDistribution | None = None,
    ) -> Tensor:
        """Teacher-forced log-probability of each code of given paths, under the mask and temperature of a search.

        Without a space it is the bare model's, in which every path of codes exists.

        Shapes: paths [B, N, L] (-1 for none) -> [B, N, L] fp32, -inf where a path leaves the space or is none.
        """
        distribution = distribution or CodeDistribution()
        logits = self.path_logits(rows, batch, paths)
        return path_log_probabilities(logits, paths, space or FreeSpace(self.code_sizes), distribution)


def next_code_loss(logits: Sequence[Tensor], paths: Tensor, label_smoothing: float = 0.0) -> LossSum:
    """-log p(path), summed over the levels of each path; the part of every level is reported by itself.

    Shapes: logits L x [T, K_l], paths [T, L] int64.
    """
    per_level = [
        F.cross_entropy(scores.float(), codes, reduction="sum", label_smoothing=label_smoothing)
        for scores, codes in zip(logits, paths.unbind(1), strict=True)
    ]
    metrics = {f"loss_level_{level}": loss.detach() for level, loss in enumerate(per_level, start=1)}
    return LossSum(sum=torch.stack(per_level).sum(), count=paths.shape[0], metrics=metrics)
