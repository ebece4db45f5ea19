"""JTM's other half: a tree re-assigned to a trained scorer of nodes, a few levels at a time.

Each item goes to the descendant, so many levels down, whose path has the largest sum of log-probabilities over the
item's samples, as far as there is room; see `models.trees.assignment`. Levels further down are then looked at below
where it went.

Source: Zhu et al., Joint Optimization of Tree-based Index and Deep Model for Recommender Systems (2019), arXiv
1902.07565. Deviations: the samples are positions drawn per user; ancestors of the history are those of the old tree,
which the scorer was trained with; a leaf is its item, whose score does not depend on its place, so the last level
decides nothing; what is greedy may lose at lower levels more than it gained at upper ones, so both sums are told.

Shapes: N items, S samples, b branching, D depth.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.stream import TrainStream
from models.drawn_positions import draw_positions, drawn_events
from models.node_scorer import NodeGuide, NodeScorer
from models.recommender import StepContext
from models.tree_nodes import TreeNodes
from models.trees.assignment import assign_children
from models.trees.shape import leaf_codes
from sharding.item_index import evaluating
from trainer.assembly import Assembly
from trainer.evaluate import in_step

MOST_DESCENDANTS = 128
"""2^7: the published number of levels, of a binary tree. With seven levels of four children it would be 16,384."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reassigned:
    """The new tree, and whether it suits the users better. Shapes: N items, D depth."""

    codes: np.ndarray
    """[N, D] int32."""
    branching: int
    before: float
    """Mean over samples of the summed log-probability of the old ancestors, leaves left out."""
    after: float
    """The same of the new ones."""
    num_samples: int
    num_moved: int
    """Items with another parent than before."""


@dataclass(kw_only=True)
class PathSums:
    """Summed log-probabilities of one segment of levels over all samples; on the host."""

    gains: Tensor
    """[N, b^d] fp32, of each descendant of the node the item is at."""
    old: Tensor
    """[N] fp32, of the old ancestors at the same levels."""
    counts: Tensor
    """[N] fp32, samples of each item."""


Summed = Callable[[Tensor, tuple[int, int]], PathSums]
"""(places of the items [N], first and last level of a segment) -> sums below these places."""


def reassign(assembly: Assembly, *, levels: int | None, positions: int | None, seed: int) -> Reassigned:
    """A collective call, whose result is the same on every rank.

    Cost: the training users once for each segment of `levels`, and N * b^levels numbers; see `assign_levels`.
    Raises: ConfigError for a model without a tree of equal branching, or without positions to score.
    """
    model = assembly.model
    if positions is not None and positions < 1:
        raise ConfigError(f"--positions must be at least 1, or None for all, and is {positions}")
    if not isinstance(model, NodeScorer) or len(set(model.code_sizes)) != 1:
        raise ConfigError(
            "--how joint needs a run of a model over a tree from grail tokenize tree, and "
            f"{assembly.config.run_dir} holds a {type(model).__name__}; train one (recipe tdm), or give --how cluster"
        )
    return assign_levels(model, partial(_summed, assembly, positions, seed), levels=levels)


