"""Amazon product reviews of 2014, 2018 and 2023 as the McAuley lab publishes them (gzipped or plain JSON lines).

--path names a folder that holds the reviews of one or more categories, and their metadata where titles, categories,
brands and prices are wanted:

- 2014: reviews_Beauty_5.json.gz (5-core) or reviews_Beauty.json.gz, and meta_Beauty.json.gz
- 2018: All_Beauty_5.json.gz or All_Beauty.json.gz, and meta_All_Beauty.json.gz
- 2023: All_Beauty.jsonl.gz and meta_All_Beauty.jsonl.gz

Files named meta_* are metadata, all other .json and .jsonl files are reviews; give the 5-core or the whole file
of a category, not both. The year is told by the fields of the first line. Every review is an event of the action
`review` with its rating in the event column `stars`. An item of 2023 is the `parent_asin`, as its authors advise.
Items without metadata are called by their ids. The metadata name many more items than were reviewed;
--min-item-events 1 leaves those out of the catalogue.
"""

import ast
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from cluster.errors import DataError
from data_streams import schema
from data_streams.origins import Origin, OriginFile
from data_streams.raw_files import RawFiles, in_batches
from data_streams.sources import Part, Source

logger = logging.getLogger(__name__)

LAB = "https://mcauleylab.ucsd.edu/public_datasets/data"
CATEGORIES = {
    "2014": "Amazon_Instant_Video Apps_for_Android Automotive Baby Beauty Books CDs_and_Vinyl "
    "Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics Grocery_and_Gourmet_Food "
    "Health_and_Personal_Care Home_and_Kitchen Kindle_Store Movies_and_TV Musical_Instruments Office_Products "
    "Patio_Lawn_and_Garden Pet_Supplies Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Video_Games",
    "2018": "AMAZON_FASHION All_Beauty Appliances Arts_Crafts_and_Sewing Automotive Books CDs_and_Vinyl "
    "Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics Gift_Cards "
    "Grocery_and_Gourmet_Food Home_and_Kitchen Industrial_and_Scientific Kindle_Store Luxury_Beauty "
    "Magazine_Subscriptions Movies_and_TV Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies "
    "Prime_Pantry Software Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Video_Games",
    "2023": "All_Beauty Amazon_Fashion Appliances Arts_Crafts_and_Sewing Automotive Baby_Products "
    "Beauty_and_Personal_Care Books CDs_and_Vinyl Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry "
    "Digital_Music Electronics Gift_Cards Grocery_and_Gourmet_Food Handmade_Products Health_and_Household "
    "Health_and_Personal_Care Home_and_Kitchen Industrial_and_Scientific Kindle_Store Magazine_Subscriptions "
    "Movies_and_TV Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies Software "
    "Sports_and_Outdoors Subscription_Boxes Tools_and_Home_Improvement Toys_and_Games Unknown Video_Games",
}
HOMES = {
    "2014": "https://jmcauley.ucsd.edu/data/amazon/links.html",
    "2018": "https://nijianmo.github.io/amazon/",
    "2023": "https://amazon-reviews-2023.github.io/",
}
ADDRESSES = {
    "2014": (
        "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/reviews_{}_5.json.gz",
        "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/meta_{}.json.gz",
    ),
    "2018": (
        f"{LAB}/amazon_v2/categoryFilesSmall/{{}}_5.json.gz",
        f"{LAB}/amazon_v2/metaFiles2/meta_{{}}.json.gz",
    ),
    "2023": (
        f"{LAB}/amazon_2023/raw/review_categories/{{}}.jsonl.gz",
        f"{LAB}/amazon_2023/raw/meta_categories/meta_{{}}.jsonl.gz",
    ),
}
ORIGINS = tuple(
    Origin(
        name=f"amazon-{year}-{category.lower().replace('_', '-')}",
        home=HOMES[year],
        files=tuple(OriginFile(address=address.format(category)) for address in ADDRESSES[year]),
    )
    for year, categories in CATEGORIES.items()
    for category in categories.split()
)

