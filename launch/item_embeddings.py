"""The item vectors a tokenizer reads: a file, texts, a run's own vectors, the data set's, or several fused."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError, DataError
from cluster.storage import Storage, renamed_at_end
from launch.run_directory import absolute, local_file

if TYPE_CHECKING:
    from cluster.process import Process
    from cluster.reporter import Reporter
    from data_streams.item_table import ItemTable
    from data_streams.item_vectors import Fusion
    from models.tokenizers.tokenizer import Matrix
    from trainer.configuration import PretrainConfig

TEXT_VECTORS = "text_embeddings.npy"
RUN_VECTORS = "run_embeddings.npy"
FUSED_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class EmbeddingSources:
    """Where item vectors come from: any of these, or without one the data set's own."""

    file: str | None = None
    """Matrix (.npy) whose row i is the vector of item row i."""
    text: bool = False
    """Embed title, price, brand and categories with a sentence-transformers model (extra `text`)."""
    text_model: str | None = None
    """Folder or name of the model for texts; left out, the one that comes with the extra."""
    from_run: str | None = None
    """Directory of a trained run whose item vectors are taken."""
    checkpoint: str = "best"
    """Which checkpoint of that run: latest, best or the number of a step."""

    def __post_init__(self) -> None:
        if self.text_model and not self.text:
            raise ConfigError(
                f"--embeddings.text-model {self.text_model} embeds texts, and none are asked for; add "
                "--embeddings.text, or leave it out"
            )
        if self.checkpoint != "best" and not self.from_run:
            raise ConfigError(
                f"--embeddings.checkpoint {self.checkpoint} is one of a run, and none is given; add "
                "--embeddings.from-run RUN, or leave it out"
            )

    @property
    def kinds(self) -> list[str]:
        """The inputs asked for, in the order they are laid side by side."""
        asked = {"file": self.file, "text": self.text, "run": self.from_run}
        return [kind for kind, value in asked.items() if value] or ["data"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions(EmbeddingSources):
    """Where item vectors come from (without a source, the data set's own), and how several become one."""

    width: int | None = None
    """Reduce each input to so many main axes; left out, one input stays as it is and several get at most 64."""
    weights: tuple[float, ...] = ()
    """Of several inputs, in the order file, text, run; left out, all weigh the same."""
    whiten: bool = True
    """Give every kept axis of a reduced input the same variance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.whiten and self.width is None and len(self.kinds) == 1:
            raise ConfigError(
                "--embeddings.no-whiten is for inputs that are reduced, and a single one stays as it is; add "
                "--embeddings.width, or leave it out"
            )

    def weights_of(self, num_inputs: int) -> tuple[float, ...]:
        """Raises: ConfigError unless there is a weight for each input, or none at all."""
        if self.weights and (len(self.weights) != num_inputs or min(self.weights) <= 0):
            raise ConfigError(
                f"--embeddings.weights must be one positive number for each of {num_inputs} inputs, got "
                f"{self.weights}"
            )
        return self.weights or (1.0,) * num_inputs


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is tokenized."""

    vectors: "Matrix"
    kinds: list[str]
    fusion: "Fusion | None"


def load_inputs(options: EmbeddingOptions, items: "ItemTable", *, data: str, out: str) -> Inputs:
    """Find or make the matrices, and fuse them; those that are made are kept in the folder `out`.

    Raises: ConfigError where nothing can be embedded; DataError for matrices that do not fit the catalogue.
    """
    from data_streams.item_vectors import FusedVectors, Fusion

    weights = options.weights_of(len(options.kinds))
    matrices = load_matrices(options, items, data=data, out=out)
    if len(matrices) == 1 and options.width is None:
        return Inputs(vectors=matrices[0], kinds=options.kinds, fusion=None)
    widths = [
        min(FUSED_WIDTH, matrix.shape[1]) if options.width is None else options.width for matrix in matrices
    ]
    fusion = Fusion.fit(matrices, widths=widths, weights=weights, whiten=options.whiten)
    return Inputs(vectors=FusedVectors(fusion, matrices), kinds=options.kinds, fusion=fusion)


def load_matrices(sources: EmbeddingSources, items: "ItemTable", *, data: str, out: str) -> list[Any]:
    """One matrix for each of the inputs asked for."""
    return [_matrix(kind, sources, items, data, out) for kind in sources.kinds]


def _matrix(kind: str, options: EmbeddingSources, items: "ItemTable", data: str, out: str) -> Any:
    from data_streams.item_vectors import read_matrix, require_shape
    from data_streams.text_embeddings import embed_texts, item_texts, read_item_frame

    if kind == "file":
        return read_matrix(options.file, items.num_items)
    if kind == "text":
        path = local_file(f"{out}/{TEXT_VECTORS}", "--out")
        return embed_texts(item_texts(read_item_frame(data)), path, model=options.text_model)
    if kind == "run":
        path = write_run_vectors(options.from_run, options.checkpoint, items, data, f"{out}/{RUN_VECTORS}")
        return read_matrix(path, items.num_items)
    if items.embeddings is None:
        raise ConfigError(
            f"{data} has no item embeddings of its own; name some: --embeddings.file M.npy, --embeddings.text "
            "or --embeddings.from-run RUN"
        )
    require_shape(items.embeddings, items.num_items, f"the item embeddings of {data}")
    return items.embeddings


def write_run_vectors(run: str, checkpoint: str, items: "ItemTable", data: str, out: str) -> str:
    """Write the item vectors of a run's checkpoint to the .npy file `out`; started on the run's workers.

    Raises: DataError when the run was trained on another catalogue; ConfigError where hosts do not share the folder.
    """
    import numpy as np

    from cluster.workers import run_workers
    from launch.jobs import part_file
    from launch.run_directory import load_config
    from launch.served_run import find_step

    config = load_config(run)
    require_run_of(config.run_dir, items, data)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=absolute(data)))
    out = local_file(out, "--out")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    parts = [f"{part_file(out, rank)}.npy" for rank in range(config.cluster.workers)]
    try:
        run_workers(
            *(item_vectors_job, config, find_step(config, checkpoint), out),
            config=config.cluster,
            run_dir=config.run_dir,
        )
        matrices = [
            np.load(part, mmap_mode="r", allow_pickle=False) for part in parts if os.path.exists(part)
        ]
        _require_all(matrices, items.num_items, out)
        _join(matrices, out)
    finally:
        for part in parts:
            Path(part).unlink(missing_ok=True)
    return out


