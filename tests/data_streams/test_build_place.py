"""Where a build may write, what it replaces, and what is left of one that was killed."""

import os

import pytest

from cluster.errors import ConfigError
from cluster.storage import Storage
from data_streams.build_place import BuildPlace
from data_streams.shards import Manifest
from tests.data_streams.test_build import build_events, random_events


@pytest.mark.parametrize("out", ["", ".", "./", "..", "/"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_folder_a_command_runs_in_is_never_replaced(tmp_path, monkeypatch, out, overwrite):
    (tmp_path / "mine" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "here")
    with pytest.raises(
        ConfigError, match=r"--out must be a folder of its own, and '.*' is the one the command runs"
    ):
        build_events(tmp_path, random_events(0), out=out, overwrite=overwrite)
    assert (tmp_path / "mine" / "here").is_dir()


def test_what_is_no_data_set_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"--overwrite replaces a data set, and .* holds thesis.tex and no manifest"
    ):
        build_events(tmp_path, random_events(0), overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_a_data_set_with_something_beside_it_and_half_of_one_are_replaced(tmp_path):
    build_events(tmp_path, random_events(0))
    (tmp_path / "out" / "notes.txt").write_text("")
    second = build_events(tmp_path, random_events(1), overwrite=True)
    (tmp_path / "out" / "manifest.json").unlink()
    assert build_events(tmp_path, random_events(1), overwrite=True) == second


def test_a_whole_store_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ("memory://bucket", "s3://bucket/"):
        with pytest.raises(ConfigError, match=f"--out must be a folder in a store, and {out} is all of it"):
            build_events(tmp_path, random_events(0), out=out)
    assert {path.name for path in tmp_path.iterdir()} == {"out-events.parquet"}
    assert BuildPlace.of("file:///nowhere-else", overwrite=False).home.path("x") == "/x"


def test_a_disk_is_mounted_where_nothing_can_be_renamed(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="is where a disk is mounted; name one below"):
        build_events(tmp_path, random_events(0))


def test_a_link_leads_to_the_folder_that_is_replaced(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large")
    build_events(tmp_path, random_events(0))
    second = build_events(tmp_path, random_events(1), overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert Manifest.load(Storage(tmp_path / "large")) == second


def test_a_data_set_is_there_whenever_its_replacement_is_killed(tmp_path, monkeypatch):
    first = build_events(tmp_path, random_events(0))
    rename = Storage.rename
    for number in (1, 2):
        calls = []

        def killed(storage, source, target, calls=calls, number=number):
            calls.append(source)
            if len(calls) == number:
                raise KeyboardInterrupt
            rename(storage, source, target)

        monkeypatch.setattr(Storage, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            build_events(tmp_path, random_events(1), overwrite=True)
        monkeypatch.setattr(Storage, "rename", rename)
        BuildPlace.of(str(tmp_path / "out"), overwrite=True)
        assert Manifest.load(Storage(tmp_path / "out")) == first
    monkeypatch.setattr(Storage, "delete", lambda storage, name: None)
    second = build_events(tmp_path, random_events(1), overwrite=True)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="holds files"):
        build_events(tmp_path, random_events(2))
    assert Manifest.load(Storage(tmp_path / "out")) == second
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out-events.parquet"}
