"""TDM: a tree over the items, and a deep model of user and node that a beam search walks down with; JTM as options.

A node is likely if one of its children is (the max-heap property), so only the order within a level must be learnt: the
ancestors of what was taken next are told from other nodes of their level.

Source: Zhu et al., Learning Tree-based Deep Model for Recommender Systems (2018), arXiv 1801.02294; Zhu et al., Joint
Optimization of Tree-based Index and Deep Model for Recommender Systems (2019), arXiv 1902.07565. MEMORY: the order of
linear layer, norm and PReLU; details of the attention, as said in `models.layers.window_attention`. Deviations:
LayerNorm in place of BatchNorm, with which a user's scores would depend on the other users of the batch and the number
of workers; one log-odds in place of a softmax over no and yes, which is the same function; inner nodes have a table
beside that of the items, which are the leaves; a few positions drawn per user and step are learnt at, each of which
stands for its share of all; negatives are drawn with replacement.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import ConfigError
from cluster.seeds import purpose_seed
from data_streams.batch import SequenceBatch
from models.drawn_positions import PLACES, check_positions, draw_positions, drawn_events, drawn_share
from models.generator import DecodeState
from models.layers.linear import Linear, without_autocast
from models.layers.window_attention import LatestEvents, WindowAttention
from models.node_scorer import NodeScorer
from models.recommender import LossSum, StepContext
from models.semantic_ids import SemanticIds
from models.tables import Ids, LookedUp, Rows, TableSpec
from models.tree_nodes import TreeNodes

ITEM_TABLE, NODE_TABLE = "item", "node"


@dataclass(frozen=True, kw_only=True)
class TreeState(DecodeState):
    """Histories that nodes look at. Shapes: S histories, T events of the batch."""

    items: Tensor
    """[T, D]: the rows of the events' items."""
    latest: LatestEvents


