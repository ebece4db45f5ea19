"""What a run keeps between starts: saving all of it as one checkpoint, and bringing it back at any world size."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import polars as pl

from cluster.errors import CheckpointError
from data_streams.item_table import ItemTable, catalogue_fingerprint
from data_streams.semantic_ids import SemanticIdTable
from data_streams.stream import Position, merge_positions
from models.recommender import Recommender
from sharding.state import Piece
from sharding.tables import EmbeddingTables, kept_rows
from trainer.assembly import Assembly, describe_model
from trainer.attributes import require_attributes
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_reader import CheckpointReader
from trainer.fingerprint import compare_fingerprint, model_fingerprint, option_defaults
from trainer.plain_engine import named_state, named_trainable
from trainer.settings import changed_settings
from trainer.weight_average import AVERAGE, served_prefix

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 65_536


@dataclass(kw_only=True)
class Progress:
    """How far a run has come; `position` is this rank's, everything else is the same on all ranks."""

    step: int = 0
    """Optimizer steps taken."""
    epoch: int = 0
    position: Position | None = None
    """Where the streams stand inside the epoch; None at its beginning."""
    best: float | None = None
    """Best value of the selection metric so far."""
    best_step: int | None = None
    validations_without_gain: int = 0
    metric_lines: int = 0
    """Lines of metrics.jsonl; counted on rank 0, whose account is the one that is saved."""
    status: str = "running"
    notes: dict[str, Any] = field(default_factory=dict)
    """What a loop remembers beside, as plain JSON values."""

    def shared(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "position"}

    @property
    def place(self) -> tuple[int, int, bool]:
        """Step, epoch, and whether the run is over: both may change after the last step was saved."""
        return self.step, self.epoch, self.status not in ("running", "stopped")

    def forget_best(self) -> None:
        """What was best by one metric cannot be compared with the values of another one."""
        self.best = self.best_step = None
        self.validations_without_gain = 0


def fingerprint(assembly: Assembly, engine) -> dict[str, Any]:
    """From the model alone, not from what lies on this rank: a rank that holds no row of a table names it too."""
    shapes = {f"dense/{name}": shape for name, shape in engine.dense_shapes().items()}
    shapes |= {f"table/{spec.name}": (kept_rows(spec), spec.dim) for spec in assembly.model.all_tables()}
    return model_fingerprint(shapes, describe_model(assembly))


def save_progress(
    checkpointer: Checkpointer, assembly: Assembly, engine, progress: Progress, config: dict, *, best: bool
) -> None:
    """Stage this rank's state and let it be written in the background; a collective call."""
    checkpointer.save(
        progress.step,
        [*assembly.tables.pieces(), *engine.pieces()],
        rank_state={"position": progress.position},
        shared_state={
            "progress": progress.shared(),
            "fingerprint": fingerprint(assembly, engine),
            "dense_shapes": {name: list(shape) for name, shape in engine.dense_shapes().items()},
            "catalogue": assembly.items.fingerprint,
            "conditions": _conditions(assembly.model),
            "config": config,
        },
        best=best,
    )


def restore_progress(
    reader: CheckpointReader, assembly: Assembly, engine, config: Mapping[str, Any]
) -> Progress:
    """Fill tables, weights and optimizer state, and say where the run stands; `config` is the one it goes on with.

    Raises: CheckpointError if the checkpoint belongs to another model, listing what differs, or another catalogue;
    ConfigError if the run has another seed.
    """
    _require_catalogue(reader, assembly)
    _require_conditions(reader, assembly.model)
    defaults = {name: option_defaults(getattr(assembly.config, name)) for name in ("model", "objective")}
    compare_fingerprint(reader.shared_state["fingerprint"], fingerprint(assembly, engine), defaults)
    changed = changed_settings(reader.shared_state["config"], config)
    if changed:
        logger.warning(
            "Until step %d this run had other settings, and it goes on with these unless it has finished: %s; name "
            "another --run-dir to begin another run",
            *(reader.step, ", ".join(changed)),
        )
    progress = Progress(**reader.shared_state["progress"])
    if _selection_metric(reader.shared_state["config"]) != _selection_metric(config):
        progress.forget_best()
    has_average = served_prefix(reader.tensors) == AVERAGE
    for piece in [*assembly.tables.pieces(), *engine.pieces()]:
        if has_average or not piece.name.startswith(AVERAGE):
            reader.read_into(piece.name, piece.start, piece.tensor)
    engine.restore(reader.read_rows, progress.step)
    if engine.average and not has_average:
        engine.average.restart(engine.weights())
    positions = [state["position"] for state in reader.rank_states if state["position"]]
    progress.position = merge_positions(positions) if positions else None
    logger.info(
        "Going on from step %d of epoch %d, saved by %d workers.",
        progress.step,
        progress.epoch + 1,
        reader.world_size,
    )
    return progress


