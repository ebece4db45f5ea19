"""What a model is that says how well each node of a tree suits a user: any function of both may do so.

It proposes no codes. A search by it alone, the tree beam, scores the children of the nodes it has kept, at every depth:
a complete tree of branching b costs at most b * k * log_b(N) scores for a beam of k.
"""

from abc import abstractmethod

from torch import Tensor

from data_streams.batch import SequenceBatch
from models.decoding.trie import pack
from models.generator import DecodeState, Generator
from models.tables import Ids, LookedUp, Lookup, Rows
from models.tree_nodes import TreeNodes


class NodeScorer(Generator):
    """A generator whose codes are all equally likely; its search needs a `NodeGuide`.

    Shapes: S histories with samples, C nodes of each.
    """

    proposes_codes = False

    nodes: TreeNodes

    @abstractmethod
    def training_state(self, rows: Rows, batch: SequenceBatch) -> DecodeState:
        """What `node_scores` knows of each of the S histories that a training batch has samples of."""

    @abstractmethod
    def node_ids(self, depth: int, places: Tensor, batch: SequenceBatch) -> Ids:
        """What `node_scores` looks up; host side. Shapes: places of this depth [S, C]."""

    @abstractmethod
    def node_scores(self, depth: int, rows: Rows, state: DecodeState) -> Tensor:
        """Log-odds that the user takes an item below the node. Shapes: [S, C] fp32."""

    @abstractmethod
    def item_vectors(self, rows: LookedUp) -> Tensor:
        """What a tree can be made of anew. Shapes: [n, D]."""

    @abstractmethod
    def item_ids(self, items: Tensor) -> Ids:
        """What `item_vectors` looks up; its first feature has one id per item. Shapes: [n]."""

    def step(
        self, state: DecodeState, level: int, codes: Tensor | None, parents: Tensor | None
    ) -> tuple[Tensor, DecodeState]:
        width = 1 if codes is None else codes.shape[1]
        return state.last_hidden.new_zeros(state.num_users, width, self.code_sizes[level]), state


class NodeGuide:
    """Lets a scorer of nodes choose the prefixes of a beam search.

    Cost: one collective lookup for each depth, also of a rank without users.
    """

    def __init__(self, model: NodeScorer, state: DecodeState, batch: SequenceBatch, lookup: Lookup):
        """`batch` is on the host."""
        self.model, self.state, self.batch, self.lookup = model, state, batch, lookup

    def __call__(self, depth: int, prefixes: Tensor) -> Tensor:
        """Shapes: prefixes [B, C, depth] -> [B, C]."""
        return self.scores(depth, pack(prefixes.cpu(), self.model.code_sizes[:depth]))

    def scores(self, depth: int, places: Tensor) -> Tensor:
        """Shapes: [B, C] on the host -> [B, C]."""
        rows = self.lookup(self.model.node_ids(depth, places, self.batch))
        # Of a batch without users, rows do not say how many candidates each would have.
        return self.model.node_scores(depth, rows, self.state).view(places.shape)
