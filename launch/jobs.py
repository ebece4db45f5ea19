"""What each worker of a command does; the slow imports happen on the workers."""

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from cluster.errors import DataError
from cluster.process import Process
from cluster.reporter import Reporter
from cluster.storage import Storage
from launch.run_directory import CHECKPOINTS, folder_and_name, load_config
from trainer.configuration import PretrainConfig

if TYPE_CHECKING:
    from rl.configuration import AlignConfig
    from rl.places import Places
    from rl.rewards import RewardSetting

logger = logging.getLogger(__name__)

SHOWN_HISTORY = 8


def pretrain_job(
    process: Process, config: PretrainConfig, document: dict[str, Any], reporter: Reporter
) -> dict[str, Any]:
    """Train to the end or to a stop; see trainer.start.pretrain."""
    from trainer.start import pretrain

    return pretrain(process, config, document, reporter)


def align_job(
    process: Process,
    config: "AlignConfig",
    start: PretrainConfig,
    start_step: int,
    document: dict[str, Any],
    setting: "RewardSetting",
    places: "Places",
    reporter: Reporter,
) -> dict[str, Any]:
    """Align to the end or to a stop; see rl.start.start_alignment."""
    from rl.start import start_alignment

    return start_alignment(process, config, start, start_step, document, setting, places, reporter)


def evaluate_job(
    process: Process, config: PretrainConfig, step: int, split: str, per_user: str | None, reporter: Reporter
) -> dict[str, Any]:
    """Rank the held-out items of a split, or the exposures of a model of answers; the content of evaluation.json.

    Metrics by user go to the Parquet file `per_user`, where one is named.
    """
    from launch.world_truth import load_truth
    from models.recommender import Ranker
    from trainer.evaluate import evaluate
    from trainer.ranking import evaluate_answers

    assembly = _load(process, config, step)
    if isinstance(assembly.model, Ranker):
        return evaluate_answers(assembly, config, split=split, step=step).to_json()
    users, truth = assembly.users(split), load_truth(config.data.path, split)
    result = evaluate(
        _search(assembly),
        users.batches(),
        empty_batch=users.empty_batch(),
        items=assembly.items,
        config=config.evaluation,
        split=split,
        seed=config.seed,
        utilities=truth and truth.utilities,
        keep=per_user and partial(_write_per_user, per_user, config.data.path),
    )
    return dataclasses.replace(result, step=step).to_json()