def _selection_metric(config: Mapping[str, Any]) -> str | None:
    return config.get("train", {}).get("selection_metric")


@runtime_checkable
class Weights(Protocol):
    """A model and its tables."""

    items: ItemTable
    semantic_ids: SemanticIdTable | None
    model: Recommender
    tables: EmbeddingTables


def load_weights(reader: CheckpointReader, assembly: Weights) -> None:
    """Tables and dense weights for evaluation and serving, without an engine.

    Raises: CheckpointError where the model was trained with other semantic IDs, on another catalogue, or has rows for
    items or prefixes of this one that it never learnt.
    """
    _require_catalogue(reader, assembly)
    _require_conditions(reader, assembly.model)
    if assembly.semantic_ids is not None:
        assembly.semantic_ids.require(reader.shared_state["fingerprint"]["model"]["semantic_ids"])
    _load_dense(reader, assembly)
    for piece in assembly.tables.pieces():
        _require_rows(reader, piece)
        reader.read_into(piece.name, piece.start, piece.tensor)


def _require_rows(reader: CheckpointReader, piece: Piece) -> None:
    """Of semantic IDs that were extended, a table may have more rows than were trained."""
    (saved, *_), _ = reader.tensors[piece.name]
    if saved < piece.global_shape[0]:
        raise CheckpointError(
            f"{piece.name} must have {piece.global_shape[0]} rows for the catalogue at hand, and the checkpoint of "
            f"step {reader.step} has {saved}: new items have none in it; give the data and the semantic IDs it was "
            "trained with, or train a run on these"
        )


def _require_catalogue(reader: CheckpointReader, assembly: Weights) -> None:
    """Rows must mean the same items. A model of semantic IDs has a check of its own: it may know more of them."""
    saved = reader.shared_state.get("catalogue")
    # Checkpoints of earlier versions do not say.
    if assembly.semantic_ids is None and saved not in (None, assembly.items.fingerprint):
        raise CheckpointError(
            f"the checkpoint of step {reader.step} must be of the catalogue at hand, and its items are others, or in "
            "another order; give the shards it was trained on with --data.path, or begin another run from its weights "
            "with --init-from, which matches items by their ids"
        )


def _conditions(model: Recommender) -> str | None:
    """Changes with the conditions of a model and with their order; None without any."""
    names = model.condition_names
    return catalogue_fingerprint(pl.Series(names, dtype=pl.String)) if names else None


def _require_conditions(reader: CheckpointReader, model: Recommender) -> None:
    """Conditions are learnt by number, and the numbers follow from all values of the item column."""
    saved, own = reader.shared_state.get("conditions"), _conditions(model)
    # A model without any can begin one with them, and checkpoints of earlier versions do not say.
    if saved is not None and own is not None and saved != own:
        raise CheckpointError(
            f"the checkpoint of step {reader.step} must have learnt the conditions at hand, the values of "
            "model.condition-column among the items of data.path, and it learnt others; give the shards it was trained "
            "on with --data.path, or train a run on these from one without conditions"
        )


def initialise_from(reader: CheckpointReader, saved_items: pl.Series, assembly: Assembly) -> None:
    """Take the weights, and nothing else, of another run; must precede the engine.

    Items are matched by their raw ids: rows of items the other run did not have keep their initial values. So do
    weights that the model adds to the other one's (`Recommender.added_parameters`).

    Raises: CheckpointError if the dense part has another shape, was learnt under other conditions, or rows with
    attributes that this run leaves out or hashes otherwise.
    """
    _require_conditions(reader, assembly.model)
    require_attributes(reader.shared_state["fingerprint"]["model"], assembly.config.data)
    _load_dense(reader, assembly, may_lack=assembly.model.added_parameters)
    _tell_other_codes(reader, assembly)
    new_rows = _new_rows_of_saved(saved_items, assembly.items.item_ids)
    logger.info(
        "Weights from step %d: %d of %d items were known to it.",
        reader.step,
        int((new_rows >= 0).sum()),
        assembly.items.num_items,
    )
    for piece in assembly.tables.pieces():
        kind, name = piece.name.split("/", 1)
        spec = assembly.tables.specs[name]
        if kind != "table":
            continue
        if not spec.rows_are_items and piece.name not in reader.tensors:
            logger.info("The rows of table %s are new and keep their initial values.", name)
        elif spec.hash_rows:
            _require_same_hashes(reader, piece)
            reader.read_into(piece.name, piece.start, piece.tensor)
        elif spec.rows_are_items:
            _copy_known_rows(reader, piece, new_rows)
        else:
            if not spec.rows_are_places:
                _require_same_paths(reader, assembly, name)
            reader.read_into(piece.name, piece.start, piece.tensor)


