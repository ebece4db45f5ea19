"""Amazon reviews of 2014, 2018 and 2023, from small files in their formats."""

import json

import polars as pl
import pytest

from cluster.errors import DataError
from data_streams.build import BuildConfig, build
from data_streams.sources.amazon_reviews import AmazonReviewsSource
from tests.data_streams.official_files import gzipped, read, write
from tests.data_streams.test_build import read_users


def review(user, item, stars, time, **more):
    return json.dumps(
        {
            "reviewerID": user,
            "asin": item,
            "overall": stars,
            "unixReviewTime": time,
            "reviewText": "x",
            **more,
        }
    )


def test_amazon_2014_has_metadata_of_python_literals(tmp_path):
    folder = write(
        tmp_path,
        {
            "reviews_Beauty_5.json.gz": gzipped(
                [review("A1", "B01", 5.0, 1400000000, helpful=[0, 0]), review("A2", "B02", 1.0, 1400086400)]
            ),
            "meta_Beauty.json.gz": gzipped(
                [
                    "{'asin': 'B01', 'title': \"Women's Soap &amp; Towel\", 'price': 9.99, 'brand': 'Dove', "
                    "'categories': [['Beauty', 'Bath'], ['Beauty', 'Gifts']]}",
                    "{'asin': 'B03', 'imUrl': 'http://x'}",
                    "{'asin': 'B03'}",
                ]
            ),
            "fetched.json": "[]",
        },
    )
    source = AmazonReviewsSource.Config(path=folder).build()
    assert source.describe()["releases"] == ["2014"]
    assert read(source).rows() == [
        ("A1", "B01", 1400000000, "review", 5),
        ("A2", "B02", 1400086400, "review", 1),
    ]
    assert source.items().rows() == [
        ("B01", "Women's Soap & Towel", ["Beauty", "Bath", "Gifts"], "Dove", 9.99),
        ("B03", "B03", [], None, None),
    ]
    manifest = build(
        AmazonReviewsSource.Config(path=folder), BuildConfig(out=str(tmp_path / "out"), ray="never")
    )
    items = pl.read_parquet(tmp_path / "out/items.parquet")
    assert items["item_id"].to_list() == ["B01", "B03", "B02"] and manifest.num_items == 3
    assert items["title"].to_list()[2] == "B02", "an item without metadata is called by its id"


def test_amazon_2018_has_metadata_of_json_with_prices_as_text(tmp_path, caplog):
    folder = write(
        tmp_path,
        {
            "All_Beauty_5.json.gz": gzipped([review("A1", "B01", 4.0, 1500000000, verified=True)]),
            "meta_All_Beauty.json.gz": gzipped(
                [
                    json.dumps(
                        {
                            "asin": "B01",
                            "title": "Soap",
                            "brand": "Dove",
                            "category": ["Beauty"],
                            "price": "$1,012.50",
                        }
                    ),
                    json.dumps(
                        {
                            "asin": "B02",
                            "title": "var aPageStart = (new Date()).getTime();",
                            "price": ".a-box",
                        }
                    ),
                ]
            ),
        },
    )
    with caplog.at_level("INFO"):
        source = AmazonReviewsSource.Config(path=folder).build()
    assert "holds reviews of the 2018 release" in caplog.text
    assert source.items().rows() == [
        ("B01", "Soap", ["Beauty"], "Dove", 1012.5),
        ("B02", "B02", [], None, None),
    ]
    assert read(source)["stars"].to_list() == [4]


def test_amazon_2023_has_milliseconds_and_parent_items(tmp_path):
    def line(user, item, time):
        return json.dumps(
            {"rating": 5.0, "title": "t", "text": "x", "asin": f"{item}x", "parent_asin": item, "user_id": user,
             "timestamp": time, "verified_purchase": True}
        )  # fmt: skip

    folder = write(
        tmp_path,
        {
            "All_Beauty.jsonl": "\n".join([line("A1", "P2", 1588687728923), line("A1", "P1", 1588687728500)]) + "\n",
            "meta_All_Beauty.jsonl.gz": gzipped(
                [
                    json.dumps({"main_category": "All Beauty", "title": "Oil", "price": None, "store": "Herb",
                                "categories": [], "parent_asin": "P1"}),
                    json.dumps({"title": "Soap", "price": 12.5, "store": None, "categories": ["Bath"],
                                "parent_asin": "P2"}),
                ]
            ),
        },
    )  # fmt: skip
    source = AmazonReviewsSource.Config(path=folder).build()
    assert read(source)["timestamp_s"].to_list() == [1588687728, 1588687728]
    assert source.items().rows() == [("P1", "Oil", [], "Herb", None), ("P2", "Soap", ["Bath"], None, 12.5)]
    build(AmazonReviewsSource.Config(path=folder), BuildConfig(out=str(tmp_path / "out"), ray="never"))
    user = read_users(tmp_path / "out")["A1"]
    assert user["items"] == ["P1", "P2"], "two reviews of one second are ordered by milliseconds"