def scaling_job(
    process: Process,
    config: PretrainConfig,
    step: int,
    split: str,
    beside: list[tuple[PretrainConfig, int]],
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Searches steered by a PRM with more and more candidates, and plain beams, also of the runs and steps beside.

    See trainer.search_scaling.
    """
    from trainer.search_scaling import beams_beside, compare_searches

    assembly, others = _load(process, config, step), []
    prm = _prm(assembly)
    # Made for nothing but its refusals, before any beam: what follows takes long.
    assembly.search(prm=prm)
    # First, so that a run that does not fit is refused before the longest part.
    for run in beside:
        fingerprint = assembly.semantic_ids.fingerprint
        others += beams_beside(_load(process, *run), fingerprint=fingerprint, split=split)
    return compare_searches(assembly, prm=prm, split=split) + others


def _write_per_user(path: str, data_path: str, users: Any, metrics: Any) -> None:
    """The file is there under its name only when whole: others take one that exists for finished."""
    import polars as pl

    ids = user_ids(data_path)
    known = {"user_id": users if ids is None else ids[users]}
    folder, name = folder_and_name(path)
    with Storage(folder).open_write(name) as file:
        pl.DataFrame({"user_row": users, **known, **metrics}).write_parquet(file)


def show_job(
    process: Process,
    config: PretrainConfig,
    step: int,
    num_users: int,
    rows: list[int] | None,
    k: int,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """History and recommendations of the first users, or of those of some rows in that order, with titles."""
    from trainer.evaluate import recommend

    assembly = _load(process, config, step)
    users = assembly.users("serve", rows=rows, everyone=True)
    batches = _first_users(users.batches(), num_users) if process.rank == 0 else []
    titles, ids, shown = assembly.items.titles, user_ids(config.data.path), []
    found = recommend(
        _search(assembly),
        batches,
        k=k,
        empty_batch=users.empty_batch(),
        filter_seen=config.evaluation.filter_seen,
    )
    # `found` stands first, so that it is exhausted on every rank.
    for (own, items, scores), batch in zip(found, batches, strict=False):
        for index, row in enumerate(own.tolist()):
            history = batch.items.values[batch.items.offsets[index] : batch.items.offsets[index + 1]].tolist()
            kept = [
                (item, score) for item, score in zip(items[index], scores[index], strict=True) if item >= 0
            ]
            shown.append(
                {
                    "row": row,
                    "user": str(row if ids is None else ids[row]),
                    "num_events": len(history),
                    "history": [titles[item] for item in history[-SHOWN_HISTORY:]],
                    "recommended": [(titles[int(item)], float(score)) for item, score in kept],
                }
            )
    return shown if rows is None else sorted(shown, key=lambda user: rows.index(user["row"]))


def write_job(
    process: Process,
    config: PretrainConfig,
    step: int,
    out: str,
    rows: list[int] | None,
    k: int,
    reporter: Reporter,
) -> int:
    """Write the recommendations for this rank's users, or for those of some rows alone, to `out`.part-RANK.

    The number of lines of all ranks.
    """
    import pyarrow.parquet as pq

    from sharding.collectives import exchange_integers
    from trainer.evaluate import recommend, recommendation_table

    assembly = _load(process, config, step)
    users = assembly.users("serve", rows=rows)
    found = recommend(
        _search(assembly),
        users.batches(),
        k=k,
        empty_batch=users.empty_batch(),
        filter_seen=config.evaluation.filter_seen,
    )
    writer, num_users, num_rows = None, 0, 0
    for own, items, scores in found:
        table = recommendation_table(own, items, scores)
        writer = writer or pq.ParquetWriter(part_file(out, process.rank), table.schema)
        writer.write_table(table)
        num_users, num_rows = num_users + len(own), num_rows + table.num_rows
        reporter.progress(users=num_users)
    if writer:
        writer.close()
    return sum(number for (number,) in exchange_integers([num_rows], process))


def part_file(out: str, rank: int) -> str:
    return f"{out}.part-{rank:05d}"


def user_ids(data_path: str) -> Any:
    """Raw ids by user row, as a polars Series; None where the data set has no table of users."""
    from data_streams.user_table import read_users

    users = read_users(Storage(data_path), ["user_id"])
    return None if users is None else users["user_id"]


def user_rows(data_path: str, names: Sequence[str]) -> list[int]:
    """The rows of users by their raw ids. Raises: DataError for one the data set does not have."""
    from data_streams.manifest import Manifest

    ids, num_users = user_ids(data_path), Manifest.load(Storage(data_path)).num_users
    known = None if ids is None else ids.cast(str)
    found = [int(name) if known is None and name.isdecimal() else None for name in names]
    if known is not None:
        found = [known.index_of(name) for name in names]
    missing = [name for name, row in zip(names, found, strict=True) if row is None or row >= num_users]
    if missing:
        raise DataError(
            f"users must be of {data_path}, by the ids they had when it was built, and it has no "
            f"{', '.join(missing)}; `grail data inspect {data_path}` shows some"
        )
    return found


def _load(process: Process, config: PretrainConfig, step: int) -> Any:
    """Model and tables with the weights of a checkpoint; a collective call."""
    from trainer.assembly import assemble
    from trainer.checkpoint_reader import CheckpointReader
    from trainer.run_state import load_weights

    reader = CheckpointReader(Storage(f"{config.run_dir}/{CHECKPOINTS}"), step)
    assembly = assemble(config, process)
    load_weights(reader, assembly)
    assembly.model.eval()
    logger.info("Weights of step %d from %s", step, config.run_dir)
    return assembly


def _search(assembly: Any) -> Any:
    """The configured search; a collective call."""
    return assembly.search(prm=_prm(assembly))


def _prm(assembly: Any) -> Any:
    """Model and tables of the run whose PRM steers the search, if not the model's own; a collective call."""
    from launch.served_run import find_step
    from trainer.assembly import agree_on

    run = assembly.config.search.prm_run
    if not run:
        return None
    config = dataclasses.replace(load_config(run), cluster=assembly.config.cluster)
    # That run may train on meanwhile, and ranks that look one after another find another best step.
    return _load(assembly.process, config, agree_on(find_step(config, "best"), assembly.process))


def _first_users(batches: Any, num_users: int) -> list[Any]:
    chosen = []
    for batch in islice(batches, num_users):
        chosen.append(batch.select(0, min(batch.num_users, num_users)))
        num_users -= chosen[-1].num_users
        if num_users == 0:
            break
    return chosen
