"""How good semantic IDs are: collisions, use of codes, reconstruction and what prefixes say about categories."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from cluster.errors import DataError
from cluster.storage import Storage
from data_streams.semantic_ids import SemanticIdTable

REPORT_NAME = "report.json"
PLOT_NAME = "report.png"
WANTED_USAGE = 0.8

_COMMON_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class SemanticIdReport:
    """Shares and rates are 0..1; per-level numbers are lists over the L levels of the tokenizer."""

    name: str
    """What the column of the table is called."""
    fingerprint: str
    num_items: int
    code_sizes: list[int]
    """Of all levels, an extra one included."""
    extra_level: bool
    """Whether the last level only tells items of one path apart; the numbers below are without it."""
    collision_rate: float
    """Items that share their path with another item."""
    unique_rate: float
    """Distinct paths over items."""
    mean_group: float
    """Items per path that is used."""
    max_group: int
    usage: list[float]
    """Codes of the level that are used at all."""
    entropy: list[float]
    """Of the level's codes, in nats; at most log(code size)."""
    remaining_collision_rate: float
    """Items whose complete path, with the extra level, is not theirs alone."""
    reconstruction_error: float | None = None
    """Squared error of the decoded vectors over their variance; None where there is no tokenizer."""
    purity: list[float] | None = None
    """Items whose category is the most frequent one of their prefix, for prefixes of 1, 2, ... codes."""
    random_purity: list[float] | None = None
    """The same with the categories shuffled, since small groups are pure by chance."""

    @property
    def usage_met(self) -> bool:
        """Whether every level uses the 80 % of its codes that published systems ask for."""
        return min(self.usage) >= WANTED_USAGE

    def save(self, storage: Storage) -> None:
        storage.write(REPORT_NAME, json.dumps(asdict(self), indent=1).encode())

    @staticmethod
    def load(storage: Storage) -> "SemanticIdReport":
        """Raises: DataError where a folder holds no report."""
        try:
            return SemanticIdReport(**json.loads(storage.read(REPORT_NAME)))
        except (FileNotFoundError, TypeError, ValueError) as error:
            raise DataError(
                f"{storage.root} must hold the {REPORT_NAME} of a semantic ID table ({error}); make it with "
                "`grail tokenize`"
            ) from error


def measure(
    table: SemanticIdTable,
    *,
    name: str,
    extra_level: bool = False,
    categories: np.ndarray | None = None,
    reconstruction_error: float | None = None,
) -> SemanticIdReport:
    """Shapes: categories [N] int, -1 for items without one."""
    codes = table.codes[:, :-1] if extra_level else table.codes
    groups = _groups(codes)
    sizes = np.bincount(groups)
    counts = [
        np.bincount(codes[:, level], minlength=table.code_sizes[level]) for level in range(codes.shape[1])
    ]
    purities = (None, None) if categories is None else _purities(codes, categories)
    return SemanticIdReport(
        name=name,
        fingerprint=table.fingerprint,
        num_items=table.num_items,
        code_sizes=list(table.code_sizes),
        extra_level=extra_level,
        collision_rate=float((sizes[groups] > 1).mean()),
        unique_rate=len(sizes) / table.num_items,
        mean_group=table.num_items / len(sizes),
        max_group=int(sizes.max()),
        usage=[float((count > 0).mean()) for count in counts],
        entropy=[_entropy(count) for count in counts],
        remaining_collision_rate=float((np.bincount(full := _groups(table.codes))[full] > 1).mean()),
        reconstruction_error=reconstruction_error,
        purity=purities[0],
        random_purity=purities[1],
    )


def category_codes(categories: pl.Series, level: int | None = None) -> np.ndarray | None:
    """A number for each item's category at one place of its list, -1 for items that have none there.

    Left out, `level` is the first place at which no name covers 90 % of the items that have one there (the first name
    is often that of the whole shop); None is returned where there is no such place.

    Shapes: categories [N] lists of text -> [N] int32.
    """
    deepest = int(categories.list.len().max() or 0)
    places = range(deepest) if level is None else [level]
    for place in places:
        names = categories.list.get(place, null_on_oob=True)
        known = names.drop_nulls()
        if not len(known):
            return None
        largest = known.value_counts()["count"].max()
        if level is not None or largest < _COMMON_SHARE * len(known):
            ranked = names.rank("dense").cast(pl.Int32) - 1
            return ranked.fill_null(-1).to_numpy()
    return None


