"""MovieLens 100K, 1M and 32M, from small files in their formats."""

import zipfile

import pytest

from cluster.errors import DataError
from data_streams.sources.movielens import MovieLensSource
from tests.data_streams.official_files import read, write

ML_1M = {
    "ml-1m/ratings.dat": "1::10::5::978300760\n1::20::3::978302109\n2::10::4::978301968\n",
    "ml-1m/movies.dat": "10::Star Wars: Episode IV (1977)::Action|Sci-Fi\n"
    "20::Misérables, Les (1995)::Drama\n30::X::Drama\n",
    "ml-1m/users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n",
}


def test_movielens_1m_is_read_from_its_folder_and_its_zip(tmp_path):
    folder = write(tmp_path / "raw", ML_1M)
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        for name, text in ML_1M.items():
            archive.writestr(name, text.encode("latin-1"))
    for path in (folder, str(tmp_path / "ml-1m.zip")):
        source = MovieLensSource.Config(path=path).build()
        assert read(source).sort("user_id", "item_id").rows() == [
            (1, 10, 978300760, "rating", 10),
            (1, 20, 978302109, "rating", 6),
            (2, 10, 978301968, "rating", 8),
        ]
        assert source.items().rows()[:2] == [
            (10, "Star Wars: Episode IV (1977)", ["Action", "Sci-Fi"]),
            (20, "Misérables, Les (1995)", ["Drama"]),
        ]
        assert source.users().row(1, named=True) == {
            "user_id": 2,
            "gender": "M",
            "age": 56,
            "occupation": "16",
            "zip": "70072",
        }
    kept = read(MovieLensSource.Config(path=folder, min_stars=4).build())
    assert kept["half_stars"].to_list() == [10, 8]


def test_a_folder_with_nothing_but_the_fetched_zip_is_read_as_the_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        for name, text in ML_1M.items():
            archive.writestr(name, text.encode("latin-1"))
    (tmp_path / "fetched.json").write_text("[]")
    assert read(MovieLensSource.Config(path=str(tmp_path)).build()).height == 3


def test_movielens_100k_has_its_genres_as_flags(tmp_path):
    flags = "|".join("1" if place in (1, 3) else "0" for place in range(4))
    folder = write(
        tmp_path,
        {
            "u.data": "196\t242\t3\t881250949\n186\t302\t4\t891717742\n",
            "u.item": f"242|Kolya (1996)|24-Jan-1997||http://x|{flags}\n302|Café|01-Jan-1997||http://y|0|0|0|0\n",
            "u.genre": "unknown|0\nAction|1\nComedy|2\nDrama|3\n",
            "u.user": "196|49|M|writer|55105\n186|39|F|executive|00000\n",
        },
    )
    source = MovieLensSource.Config(path=folder).build()
    assert read(source)["item_id"].to_list() == [242, 302]
    assert source.items().rows() == [(242, "Kolya (1996)", ["Action", "Drama"]), (302, "Café", [])]
    assert source.users()["age"].to_list() == [49, 39]


def test_movielens_32m_is_read_from_csv_with_half_stars(tmp_path):
    folder = write(
        tmp_path,
        {
            "ratings.csv": "userId,movieId,rating,timestamp\n1,17,4.0,944249077\n1,25,0.5,944250228\n",
            "movies.csv": 'movieId,title,genres\n17,"Sense, and ""Sensibility""",Drama|Romance\n'
            "25,Leaving,(no genres listed)\n",
        },
    )
    source = MovieLensSource.Config(path=folder).build()
    assert read(source)["half_stars"].to_list() == [8, 1]
    assert source.items().rows() == [
        (17, 'Sense, and "Sensibility"', ["Drama", "Romance"]),
        (25, "Leaving", []),
    ]
    assert source.users() is None


def test_a_folder_of_something_else_and_a_missing_one_are_refused(tmp_path):
    folder = write(tmp_path, {"log_standard_x.csv": "user_id,video_id\n1,2\n"})
    with pytest.raises(DataError, match=r"must hold u\.data or ratings\.dat or ratings\.csv, but holds log_"):
        MovieLensSource.Config(path=folder).build()
    with pytest.raises(DataError, match=r"nothing is at .*nowhere; check --path"):
        MovieLensSource.Config(path=str(tmp_path / "nowhere")).build()
    (tmp_path / "ml-1m.zip").write_bytes(b"PK but not a zip")
    with pytest.raises(DataError, match=r"ml-1m\.zip cannot be read: .*; fetch it again"):
        MovieLensSource.Config(path=str(tmp_path / "ml-1m.zip")).build()


def test_two_releases_in_one_folder_are_refused(tmp_path):
    folder = write(tmp_path, {**ML_1M, "ml-100k/u.data": "1\t2\t3\t4\n"})
    with pytest.raises(
        DataError, match=r"but holds ml-100k/u\.data, ml-1m/ratings\.dat; give the folder of one"
    ):
        MovieLensSource.Config(path=folder).build()


def test_a_title_may_hold_a_byte_that_is_a_line_break_elsewhere(tmp_path):
    movies = b"10::Star\x85 Wars (1977)::Action\n20::X::Drama\n"
    source = MovieLensSource.Config(path=write(tmp_path, {**ML_1M, "ml-1m/movies.dat": movies})).build()
    assert source.items()["title"].to_list() == ["Star\x85 Wars (1977)", "X"]


def test_tables_of_other_contents_are_refused(tmp_path):
    folder = write(tmp_path / "a", {**ML_1M, "ml-1m/movies.dat": "ten::X::Drama\n"})
    with pytest.raises(DataError, match="1 rows have none"):
        MovieLensSource.Config(path=folder).build().items()
    ratings = {
        "ratings.csv": "userId,movieId,rating,timestamp\n1,2,3,4\n",
        "movies.csv": "movieId,title\n2,X\n",
    }
    with pytest.raises(DataError, match=r"movies\.csv must have the columns .*; it lacks genres"):
        MovieLensSource.Config(path=write(tmp_path / "b", ratings)).build().items()