class TDM(NodeScorer):
    """A scorer of nodes by a network over the node and the attended windows of the past."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        needs_semantic_ids: ClassVar[bool] = True
        """Whether `build` is to be given the catalogue's semantic IDs."""
        has_own_objective: ClassVar[bool] = True
        """Whether the loss is the model's own."""
        proposes_codes: ClassVar[bool] = False
        """Whether its scores of codes say anything; else a guide alone chooses among all prefixes."""
        semantic_ids_command: ClassVar[str] = "grail tokenize tree"
        """The command that makes the semantic IDs it needs."""

        width: int = 24
        """Size of the rows of items and nodes."""
        windows: tuple[int, ...] = (20, 20, 10, 10, 2, 2, 2, 1, 1, 1)
        """Events in each window of the past, the oldest first; what lies before is not read."""
        attention_hidden: int = 36
        """Hidden size of the attention's MLP."""
        hidden: tuple[int, ...] = (128, 64, 32)
        """Hidden sizes of the network over windows and node."""
        hierarchical_history: bool = False
        """Replace the behaviours, at each level, by their ancestors there: JTM's user representation."""
        window_products: bool = False
        """Let the network read each window times the node as well; without, as in the paper, attention alone tells how
        alike they are."""
        num_negatives: int = 100
        """Nodes drawn for each positive and its ancestors together, more of them near the leaves; fewer where levels
        have fewer others, or there are but two."""
        level_negatives: tuple[int, ...] = ()
        """The same for each level by itself, the first one below the root first."""
        positions: int | None = 4
        """Positions drawn per user and step that are learnt at; None takes all."""
        init_scale: float = 0.02
        """Standard deviation of the initial rows."""

        def __post_init__(self) -> None:
            sizes = (self.width, self.attention_hidden, self.num_negatives, *self.hidden, *self.windows)
            if not self.windows or not self.hidden or min(sizes) < 1:
                raise ConfigError(
                    "width, attention-hidden, num-negatives, hidden and windows of TDM must be at least 1, and got "
                    f"{self.width}, {self.attention_hidden}, {self.num_negatives}, {self.hidden} and {self.windows}"
                )
            check_positions(self.positions)

        def build(self, **parts: Any) -> "TDM":
            return TDM(self, **parts)

    def __init__(self, config: Config, *, num_items: int, semantic_ids: SemanticIds, **_: Any):
        super().__init__()
        self.config, self.num_items = config, num_items
        self.nodes, self.code_sizes = TreeNodes(semantic_ids), semantic_ids.code_sizes
        self.num_negatives = self._negatives_per_depth()
        self.attention = WindowAttention(config.width, config.attention_hidden, config.windows[::-1])
        num_inputs = len(config.windows) * (1 + config.window_products) + 1
        sizes = (num_inputs * config.width, *config.hidden)
        self.layers = nn.ModuleList(ScoringLayer(before, size) for before, size in pairwise(sizes))
        self.output = Linear(sizes[-1], 1)

    def _negatives_per_depth(self) -> tuple[int, ...]:
        given = self.config.level_negatives
        if given and (len(given) != self.nodes.depth or min(given) < 0):
            raise ConfigError(
                f"model.level-negatives must hold {self.nodes.depth} numbers, one for each level of the tree below its "
                f"root, and it holds {given}"
            )
        single = [
            depth for depth in self.nodes.depths if given and given[depth - 1] and self.nodes.is_single(depth)
        ]
        if single:
            raise ConfigError(
                f"model.level-negatives must be 0 where a level has one node, as level {single[0]} has, and it holds "
                f"{given}"
            )
        return given or self.nodes.negatives_per_depth(self.config.num_negatives)

    def tables(self) -> list[TableSpec]:
        shared = {"dim": self.config.width, "init_scale": self.config.init_scale, "placement": "row_wise"}
        inner = tuple(f"node_{depth}" for depth in self.nodes.inner_depths)
        if self.config.hierarchical_history:
            inner += tuple(f"ancestor_{depth}" for depth in self.nodes.inner_depths)
        leaves = ("history", f"node_{self.nodes.depth}")
        return [
            TableSpec(name=ITEM_TABLE, num_rows=self.num_items, features=leaves, **shared),
            TableSpec(
                name=NODE_TABLE,
                num_rows=self.nodes.num_inner,
                features=inner,
                rows_are_items=False,
                rows_are_places=True,
                **shared,
            ),
        ]

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        return draw_positions(batch, context, self.config.positions)

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        ids = self.prompt_ids(batch)
        for depth in self.nodes.depths:
            ids |= self.node_ids(depth, self.samples(depth, batch, context), batch)
        return ids

    def samples(self, depth: int, batch: SequenceBatch, context: StepContext) -> Tensor:
        """Places of a depth: the one above what was taken next, then negatives. Host side. Shapes: [S, 1 + n]."""
        taken, positions = batch.targets[drawn_events(batch)], batch.supervision[PLACES]
        negatives = self.nodes.draw_negatives(
            depth,
            taken,
            self.num_negatives[depth - 1],
            seed=purpose_seed(context.seed, "tree negatives", context.step, depth),
            users=batch.user_ids[positions.row_index()],
            numbers=positions.places(),
        )
        return torch.cat((self.nodes.above(depth, taken)[:, None], negatives), dim=1)

    def prompt_ids(self, batch: SequenceBatch) -> dict[str, Tensor]:
        return {"history": batch.items.values}

    def node_ids(self, depth: int, places: Tensor, batch: SequenceBatch) -> Ids:
        ids = {f"node_{depth}": self.nodes.rows(depth, places).flatten()}
        if self.config.hierarchical_history and depth < self.nodes.depth:
            above = self.nodes.above(depth, batch.items.values)
            ids[f"ancestor_{depth}"] = self.nodes.rows(depth, above)
        return ids

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        state, share = self.training_state(rows, batch), drawn_share(batch, self.config.positions)
        losses = {
            f"loss_level_{depth}": (_sample_loss(self.node_scores(depth, rows, state)) * share).sum()
            for depth in self.nodes.depths
        }
        metrics = {name: loss.detach() for name, loss in losses.items()}
        return LossSum(sum=torch.stack([*losses.values()]).sum(), count=batch.num_tokens, metrics=metrics)

    def training_state(self, rows: Rows, batch: SequenceBatch) -> TreeState:
        return self._state(rows, batch, drawn_events(batch), batch.supervision[PLACES].row_index())

    def prefill(self, rows: Rows, batch: SequenceBatch) -> TreeState:
        users = torch.arange(batch.num_users, device=batch.items.offsets.device)
        return self._state(rows, batch, batch.items.offsets[1:] - 1, users)

    def _state(self, rows: Rows, batch: SequenceBatch, last: Tensor, users: Tensor) -> TreeState:
        """Shapes: the last event of each history and its user [S]."""
        items, first = rows["history"].rows, batch.items.offsets[users]
        length = min(self.attention.num_events, batch.items.max_length)
        return TreeState(
            last_hidden=items[last],
            lengths=last - first + 1,
            prompt=(),
            suffix=(),
            items=items,
            latest=LatestEvents.build(last, first, length),
        )

    def node_scores(self, depth: int, rows: Rows, state: TreeState) -> Tensor:
        num_histories = state.latest.events.shape[0]
        candidates = rows[f"node_{depth}"].rows
        candidates = candidates.view(num_histories, -1 if num_histories else 1, self.config.width)
        above = rows.get(f"ancestor_{depth}")
        behaviours = (state.items if above is None else above.rows)[state.latest.events]
        pooled = self.attention(candidates, behaviours, state.latest.is_there)
        inputs = [pooled, candidates]
        if self.config.window_products:
            inputs.append(pooled * candidates.repeat(1, 1, len(self.config.windows)))
        hidden = torch.cat(inputs, dim=-1).flatten(0, 1)
        for layer in self.layers:
            hidden = layer(hidden)
        # In bf16, scores of nodes that a beam has to choose among would be the same.
        with without_autocast(hidden):
            return self.output(hidden.float()).view(candidates.shape[:2])

    def item_ids(self, items: Tensor) -> Ids:
        return {"history": items}

    def item_vectors(self, rows: LookedUp) -> Tensor:
        return rows.rows


class ScoringLayer(nn.Module):
    """PReLU(LayerNorm(W x + b)). MEMORY: the order of the three."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.linear, self.norm, self.activation = Linear(width, size), nn.LayerNorm(size), nn.PReLU()

    def forward(self, rows: Tensor) -> Tensor:
        """Shapes: [n, width] -> [n, size]."""
        return self.activation(self.norm(self.linear(rows)))


def _sample_loss(scores: Tensor) -> Tensor:
    """Binary cross-entropy of each sample: its first node is taken, the others are not. Shapes: [S, 1 + n] -> [S]."""
    return F.softplus(-scores[:, 0]) + F.softplus(scores[:, 1:]).sum(1)
