"""What is in a data set: counts, lengths, popularity, times and a few users, printed and plotted."""

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from rich.console import Console, Group
from rich.progress import track
from rich.table import Table
from rich.text import Text

from cluster.errors import ConfigError, DataError
from cluster.storage import Storage
from data_streams.item_table import shown_title
from data_streams.shards import Chunk, Manifest, read_chunk
from data_streams.user_table import read_users

logger = logging.getLogger(__name__)

PLOT_NAME = "inspect.png"
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
MAX_TITLES = 6
DAY_S = 86_400


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a pass over all chunks found; each checksum was checked on the way."""

    manifest: Manifest
    lengths: np.ndarray
    """[U] events of each user."""
    item_counts: np.ndarray
    """[N] events of each item."""
    action_counts: Counter
    """Name of an action -> events."""
    day_counts: Counter
    """Day since 1970 -> events; empty without times."""
    num_validation: int
    num_test: int
    samples: list[tuple[str, list[str]]]
    """A few users: raw id and the titles of the latest events, oldest first, with the action of what was not chosen."""
    plot: str
    """Where the picture lies, or why there is none."""

    def render(self) -> Group:
        """Tables for the terminal; whatever comes from data is shown as it is, brackets and colons included."""
        return Group(self._overview(), self._users_table())

    def _overview(self) -> Table:
        manifest = self.manifest
        table = Table(title="data set", show_header=False)
        for name, value in (
            ("source", manifest.source.get("name", "")),
            (
                "users, items, events",
                f"{manifest.num_users:,}, {manifest.num_items:,}, {manifest.num_events:,}",
            ),
            ("events of a user", _quantiles(self.lengths)),
            ("events of an item", _quantiles(self.item_counts)),
            ("items without events", f"{int((self.item_counts == 0).sum()):,}"),
            ("actions", ", ".join(f"{name} {count:,}" for name, count in self.action_counts.most_common())),
            ("times", self._time_range()),
            ("split", _split(manifest)),
            ("held out", f"{self.num_validation:,} users for validation, {self.num_test:,} for test"),
            ("columns", ", ".join(f"{name} {dtype}" for name, dtype in manifest.columns.items())),
            ("item embeddings", _embedding(manifest)),
            ("chunks", f"{len(manifest.chunks):,}, {_chunk_sizes(manifest)}; all checksums right"),
            ("left out by the build", _counters(manifest)),
            ("picture", self.plot),
        ):
            table.add_row(name, Text(value))
        return table

    def _users_table(self) -> Table:
        table = Table(title="some users, latest events last", show_lines=True)
        table.add_column("user", overflow="fold")
        table.add_column("events", overflow="fold")
        for user, titles in self.samples:
            table.add_row(Text(user), Text("\n".join(titles)))
        return table

    def _time_range(self) -> str:
        if not self.day_counts:
            return "none"
        first, last = (np.datetime64(day, "D") for day in (min(self.day_counts), max(self.day_counts)))
        return f"{first} to {last}"


def inspect(path: str, num_samples: int = 3) -> Report:
    """Read all of a data set, check every checksum, and plot it to DIR/inspect.png.

    Raises: DataError for whatever is missing, damaged or does not fit together; ConfigError for less than no samples.
    """
    if num_samples < 0:
        raise ConfigError(f"--samples must be at least 0, given {num_samples}")
    storage = Storage(path)
    manifest = Manifest.load(storage)
    items = _checked_items(storage, manifest)
    tally = _Tally(manifest, items["title"], num_samples)
    for record in track(manifest.chunks, description="reading chunks"):
        tally.add(read_chunk(storage, record, manifest=manifest))
    _check_embeddings(storage, manifest)
    users = _first_users(storage, num_samples)
    report = Report(
        manifest=manifest,
        lengths=np.concatenate(tally.lengths),
        item_counts=tally.item_counts,
        action_counts=tally.action_counts,
        day_counts=tally.day_counts,
        num_validation=tally.num_validation,
        num_test=tally.num_test,
        samples=[(users.get(row, str(row)), titles) for row, titles in tally.samples],
        plot="",
    )
    _check_counts(report, storage.root)
    return replace(report, plot=_write_plot(storage, _plot(report)))


def _write_plot(storage: Storage, picture: bytes) -> str:
    """A data set that others share may be one that nobody here may write to."""
    try:
        storage.write(PLOT_NAME, picture)
    except OSError as error:
        return f"none: {storage.root} cannot be written to ({error.strerror})"
    return storage.path(PLOT_NAME)


def print_report(report: Report) -> None:
    Console().print(report.render())


class _Tally:
    """Sums over chunks."""

    def __init__(self, manifest: Manifest, titles: pl.Series, num_samples: int):
        self.manifest, self.titles, self.num_samples = manifest, titles, num_samples
        self.lengths: list[np.ndarray] = []
        self.item_counts = np.zeros(manifest.num_items, dtype=np.int64)
        self.action_counts, self.day_counts = Counter(), Counter()
        self.num_validation = self.num_test = 0
        self.samples: list[tuple[int, list[str]]] = []

    def add(self, chunk: Chunk) -> None:
        self.lengths.append(chunk.lengths)
        self.item_counts += np.bincount(chunk.items, minlength=self.manifest.num_items)
        self.num_validation += int((chunk.valid_at >= 0).sum())
        self.num_test += int((chunk.test_at >= 0).sum())
        if "action" in chunk.columns:
            self._count(self.action_counts, chunk.columns["action"], lambda code: self.manifest.actions[code])
        if "timestamp_s" in chunk.columns:
            self._count(self.day_counts, chunk.columns["timestamp_s"] // DAY_S, int)
        for user in range(min(self.num_samples - len(self.samples), chunk.num_users)):
            self.samples.append((int(chunk.users[user]), self._latest(chunk, user)))

    def _latest(self, chunk: Chunk, user: int) -> list[str]:
        """Titles of a user's latest events; what lies beside the sequence is called by its action."""
        stop = int(chunk.offsets[user + 1])
        start = max(int(chunk.offsets[user]), stop - MAX_TITLES)
        titles = [shown_title(title) for title in self.titles[chunk.items[start:stop].tolist()]]
        if "action" not in chunk.columns:
            return titles
        names = {code: f" ({self.manifest.actions[code]})" for code in self.manifest.beside_codes()}
        actions = chunk.columns["action"][start:stop].tolist()
        return [title + names.get(action, "") for title, action in zip(titles, actions, strict=True)]

    @staticmethod
    def _count(counts: Counter, values: np.ndarray, name: Callable[[int], object]) -> None:
        for value, number in zip(*np.unique(values, return_counts=True), strict=True):
            counts[name(value)] += int(number)


