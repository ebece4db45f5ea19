"""MovieLens 100K, 1M, 20M, 25M and 32M as GroupLens publishes them, from the .zip or the unpacked folder.

--path names the official .zip (ml-100k.zip, ml-1m.zip, ml-20m.zip, ml-25m.zip, ml-32m.zip) or the folder it unpacks
to. What is read of it:

- 100K: u.data (ratings), u.item (titles, genres), u.genre (their names), u.user (age, gender, occupation, zip)
- 1M: ratings.dat, movies.dat, users.dat
- 20M and later: ratings.csv, movies.csv

Every rating is an event of the action `rating`; its stars are kept as the event column `half_stars`, twice the
rating, since later releases rate by halves. Events of one second stay in the order of the file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from cluster.errors import DataError
from data_streams import schema
from data_streams.origins import Origin, OriginFile
from data_streams.raw_files import RawFiles, in_batches, parse_csv, read_table, require_columns
from data_streams.sources import Part, Source

ADDRESS = "https://files.grouplens.org/datasets/movielens"
ORIGINS = tuple(
    Origin(
        name=name,
        home=f"https://grouplens.org/datasets/movielens/{name.removeprefix('ml-')}/",
        files=(OriginFile(address=f"{ADDRESS}/{name}.zip", checksum_address=f"{ADDRESS}/{name}.zip.md5"),),
    )
    for name in ("ml-100k", "ml-1m", "ml-20m", "ml-25m", "ml-32m")
)
RATINGS = ("u.data", "ratings.dat", "ratings.csv")
BYTES_PER_RATING = {"u.data": 20, "ratings.dat": 25, "ratings.csv": 27}
COLUMNS = {"user_id": pl.Int64, "item_id": pl.Int64, "stars": pl.Float64, "timestamp_s": pl.Int64}
SEPARATORS = {"u.data": "\t", "ratings.dat": ":", "ratings.csv": ","}
GENRES_FROM = 5
"""Column of u.item where the flags of the genres begin."""


class MovieLensSource(Source):
    """One rating, one event."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        path: str
        """The official .zip, or the folder it unpacks to."""
        min_stars: float = 0.0
        """Ratings of fewer stars are left out."""

        def build(self) -> "MovieLensSource":
            return MovieLensSource(self)

    def __init__(self, config: Config):
        self.config = config
        self.files = RawFiles(config.path)
        self.ratings = self.files.only(*RATINGS) or self.files.require(*RATINGS)[0]
        self.release = self.ratings.rsplit("/", 1)[-1]

    def describe(self) -> Mapping[str, Any]:
        return {"name": "movielens", **asdict(self.config)}

    def parts(self) -> list[Part]:
        header = len(self.files.first_line(self.ratings)) if self.release == "ratings.csv" else 0
        return self.files.parts(self.ratings, header)

    def estimate_num_events(self) -> int:
        return self.files.num_bytes(self.ratings) // BYTES_PER_RATING[self.release]

    def read(self, part: Part) -> Iterator[pl.DataFrame]:
        yield from in_batches(self._events(block, part) for block in self.files.blocks(part))

    def _events(self, block: bytes, part: Part) -> pl.DataFrame:
        separator, columns = SEPARATORS[self.release], dict(COLUMNS)
        if self.release == "ratings.dat":
            # The fields lie between "::"; read at single colons, there is an empty column after each.
            columns = {
                name: dtype
                for place, given in enumerate(COLUMNS.items())
                for name, dtype in (given, (f"empty_{place}", pl.String))
            }
            columns.popitem()
        rows = parse_csv(block, columns, separator=separator, where=part.name)
        rows = rows.filter(pl.col("stars").is_null() | (pl.col("stars") >= self.config.min_stars))
        return schema.normalise_events(
            rows.with_columns(
                half_stars=(pl.col("stars") * 2).round().cast(pl.Int64), action=pl.lit("rating")
            ),
            {"user_id": "user_id", "item_id": "item_id", "timestamp_s": "timestamp_s", "action": "action"},
            feature_columns=("half_stars",),
        )

    def items(self) -> pl.DataFrame:
        """With the genres as categories."""
        read = {"u.data": self._items_100k, "ratings.dat": self._items_1m, "ratings.csv": self._items_csv}
        table = read[self.release]().with_columns(
            pl.col("genres").replace(["(no genres listed)", "unknown"], [None, None])
        )
        return schema.normalise_items(
            table,
            f"the movies of {self.config.path}",
            item_column="movie_id",
            title_column="title",
            categories_column="genres",
        )

    def _items_100k(self) -> pl.DataFrame:
        rows = self._latin_rows("u.item", "|")
        names = [name for name, *_ in self._latin_rows("u.genre", "|")]
        flags = [
            [name for name, flag in zip(names, row[GENRES_FROM:], strict=False) if flag == "1"]
            for row in rows
        ]
        return _movies([(row[0], row[1], "|".join(genres)) for row, genres in zip(rows, flags, strict=True)])

    def _items_1m(self) -> pl.DataFrame:
        return _movies([tuple(row[:3]) for row in self._latin_rows("movies.dat", "::")])

    def _items_csv(self) -> pl.DataFrame:
        (name,) = self.files.require("movies.csv")
        table = read_table(self.files, name, {"movieId": pl.Int64})
        require_columns(table.columns, ["movieId", "title", "genres"], f"{self.config.path}/{name}")
        return table.select("title", "genres", movie_id="movieId")

    def users(self) -> pl.DataFrame | None:
        """Age, gender, occupation and zip of 100K and 1M; later releases have no profiles."""
        if self.release == "u.data":
            names, rows = ("user_id", "age", "gender", "occupation", "zip"), self._latin_rows("u.user", "|")
        elif self.release == "ratings.dat":
            names, rows = (
                ("user_id", "gender", "age", "occupation", "zip"),
                self._latin_rows("users.dat", "::"),
            )
        else:
            return None
        table = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")
        return schema.normalise_users(
            table.with_columns(pl.col("user_id", "age").cast(pl.Int64, strict=False)),
            f"the users of {self.config.path}",
            user_column="user_id",
        )

    def _latin_rows(self, name: str, separator: str) -> list[list[str]]:
        (found,) = self.files.require(name)
        # Text would also be split at 0x85, which is no end of a line in these files.
        lines = [line.decode("latin-1") for line in self.files.read(found).splitlines()]
        rows = [line.split(separator) for line in lines if line.strip()]
        if len({len(row) for row in rows}) > 1:
            raise DataError(f"{self.config.path}/{found} has lines of different lengths; fetch it again")
        return rows


def _movies(rows: list[tuple[str, str, str]]) -> pl.DataFrame:
    names = {"movie_id": pl.String, "title": pl.String, "genres": pl.String}
    return pl.DataFrame(rows, schema=names, orient="row").with_columns(
        pl.col("movie_id").cast(pl.Int64, strict=False)
    )