def item_vectors_job(
    process: "Process", config: "PretrainConfig", step: int, out: str, reporter: "Reporter"
) -> None:
    """Write the vectors of this rank's items to `out`.part-RANK.npy."""
    import numpy as np
    import torch

    from launch.jobs import part_file
    from models.node_scorer import NodeScorer
    from models.recommender import Retriever
    from sharding.item_index import LOOKUP_ROWS, evaluating
    from trainer.assembly import assemble
    from trainer.checkpoint_reader import CheckpointReader
    from trainer.configuration import CHECKPOINTS
    from trainer.run_state import load_weights

    assembly = assemble(config, process)
    model = assembly.model
    if not isinstance(model, Retriever | NodeScorer):
        raise ConfigError(f"{config.run_dir} holds a {type(model).__name__}, which has no item vectors")
    load_weights(CheckpointReader(Storage(f"{config.run_dir}/{CHECKPOINTS}"), step), assembly)
    lookup, num_items = assembly.lookup(), assembly.items.num_items
    per_rank = -(-num_items // process.world_size)
    start, stop = (min((process.rank + end) * per_rank, num_items) for end in (0, 1))
    found = []
    with evaluating(model):
        # Every rank looks up as often as the others: some have fewer items.
        for first in range(0, per_rank, LOOKUP_ROWS):
            last = min(first + LOOKUP_ROWS, per_rank)
            ids = model.item_ids(torch.arange(min(start + first, stop), min(start + last, stop)))
            found.append(model.item_vectors(lookup(ids)[next(iter(ids))]).float().cpu())
    np.save(f"{part_file(out, process.rank)}.npy", torch.cat(found).numpy())


def _require_all(matrices: list[Any], wanted: int, out: str) -> None:
    """Raises: ConfigError where parts of other hosts are not to be seen here."""
    found = sum(map(len, matrices))
    if found != wanted:
        raise ConfigError(
            f"--out must lie in a folder that all hosts share: workers wrote the vectors of {wanted:,} items beside "
            f"{out}, and {found:,} of them are there; name another folder"
        )


def _join(matrices: list[Any], out: str) -> None:
    """Write the rows of all of them to the .npy file `out`, which is there entirely or as it was."""
    import numpy as np

    rows, width = sum(len(matrix) for matrix in matrices), matrices[0].shape[1]
    with renamed_at_end(out) as temporary:
        joined = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(rows, width))
        start = 0
        for matrix in matrices:
            joined[start : start + len(matrix)] = matrix
            start += len(matrix)
        joined.flush()


def require_run_of(run_dir: str, items: "ItemTable", data: str) -> None:
    import io

    import polars as pl

    from data_streams.item_table import ITEMS_NAME, catalogue_fingerprint

    storage = Storage(run_dir)
    if not storage.exists(ITEMS_NAME):
        return
    known = pl.read_parquet(io.BytesIO(storage.read(ITEMS_NAME)), columns=["item_id"])["item_id"]
    if catalogue_fingerprint(known) != items.fingerprint:
        raise DataError(
            f"{run_dir} was trained on a catalogue of {len(known)} items, and {data} has another one of "
            f"{items.num_items}; give the data set of the run"
        )