def assign_levels(model: NodeScorer, summed: Summed, *, levels: int | None = None) -> Reassigned:
    """The tree that `summed` gives, segment by segment from the root down.

    Segments of None have as many levels as leave an item MOST_DESCENDANTS to choose from, at least one.
    Raises: ConfigError for segments without levels.
    """
    nodes, branching = model.nodes, model.code_sizes[0]
    if levels is None:
        levels = max(math.floor(math.log2(MOST_DESCENDANTS) / math.log2(branching)), 1)
    if levels < 1:
        raise ConfigError(
            f"--levels must be at least 1, and is {levels}; the published number is 7, of a binary tree"
        )
    places, before, after, num_samples = torch.zeros_like(nodes.leaves), 0.0, 0.0, 0.0
    for start in range(0, nodes.depth, levels):
        stop = min(start + levels, nodes.depth)
        sums = summed(places, (start, stop))
        chosen = _chosen(sums, nodes, places, stop)
        places = places * sums.gains.shape[1] + chosen
        before += float(sums.old.sum())
        after += float(sums.gains.gather(1, chosen[:, None]).sum())
        num_samples = float(sums.counts.sum())
        logger.info("Levels %d to %d of %d are assigned.", start + 1, stop, nodes.depth)
    return Reassigned(
        codes=leaf_codes(places.numpy(), branching, nodes.depth),
        branching=branching,
        before=before / max(num_samples, 1),
        after=after / max(num_samples, 1),
        num_samples=int(num_samples),
        num_moved=int((places // branching != nodes.leaves // branching).sum()),
    )


def _chosen(sums: PathSums, nodes: TreeNodes, places: Tensor, stop: int) -> Tensor:
    """Which descendant at level `stop` each item goes to. Shapes: [N] -> [N]."""
    width, old = sums.gains.shape[1], nodes.above(stop, torch.arange(len(places)))
    _, parents = np.unique(places.numpy(), return_inverse=True)
    at_home = torch.where(old // width == places, old % width, -1)
    room = math.prod(nodes.code_sizes[stop:])
    return torch.from_numpy(assign_children(sums.gains.numpy(), parents, at_home.numpy(), room))


def _summed(
    assembly: Assembly, positions: int | None, seed: int, places: Tensor, segment: tuple[int, int]
) -> PathSums:
    """Of all training users, on every rank; a collective call. Shapes: places of the items at its start [N]."""
    start, stop = segment
    model, process, config = assembly.model, assembly.process, assembly.config
    num_items, width = len(places), math.prod(model.code_sizes[start:stop])
    sums = PathSums(
        gains=torch.zeros(num_items, width), old=torch.zeros(num_items), counts=torch.zeros(num_items)
    )
    stream = TrainStream(config.data, seed=config.seed, rank=process.rank, world_size=process.world_size)
    with evaluating(model):
        for step, batch in enumerate(in_step(stream.batches(0), stream.empty_batch(), process)):
            drawn = draw_positions(batch, StepContext(step=step, seed=seed), positions)
            taken = drawn.targets[drawn_events(drawn)]
            gains, old = path_sums(segment, places[taken], taken, model, _scorer(assembly, drawn))
            sums.gains.index_add_(0, taken, gains)
            sums.old.index_add_(0, taken, old)
            sums.counts += torch.bincount(taken, minlength=num_items)
    for total in (sums.gains, sums.old, sums.counts):
        dist.all_reduce(total, group=process.host_group)
    return sums


def _scorer(assembly: Assembly, batch: SequenceBatch) -> Callable[[int, Tensor], Tensor]:
    """(depth, places [S, C]) -> log-probabilities [S, C] on the host."""
    model, lookup = assembly.model, assembly.lookup()
    state = model.training_state(lookup(model.prompt_ids(batch)), batch.to(assembly.process.device))
    guide = NodeGuide(model, state, batch, lookup)
    return lambda depth, places: F.logsigmoid(guide.scores(depth, places)).cpu()


def path_sums(
    segment: tuple[int, int],
    roots: Tensor,
    taken: Tensor,
    model: NodeScorer,
    log_probabilities: Callable[[int, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the paths below each sample's root, and of its old ancestors. Shapes: [S, b^d], [S]."""
    start, stop = segment
    totals, old = torch.zeros(len(roots), 1), torch.zeros(len(roots))
    for depth in range(start + 1, stop + 1):
        totals = totals.repeat_interleave(model.code_sizes[depth - 1], dim=1)
        if depth == model.nodes.depth:
            continue
        width = totals.shape[1]
        below = roots[:, None] * width + torch.arange(width)
        ancestors = model.nodes.above(depth, taken)[:, None]
        found = log_probabilities(depth, torch.cat((below, ancestors), dim=1))
        totals, old = totals + found[:, :width], old + found[:, width]
    return totals, old