def test_reviews_that_would_count_twice_or_are_none_are_refused(tmp_path):
    line = gzipped([review("A1", "B01", 4.0, 1500000000)])
    folder = write(tmp_path / "a", {"reviews_Baby.json.gz": line, "reviews_Baby_5.json.gz": line})
    with pytest.raises(DataError, match="reviews_Baby more than once; keep either the 5-core or the whole"):
        AmazonReviewsSource.Config(path=folder).build()
    folder = write(tmp_path / "b", {"meta_Baby.json.gz": line})
    with pytest.raises(DataError, match="holds metadata only"):
        AmazonReviewsSource.Config(path=folder).build()
    folder = write(tmp_path / "c", {"x.json": '{"user": 1}\n'})
    with pytest.raises(
        DataError, match=r"must have the fields of a release, user_id, parent_asin.*it has user"
    ):
        AmazonReviewsSource.Config(path=folder).build()
    folder = write(tmp_path / "d", {"x.json.gz": line[:-12]})
    with pytest.raises(DataError, match=r"x\.json\.gz cannot be read: .*; fetch it again"):
        read(AmazonReviewsSource.Config(path=folder).build())


def test_metadata_of_literals_are_split_at_line_breaks_alone(tmp_path):
    reviews = gzipped([review("A1", "B01", 4.0, 1500000000)])
    lines = "{'asin': 'B01', 'title': 'Oil\x85 fine'}\n\n{'asin': 'B02', 'title': 'x\u2028y'}\n".encode()
    folder = write(tmp_path, {"reviews_Baby.json.gz": reviews, "meta_Baby.json": lines})
    assert AmazonReviewsSource.Config(path=folder).build().items()["title"].to_list() == [
        "Oil\x85 fine",
        "x\u2028y",
    ]
    for damaged, message in (
        (b"{'asin': 'B\xe9'}\n", "must hold one dictionary in each line"),
        (b"", "is empty"),
    ):
        (tmp_path / "meta_Baby.json").write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            AmazonReviewsSource.Config(path=folder).build().items()


def test_prices_are_the_numbers_in_front_and_none_of_a_style_sheet(tmp_path):
    prices = [
        "$1,234.50",
        "$12.99 - $15.99",
        "from 3.5",
        "$.99",
        "7",
        "",
        ".a-box-inner{color:#fffbf3;margin:5px}",
    ]
    rows = [json.dumps({"asin": f"B{row}", "price": price}) for row, price in enumerate(prices)]
    reviews = gzipped([review("A1", "B0", 4.0, 1500000000, verified=True)])
    folder = write(tmp_path, {"Beauty.json.gz": reviews, "meta_Beauty.json.gz": gzipped(rows)})
    items = AmazonReviewsSource.Config(path=folder).build().items()
    assert items["price"].to_list() == [1234.5, 12.99, 3.5, 0.99, 7.0, None, None]


def test_reviews_of_seconds_and_of_milliseconds_are_ordered_alike(tmp_path):
    """Whatever partition they meet in: without a finer order of their own, those of seconds lay as in the file."""
    times = (1500000002, 1500000001, 1500000003)
    folder = write(
        tmp_path / "raw",
        {
            "Books.json": "\n".join(review("A1", "B01", 5.0, time, verified=True) for time in times) + "\n",
            "Toys.jsonl": "\n".join(
                json.dumps({"user_id": "N1", "parent_asin": "B01", "rating": 5.0, "timestamp": 1000 * time})
                for time in times
            )
            + "\n",
        },
    )
    for partitions in (1, 2):
        out = str(tmp_path / f"out-{partitions}")
        config = BuildConfig(out=out, ray="never", partitions=partitions)
        build(AmazonReviewsSource.Config(path=folder), config)
        assert [user["timestamp_s"] for user in read_users(out).values()] == [sorted(times)] * 2