BYTES_PER_REVIEW = 700
BROKEN_TITLE = "getTime"
"""Found in titles of 2018 that hold a script of the page instead of a title."""

PRICE = r"^\s*(?:from\s+)?\$?\s*((?:\d[\d,]*)?\.?\d+)"
"""The number of a price, the lower one of a range; some of 2018 hold a style sheet of the page instead."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """Names of the fields of one year."""

    year: str
    user: str
    item: str
    stars: str
    time: str
    time_unit: str

    @property
    def types(self) -> dict[str, pl.DataType]:
        return {self.user: pl.String, self.item: pl.String, self.stars: pl.Float64, self.time: pl.Int64}


OLD_FIELDS = {
    "user": "reviewerID",
    "item": "asin",
    "stars": "overall",
    "time": "unixReviewTime",
    "time_unit": "s",
}
RELEASES = (
    Release(
        year="2023", user="user_id", item="parent_asin", stars="rating", time="timestamp", time_unit="ms"
    ),
    Release(year="2014", **OLD_FIELDS),
    Release(year="2018", **OLD_FIELDS),
)


class AmazonReviewsSource(Source):
    """One review, one event."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        path: str
        """Folder of the official files (or one file of reviews)."""
        min_stars: float = 0.0
        """Reviews with fewer stars are left out."""

        def build(self) -> "AmazonReviewsSource":
            return AmazonReviewsSource(self)

    def __init__(self, config: Config):
        self.config = config
        self.files = RawFiles(config.path)
        self.metadata = self.files.find("meta_*.json*")
        reviews = self.files.require("*.json", "*.json.gz", "*.jsonl", "*.jsonl.gz")
        self.reviews = [name for name in reviews if name not in self.metadata]
        self._check_reviews()
        self.releases = {name: self._release(name) for name in self.reviews}
        self._has_milliseconds = any(release.time_unit == "ms" for release in self.releases.values())
        for name, release in self.releases.items():
            logger.info("%s holds reviews of the %s release", name or config.path, release.year)

    def _check_reviews(self) -> None:
        stems = [name.partition(".json")[0].removesuffix("_5") for name in self.reviews]
        twice = sorted({stem for stem in stems if stems.count(stem) > 1})
        if twice or not self.reviews:
            what = f"those of {twice[0]} more than once" if twice else "metadata only"
            raise DataError(
                f"{self.config.path} must hold the reviews of each category once, but holds {what}; "
                "keep either the 5-core or the whole file"
            )

    def _release(self, name: str) -> Release:
        line = self.files.first_line(name)
        try:
            fields = json.loads(line).keys()
        except (ValueError, AttributeError) as error:
            raise DataError(
                f"{self.config.path}/{name} must hold one JSON object in each line, but its first is "
                f"{line[:60]!r}; fetch it again"
            ) from error
        fitting = [release for release in RELEASES if release.types.keys() <= fields]
        if not fitting:
            raise DataError(
                f"{self.config.path}/{name} must have the fields of a release, "
                f"{' or '.join(', '.join(release.types) for release in RELEASES[:2])}; it has {', '.join(fields)}"
            )
        # Only the reviews of 2018 say whether a purchase was verified; else 2014 and 2018 are alike.
        return fitting[-1] if "verified" in fields else fitting[0]

    def describe(self) -> Mapping[str, Any]:
        years = sorted({release.year for release in self.releases.values()})
        return {"name": "amazon-reviews", "releases": years, **asdict(self.config)}

    def parts(self) -> list[Part]:
        return [part for name in self.reviews for part in self.files.parts(name)]

    def estimate_num_events(self) -> int:
        return sum(self.files.num_bytes(name) for name in self.reviews) // BYTES_PER_REVIEW

    def read(self, part: Part) -> Iterator[pl.DataFrame]:
        release = self.releases[part.name]
        yield from in_batches(self._events(block, release, part.name) for block in self.files.blocks(part))

    def _events(self, block: bytes, release: Release, name: str) -> pl.DataFrame:
        rows = self._parse(block, release.types, name)
        stars, milliseconds = pl.col(release.stars), 1 if release.time_unit == "ms" else 1_000
        rows = rows.filter(stars.is_null() | (stars >= self.config.min_stars))
        return schema.normalise_events(
            rows.with_columns(
                stars=stars.round().cast(pl.Int64),
                action=pl.lit("review"),
                time_ms=pl.col(release.time) * milliseconds,
            ),
            {
                "user_id": release.user,
                "item_id": release.item,
                "timestamp_s": release.time,
                "action": "action",
            },
            time_unit=release.time_unit,
            order_column="time_ms" if self._has_milliseconds else None,
            feature_columns=("stars",),
        )

    def _parse(self, block: bytes, types: Mapping[str, pl.DataType], name: str) -> pl.DataFrame:
        try:
            return pl.read_ndjson(block, schema=dict(types))
        except pl.exceptions.PolarsError as error:
            raise DataError(
                f"{self.config.path}/{name} must hold one JSON object in each line ({error}); fetch it again"
            ) from error

    def items(self) -> pl.DataFrame | None:
        """Title, categories, brand (the store, in 2023) and price of every item of the metadata files."""
        if not self.metadata:
            return None
        frames = [frame for name in self.metadata for frame in self._metadata(name)]
        if not frames:
            raise DataError(
                f"the metadata of {self.config.path} must hold one dictionary in each line, but "
                f"{', '.join(self.metadata)} is empty; fetch it again, or remove it to call items by their ids"
            )
        table = pl.concat(frames)
        table = table.unique("item_id", keep="first", maintain_order=True)
        return schema.normalise_items(
            table,
            f"the metadata of {self.config.path}",
            item_column="item_id",
            title_column="title",
            categories_column="categories",
        )

    def takes_items_of_events(self) -> bool:
        """Some reviewed items have no metadata."""
        return True

    def _metadata(self, name: str) -> Iterator[pl.DataFrame]:
        is_literal = self.files.first_line(name).startswith(b"{'")
        for block in self.files.blocks(Part(name=name)):
            if is_literal:
                rows = _literal_rows(block, f"{self.config.path}/{name}")
            else:
                rows = self._parse(block, METADATA_TYPES, name)
            yield rows.select(
                item_id=pl.coalesce("parent_asin", "asin"),
                title=pl.when(pl.col("title").str.contains(BROKEN_TITLE, literal=True))
                .then(None)
                .otherwise(pl.col("title")),
                categories=pl.coalesce("categories", "category"),
                brand=pl.coalesce("brand", "store"),
                price=pl.col("price").str.extract(PRICE).str.replace_all(",", "").cast(pl.Float64),
            ).drop_nulls("item_id")


METADATA_TYPES = {
    "parent_asin": pl.String,
    "asin": pl.String,
    "title": pl.String,
    "categories": pl.List(pl.String),
    "category": pl.List(pl.String),
    "brand": pl.String,
    "store": pl.String,
    "price": pl.String,
}


def _literal_rows(block: bytes, where: str) -> pl.DataFrame:
    """Metadata of 2014: lines that are Python literals, whose categories are paths."""
    columns: dict[str, list] = {name: [] for name in METADATA_TYPES}
    # Text would also be split at characters that a title can hold.
    for line in filter(None, block.splitlines()):
        try:
            values = ast.literal_eval(line.decode("utf-8"))
        except (ValueError, SyntaxError) as error:
            raise DataError(f"{where} must hold one dictionary in each line, not {line[:60]!r}") from error
        paths = values.get("categories") or []
        values["categories"] = [name for path in paths for name in path]
        values["price"] = str(values["price"]) if "price" in values else None
        for name, column in columns.items():
            column.append(values.get(name))
    return pl.DataFrame(columns, schema=METADATA_TYPES)
