"""Search down a tree index: the children of the kept nodes are scored at every depth, the best are kept."""

from typing import Any

from torch import Tensor

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from models.generator import DecodeState
from models.node_scorer import NodeGuide, NodeScorer
from sharding.item_index import evaluating
from trainer.configuration import SearchConfig
from trainer.generative_search import GenerativeSearch


class TreeSearch(GenerativeSearch):
    """A beam search in which the model itself is the guide, so that items are ordered by their leaves' scores.

    Source: Zhu et al., Learning Tree-based Deep Model for Recommender Systems (2018), algorithm 1. Deviation: an item
    whose leaf ends before the last level is an only child from there on, which is scored again at each level.
    """

    model: NodeScorer

    def __init__(self, *parts: Any, config: SearchConfig, **options: Any):
        """Raises: ConfigError for another search than a beam over the items' paths."""
        beam = SearchConfig()
        names = ("method", "space", "prm", "temperature", "over")
        changed = [name for name in names if getattr(config, name) != getattr(beam, name)]
        if changed:
            raise ConfigError(
                "a tree is searched by a beam over its own nodes, ordered by their scores, and got "
                f"{', '.join(f'search.{name} {getattr(config, name)}' for name in changed)}; leave that out"
            )
        super().__init__(*parts, config=config, **options)

    def score(self, batch: SequenceBatch, candidates: Tensor) -> Tensor:
        """Log-odds of each item's leaf."""
        leaves = self.model.nodes.leaves[candidates.clamp(min=0).cpu()]
        with evaluating(self.model), self._autocast():
            state = self.model.prefill(self._rows(batch), batch.to(self.device))
            scores = self._guide(batch, state).scores(self.model.nodes.depth, leaves)
        return scores.masked_fill(candidates.to(self.device) < 0, float("-inf"))

    def _guide(self, batch: SequenceBatch, state: DecodeState) -> NodeGuide:
        return NodeGuide(self.model, state, batch, self.lookup)