def _tell_other_codes(reader: CheckpointReader, assembly: Assembly) -> None:
    """Rows of places (of a tree) go with the place, whatever item has it now; codes were learnt for their items."""
    saved, own = reader.shared_state["fingerprint"]["model"].get("semantic_ids"), assembly.semantic_ids
    if saved is None or own is None or any(spec.rows_are_places for spec in assembly.tables.specs.values()):
        return
    if not own.extends_or_is(saved):
        logger.warning(
            "The weights have learnt the semantic IDs %s, and this run's are %s, in which items have other codes: what "
            "they know of codes is of other items; give --data.semantic-ids of the run they come from, or train long "
            "enough",
            *(saved, own.fingerprint),
        )


def _require_same_hashes(reader: CheckpointReader, piece: Piece) -> None:
    """Hashed into more or fewer rows, ids would find those of others."""
    (saved, *_), _ = reader.tensors[piece.name]
    if saved != piece.global_shape[0]:
        raise CheckpointError(
            f"{piece.name} must have as many rows as in the run this one starts from, {saved}, since ids are hashed "
            f"into them, and has {piece.global_shape[0]}; give the option of that run (data.attribute-rows, user-rows "
            "or hash-rows)"
        )


def _require_same_paths(reader: CheckpointReader, assembly: Assembly, name: str) -> None:
    saved, own = (
        reader.shared_state["fingerprint"]["model"]["semantic_ids"],
        assembly.semantic_ids.fingerprint,
    )
    if saved != own:
        raise CheckpointError(
            f"the rows of table {name} belong to prefixes of the semantic IDs {saved}, and this run's are {own}; give "
            "the table of the run it starts from"
        )


def _new_rows_of_saved(saved: pl.Series, current: pl.Series) -> np.ndarray:
    """Row in this run of every saved item. Shapes: [saved N] int64, -1 where this run lacks it."""
    known = pl.DataFrame({"id": current.cast(pl.String)}).with_row_index("row")
    joined = pl.DataFrame({"id": saved.cast(pl.String)}).join(
        known, on="id", how="left", maintain_order="left"
    )
    return joined["row"].cast(pl.Int64).fill_null(-1).to_numpy()


def _copy_known_rows(reader: CheckpointReader, piece: Piece, new_rows: np.ndarray) -> None:
    stop = piece.start + piece.tensor.shape[0]
    for first in range(0, len(new_rows), _ROWS_AT_A_TIME):
        targets = new_rows[first : first + _ROWS_AT_A_TIME]
        own = np.flatnonzero((targets >= piece.start) & (targets < stop))
        if len(own):
            rows = reader.read_rows(piece.name, first, first + len(targets))
            piece.tensor[targets[own] - piece.start] = rows[own].to(piece.tensor.device)


def _load_dense(reader: CheckpointReader, assembly: Weights, may_lack: tuple[str, ...] = ()) -> None:
    """The weights that evaluation used: their average where the run kept one."""
    prefix = served_prefix(reader.tensors)
    for name, tensor in [*named_trainable(assembly.model), *named_state(assembly.model)]:
        saved = reader.shared_state["dense_shapes"].get(name)
        if saved is None and name.startswith(may_lack):
            logger.info("The weights of %s are new and keep their initial values.", name)
            continue
        if saved != list(tensor.shape):
            raise CheckpointError(
                f"the weights of {name} must have shape {list(tensor.shape)}, the checkpoint has "
                f"{'none of that name' if saved is None else saved}; give the model options the checkpoint was trained "
                "with"
            )
        tensor.data.copy_(reader.read_rows(prefix + name, 0, tensor.numel()).view(tensor.shape))