def _checked_items(storage: Storage, manifest: Manifest) -> pl.DataFrame:
    try:
        data = storage.read("items.parquet")
    except FileNotFoundError as error:
        raise DataError(f"{storage.path('items.parquet')} is missing; build the data set again") from error
    if hashlib.sha256(data).hexdigest() != manifest.catalogue_sha256:
        raise DataError(
            f"the checksum of {storage.path('items.parquet')} is not that of the manifest; "
            "build the data set again"
        )
    return pl.read_parquet(io.BytesIO(data), columns=["item_id", "title"])


def _check_embeddings(storage: Storage, manifest: Manifest) -> None:
    """The header of the matrix must agree with the manifest; the numbers were checked by the build."""
    embedding = manifest.embedding
    if embedding is None:
        return
    path = storage.path(embedding["file"])
    try:
        with storage.filesystem.open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(file)
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{path} is missing or no NumPy file ({error}); build the data set again") from error
    expected = (manifest.num_items, embedding["dim"])
    if shape != expected or str(dtype) != embedding["dtype"]:
        raise DataError(
            f"{path} must be a {embedding['dtype']} matrix {expected}, found {dtype} {shape}; "
            "build the data set again"
        )


def _first_users(storage: Storage, count: int) -> dict[int, str]:
    users = read_users(storage, ["user_id"], num_rows=count)
    return {} if users is None else dict(enumerate(users["user_id"].cast(pl.String)))


def _check_counts(report: Report, root: str) -> None:
    manifest = report.manifest
    found = (len(report.lengths), int(report.lengths.sum()), len(report.item_counts))
    stated = (manifest.num_users, manifest.num_events, manifest.num_items)
    if found != stated:
        raise DataError(
            f"{root} must hold what its manifest states: {stated} users, events and items are stated, "
            f"{found} were found; build the data set again"
        )


def _quantiles(values: np.ndarray) -> str:
    levels = np.quantile(values, QUANTILES).tolist()
    words = [f"{int(100 * share)} %: {level:,.0f}" for share, level in zip(QUANTILES, levels, strict=True)]
    return f"mean {values.mean():,.1f}; {', '.join(words)}"


def _split(manifest: Manifest) -> str:
    words = {name.replace("_", " "): value for name, value in manifest.split.items() if value is not None}
    name = words.pop("name", "none")
    shown = (
        f"{key}: {', '.join(value) if isinstance(value, list) else value}" for key, value in words.items()
    )
    return "; ".join([str(name), *shown])


def _embedding(manifest: Manifest) -> str:
    embedding = manifest.embedding
    return "none" if embedding is None else f"{embedding['dim']} dimensions, {embedding['dtype']}"


def _chunk_sizes(manifest: Manifest) -> str:
    sizes = np.array([record.stop - record.start for record in manifest.chunks]) / 2**10
    users = np.array([record.num_users for record in manifest.chunks])
    return f"{users.mean():,.0f} users and {sizes.mean():,.0f} KiB on average, largest {sizes.max():,.0f} KiB"


def _counters(manifest: Manifest) -> str:
    left_out = {name: count for name, count in manifest.counters.items() if name != "events read"}
    return ", ".join(f"{count:,} {name}" for name, count in left_out.items()) or "nothing"


def _plot(report: Report) -> bytes:
    panels = 3 if report.day_counts else 2
    figure = Figure(figsize=(5 * panels, 3.6), layout="constrained")
    axes = figure.subplots(1, panels)
    longest = max(int(report.lengths.max()), 1)
    axes[0].hist(
        report.lengths, bins=np.geomspace(max(report.lengths.min(), 1), longest + 1, 30), color="tab:blue"
    )
    axes[0].set(xscale="log", xlabel="events of a user", ylabel="users", title="history lengths")
    counts = np.sort(report.item_counts)[::-1]
    axes[1].plot(np.arange(1, len(counts) + 1), np.maximum(counts, 0.5), color="tab:orange")
    axes[1].set(
        xscale="log", yscale="log", xlabel="rank of the item", ylabel="events", title="item popularity"
    )
    if report.day_counts:
        days = sorted(report.day_counts)
        axes[2].plot(
            np.array(days, dtype="datetime64[D]"), [report.day_counts[day] for day in days], color="tab:green"
        )
        axes[2].set(xlabel="day", ylabel="events", title="events over time")
        axes[2].tick_params(axis="x", rotation=30)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
