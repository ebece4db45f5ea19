"""Making the tree of a tree index: a semantic ID table in which every item is a leaf of its own."""

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import ConfigError
from cluster.storage import Storage
from launch.item_embeddings import RUN_VECTORS, require_run_of, write_run_vectors
from launch.run_directory import CHECKPOINTS, absolute, load_config
from launch.semantic_id_tables import TableOptions, measured, open_out, write_table
from launch.served_run import find_step

if TYPE_CHECKING:
    import numpy as np

    from cluster.process import Process
    from cluster.reporter import Reporter
    from data_streams.item_table import ItemTable
    from data_streams.semantic_id_report import SemanticIdReport
    from trainer.configuration import PretrainConfig
    from trainer.tree_assignment import Reassigned

logger = logging.getLogger(__name__)

WAYS_OF_OPTIONS = {
    "branching": ("categories", "cluster"),
    "checkpoint": ("cluster", "joint"),
    "levels": ("joint",),
    "positions": ("joint",),
}
"""Options of a tree that not every way of making it reads."""


@dataclass(frozen=True, kw_only=True)
class TreeOptions(TableOptions):
    """Make the tree that a tree index searches."""

    how: Literal["categories", "cluster", "joint"] | None = None
    """From the items' categories; by clustering the item vectors of a run; or by re-assigning the items of the tree of
    a TDM run to where its scores are best (JTM). Left out, categories, or cluster where a run is given."""
    from_run: str | None = None
    """Directory of the trained run."""
    checkpoint: str = "best"
    """Which checkpoint of that run: latest, best or the number of a step."""
    branching: int = 2
    """Children of a node, a power of two; a joint tree keeps that of its run."""
    levels: int | None = None
    """Of a joint tree: levels that are assigned at once; an item then has branching ** levels places to choose from.
    Left out, as many as keep these at 128: the published 7 of a binary tree."""
    positions: int | None = 8
    """Of a joint tree: positions drawn per user that nodes are scored for; None takes all."""
    seed: int = 0
    """Seed of all random draws."""

    @property
    def chosen(self) -> str:
        """Raises: ConfigError where a run is missing, or an option is given for nothing."""
        how = self.how or ("cluster" if self.from_run else "categories")
        if (how == "categories") == bool(self.from_run):
            needed = "takes no --from-run" if self.from_run else "needs --from-run RUN"
            raise ConfigError(
                f"--how {how} {needed}: categories come from the data, cluster and joint from a trained run; "
                f"{'leave it out' if self.from_run else 'give one'}, or choose another --how"
            )
        for entry in dataclasses.fields(self):
            ways = WAYS_OF_OPTIONS.get(entry.name, (how,))
            if how not in ways and (given := getattr(self, entry.name)) != entry.default:
                raise ConfigError(
                    f"--{entry.name} is for --how {' and '.join(ways)}, and got {given} with --how {how}; leave it "
                    "out, or choose another --how"
                )
        return how


def make_tree(options: TreeOptions) -> "SemanticIdReport":
    """Build a tree over the items of a data set and write its table and report.

    Raises: ConfigError for options that do not fit; DataError for a run of another catalogue.
    """
    from data_streams.item_table import ItemTable
    from data_streams.semantic_ids import SemanticIdTable

    how = options.chosen
    open_out(options)
    items = ItemTable.load(options.data)
    build = {"categories": _from_categories, "cluster": _from_clusters, "joint": _joint}[how]
    codes, branching = build(items, options)
    table = SemanticIdTable(
        item_ids=items.item_ids,
        codes=codes,
        code_sizes=(branching,) * codes.shape[1],
        tokenizer={"name": "tree", "how": how, "seed": options.seed},
    )
    return write_table(table, None, None, measured(table, None, None, items, options), options)


def _from_categories(items: "ItemTable", options: TreeOptions) -> tuple["np.ndarray", int]:
    from data_streams.semantic_id_report import category_codes
    from models.trees.categories import category_tree

    categories = None
    if items.categories is not None:
        categories = category_codes(items.categories, options.category_level)
    if categories is None:
        raise ConfigError(
            f"--how categories needs items with categories that tell them apart, and those of {options.data} have "
            "none (at --category-level, where it is given); build the data with categories, or give --from-run RUN"
        )
    return category_tree(categories, branching=options.branching, seed=options.seed), options.branching


def _from_clusters(items: "ItemTable", options: TreeOptions) -> tuple["np.ndarray", int]:
    from data_streams.item_vectors import read_matrix
    from models.trees.clustering import cluster_tree

    path = write_run_vectors(
        options.from_run, options.checkpoint, items, options.data, f"{options.out}/{RUN_VECTORS}"
    )
    vectors = read_matrix(path, items.num_items)
    return cluster_tree(vectors[:], branching=options.branching), options.branching


def _joint(items: "ItemTable", options: TreeOptions) -> tuple["np.ndarray", int]:
    from cluster.workers import run_workers

    config = load_config(options.from_run)
    require_run_of(config.run_dir, items, options.data)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=absolute(options.data)))
    found: Reassigned = run_workers(
        *(reassign_job, config, find_step(config, options.checkpoint), options),
        config=config.cluster,
        run_dir=config.run_dir,
    )
    print(
        f"{found.num_moved:,} of {items.num_items:,} items have another parent; summed log-probability of the "
        f"ancestors {found.before:.4f} before, {found.after:.4f} after (mean of {found.num_samples:,} samples)"
    )
    return found.codes, found.branching


def reassign_job(
    process: "Process", config: "PretrainConfig", step: int, options: TreeOptions, reporter: "Reporter"
) -> Any:
    """See trainer.tree_assignment."""
    from trainer.assembly import assemble
    from trainer.checkpoint_reader import CheckpointReader
    from trainer.run_state import load_weights
    from trainer.tree_assignment import reassign

    assembly = assemble(config, process)
    load_weights(CheckpointReader(Storage(f"{config.run_dir}/{CHECKPOINTS}"), step), assembly)
    return reassign(assembly, levels=options.levels, positions=options.positions, seed=options.seed)