def render(reports: Sequence[SemanticIdReport]) -> Table:
    """One column per table."""
    table = Table(title="semantic IDs")
    table.add_column("")
    for report in reports:
        table.add_column(f"{escape(report.name)}\n[dim]{report.fingerprint}", justify="right")
    for label, cells in _lines(reports).items():
        table.add_row(label, *cells)
    return table


def plot(reports: Sequence[SemanticIdReport]) -> bytes:
    """Collisions, code entropy and prefix agreement side by side, as PNG."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    collisions, entropy, purity = figure.subplots(1, 3)
    _draw_collisions(collisions, reports)
    for report in reports:
        levels = np.arange(1, len(report.usage) + 1)
        even = [
            value / np.log(max(size, 2))
            for value, size in zip(report.entropy, report.code_sizes, strict=False)
        ]
        entropy.plot(levels, even, marker="o", label=report.name)
        if report.purity is not None:
            (line,) = purity.plot(levels, report.purity, marker="o", label=report.name)
            purity.plot(levels, report.random_purity, linestyle=":", color=line.get_color())
    entropy.set(xlabel="level", title="entropy of the codes over that of even use", ylim=(0, 1.05))
    purity.set(xlabel="codes in the prefix", title="category purity (dotted: shuffled)", ylim=(0, 1.05))
    longest = max(len(report.usage) for report in reports)
    for axes in (entropy, purity):
        axes.set_xticks(range(1, longest + 1))
        axes.grid(alpha=0.3)
    entropy.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _draw_collisions(axes: Axes, reports: Sequence[SemanticIdReport]) -> None:
    # By place and not by name: bars of one name would lie upon each other.
    places = range(len(reports))
    axes.barh(places, [100 * report.collision_rate for report in reports], color="tab:orange")
    axes.set_yticks(places, [report.name for report in reports])
    axes.set(xlabel="items that share a path, %", title="collisions")
    axes.invert_yaxis()


def _groups(codes: np.ndarray) -> np.ndarray:
    """A number for each distinct path. Shapes: [N, l] -> [N]."""
    return np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _purities(codes: np.ndarray, categories: np.ndarray) -> tuple[list[float], list[float]]:
    known = categories >= 0
    codes, categories = codes[known], categories[known]
    shuffled = np.random.default_rng(0).permutation(categories)
    groups = [_groups(codes[:, : depth + 1]) for depth in range(codes.shape[1])]
    return [_purity(group, categories) for group in groups], [_purity(group, shuffled) for group in groups]


def _purity(groups: np.ndarray, categories: np.ndarray) -> float:
    pairs = pl.DataFrame({"group": groups, "category": categories}).group_by("group", "category").len()
    return float(pairs.group_by("group").agg(pl.col("len").max())["len"].sum() / len(groups))


def _lines(reports: Sequence[SemanticIdReport]) -> Mapping[str, list[str]]:
    def each(written) -> list[str]:
        return [written(report) for report in reports]

    return {
        "items": each(lambda report: f"{report.num_items:,}"),
        "codes": each(lambda report: " x ".join(map(str, report.code_sizes))),
        "last level only tells apart": each(lambda report: "yes" if report.extra_level else "no"),
        "items that share a path": each(lambda report: f"{report.collision_rate:.2%}"),
        "... with the extra level": each(lambda report: f"{report.remaining_collision_rate:.2%}"),
        "distinct paths / items": each(lambda report: f"{report.unique_rate:.2%}"),
        "items per path, mean": each(lambda report: f"{report.mean_group:.3f}"),
        "items per path, largest": each(lambda report: f"{report.max_group:,}"),
        "codes used": each(lambda report: _shares(report.usage)),
        f"at least {WANTED_USAGE:.0%} used": each(
            lambda report: "met" if report.usage_met else "[bold red]NOT MET"
        ),
        "entropy, nats": each(lambda report: " ".join(f"{value:.2f}" for value in report.entropy)),
        "reconstruction error": each(
            lambda report: (
                "-" if report.reconstruction_error is None else f"{report.reconstruction_error:.4f}"
            )
        ),
        "category purity of prefixes": each(lambda report: _shares(report.purity)),
        "... of shuffled categories": each(lambda report: _shares(report.random_purity)),
    }


def _shares(values: Sequence[float] | None) -> str:
    return "-" if values is None else " ".join(f"{value:.3f}" for value in values)
