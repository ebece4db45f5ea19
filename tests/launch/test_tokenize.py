"""`grail tokenize` on a small data set, as a person would type it."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch.nn.functional as F

from cluster.errors import ConfigError, DataError
from cluster.reporter import Reporter
from cluster.storage import Storage
from data_streams.build import BuildConfig, build
from data_streams.item_table import ItemTable
from data_streams.semantic_ids import SemanticIdTable
from data_streams.sources.events import EventsSource
from launch import cli
from launch.item_embeddings import _join, item_vectors_job, require_run_of, write_run_vectors
from launch.jobs import part_file
from launch.run_directory import prepare
from tests.models.tokenizers.clustered import clustered_vectors
from tests.process_group import run_on_processes
from tests.tiny_run import NUM_ITEMS, build_tiny_data, run, tiny_config

VECTORS = clustered_vectors(100)
SMALL = "--code-sizes 8 4"


def build_data(folder: Path, num_items: int, embeddings: bool = True) -> None:
    """Items i0, i1, ..., the newest first, with a category each."""
    folder.mkdir()
    names = [f"i{item}" for item in reversed(range(num_items))]
    items = {"item_id": names, "title": names, "categories": [["Shop", f"kind {n[-1]}"] for n in names]}
    pl.DataFrame(items).write_parquet(folder / "items.parquet")
    events = {"user_id": ["u"] * num_items, "item_id": names, "pos": range(num_items)}
    pl.DataFrame(events).write_parquet(folder / "events.parquet")
    np.save(folder / "vectors.npy", VECTORS[:num_items][::-1])
    source = EventsSource.Config(
        events=(str(folder / "events.parquet"),),
        items=str(folder / "items.parquet"),
        order_column="pos",
        embeddings=str(folder / "vectors.npy") if embeddings else None,
    )
    build(source, BuildConfig(out=str(folder / "shards"), ray="never"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenize")
    build_data(folder / "old", 80)
    build_data(folder / "new", 100, embeddings=False)
    build_data(folder / "newest", 100)
    return folder


@pytest.fixture
def command(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("launch.progress.start_driver_logs", lambda *_: None)

    def run_line(line: str, code: int = 0) -> str:
        assert cli.run(line.split()) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return run_line


def load(folder: Path, table: str, data: str) -> SemanticIdTable:
    return SemanticIdTable.load(str(folder / table), ItemTable.load(str(folder / data / "shards")).item_ids)


def test_a_table_is_made_reported_and_extended_without_changing_ids(folder, command):
    printed = command(f"tokenize residual-kmeans --data old/shards --out rk --extra-codes 9 {SMALL}")
    old = load(folder, "rk", "old")
    assert old.code_sizes == (8, 4, 9) and len(np.unique(old.codes, axis=0)) == 80
    assert old.tokenizer["name"] == "residual-kmeans" and old.tokenizer["inputs"] == ["data"]
    assert old.fingerprint in printed and "category purity" in printed
    report = json.loads((folder / "rk" / "report.json").read_text())
    assert report["remaining_collision_rate"] == 0 and 0 < report["reconstruction_error"] < 1
    assert len(report["purity"]) == 2 and (folder / "rk" / "report.png").read_bytes()[1:4] == b"PNG"
    message = command("tokenize add rk --data new/shards --out rk2 --embeddings.file new/vectors.npy", code=1)
    assert "rk was made from data embeddings, and file were given" in message
    assert "by --embeddings (without any, it is those of the data set)" in message
    command("tokenize add rk --data newest/shards --out rk2")
    larger = load(folder, "rk2", "newest")
    larger.require(old.fingerprint)
    codes = dict(zip(larger.item_ids, larger.codes.tolist(), strict=True))
    assert [codes[item] for item in old.item_ids] == old.codes.tolist()
    assert len(np.unique(larger.codes, axis=0)) == 100
    with pytest.raises(DataError, match=r"must have the 100 items of the data set, but lacks 20 items"):
        load(folder, "rk", "newest")


def test_vectors_of_another_catalogue_are_refused(command):
    message = command(
        f"tokenize random-codes --data old/shards --out x --embeddings.file new/vectors.npy {SMALL}", 1
    )
    assert "one vector of real numbers for each of the 80 items" in message
    message = command(f"tokenize random-codes --data old/shards --out x --embeddings.weights 2 1 {SMALL}", 2)
    assert "--embeddings.weights must be one positive number for each of 1 inputs" in message
    message = command(f"tokenize random-codes --data old/shards --out x --embeddings.width 0 {SMALL}", 2)
    assert f"--embeddings.width must be 1 to the width of the input, {VECTORS.shape[1]}, got 0" in message
    message = command(f"tokenize random-codes --data new/shards --out x {SMALL}", 2)
    assert "has no item embeddings of its own; name some: --embeddings.file" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "--embeddings.text-model m",
            "text-model m embeds texts, and none are asked for; add --embeddings.text",
        ),
        ("--embeddings.checkpoint latest", "checkpoint latest is one of a run, and none is given"),
        (
            "--embeddings.no-whiten",
            "no-whiten is for inputs that are reduced, and a single one stays as it is",
        ),
    ],
)
def test_options_of_embeddings_that_would_do_nothing_are_refused(command, given, message):
    line = f"tokenize random-codes --data old/shards --out x {given} {SMALL}"
    assert f"--embeddings.{message}" in command(line, 2)


def test_categories_are_not_counted_from_the_end(command):
    message = command(f"tokenize random-codes --data old/shards --out x --category-level -1 {SMALL}", 2)
    assert "--category-level counts from 0 on, got -1" in message


def test_too_few_codes_are_told_by_options_that_make_more_of_them(command):
    room = "make a table with more of them, by --code-sizes (of finite-scalar, --values or --levels) or --extra-codes"
    few = "--values 2 2 --levels 1 --steps 1 --collisions reassign"
    message = command(f"tokenize finite-scalar --data old/shards --out few {few}", 2)
    assert f"4 codes give 4 places, too few for 80 items; {room}" in message
    command("tokenize random-codes --data old/shards --out full --collisions reassign --code-sizes 9 9")
    message = command("tokenize add full --data newest/shards --out fuller", 2)
    assert f"9 x 9 codes give 81 places, too few for 100 items; {room}" in message


def test_vectors_that_are_no_numbers_or_of_another_width_are_refused(folder, command):
    broken = VECTORS[:80].copy()
    broken[7, 2] = np.nan
    np.save(folder / "broken.npy", broken)
    message = command(
        f"tokenize residual-kmeans --data old/shards --out y --embeddings.file broken.npy {SMALL}", 1
    )
    assert "must be finite numbers; 1 of the 80 that were looked at are not, such as row 7" in message
    command(f"tokenize residual-kmeans --data old/shards --out z --embeddings.file old/vectors.npy {SMALL}")
    np.save(folder / "narrow.npy", VECTORS[:, :3])
    message = command("tokenize add z --data new/shards --out z2 --embeddings.file narrow.npy", 1)
    assert f"reads vectors of width {VECTORS.shape[1]}, and 3 was given" in message


def test_a_table_is_not_overwritten_unless_asked_for(folder, command):
    line = "tokenize random-codes --data old/shards --out r --collisions reassign --code-sizes 10 10"
    command(line)
    first = load(folder, "r", "old")
    assert first.code_sizes == (10, 10) and len(np.unique(first.codes, axis=0)) == 80
    assert "add --overwrite" in command(line, code=2)
    command(f"{line} --seed 1 --overwrite")
    assert load(folder, "r", "old").fingerprint != first.fingerprint


def test_a_table_that_was_to_be_replaced_stays_where_the_input_is_unusable(folder, command):
    command(f"tokenize random-codes --data old/shards --out kept {SMALL}")
    before = {path.name: path.read_bytes() for path in (folder / "kept").iterdir()}
    into = "--out kept --overwrite"
    for line, message in (
        ("random-codes --data old/shards --embeddings.file absent.npy", "must be an existing .npy file"),
        ("random-codes --data old/shards --embeddings.file new/vectors.npy", "for each of the 80 items"),
        ("add kept --data new/shards --embeddings.file new/vectors.npy", "and file were given"),
        ("add kept --data new/shards --embeddings.from-run absent", "and run were given"),
        ("import --sids absent.parquet --data old/shards", "cannot be read"),
    ):
        assert message in command(f"tokenize {line} {into}", code=1)
        assert {path.name: path.read_bytes() for path in (folder / "kept").iterdir()} == before


def test_vectors_of_a_run_that_cannot_be_joined_leave_the_older_file(tmp_path):
    out = tmp_path / "run_embeddings.npy"
    _join([VECTORS[:2], VECTORS[2:5]], str(out))
    before = out.read_bytes()
    with pytest.raises(ValueError, match="broadcast"):
        _join([VECTORS[:2], VECTORS[2:5, :3]], str(out))
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]


def test_vectors_that_hosts_of_their_own_have_written_are_missed_and_leave_the_older_file(
    tmp_path, monkeypatch
):
    data, out = build_tiny_data(tmp_path / "data"), tmp_path / "run_embeddings.npy"
    config = tiny_config(data, tmp_path / "run")
    prepare(config)
    out.write_bytes(b"older")
    monkeypatch.setattr("launch.served_run.find_step", lambda *_: 2)
    monkeypatch.setattr("cluster.workers.run_workers", lambda *_, **__: None)
    for there in (0, 30):
        if there:
            np.save(f"{part_file(str(out), 0)}.npy", VECTORS[:there])
        with pytest.raises(ConfigError, match=f"60 items beside .*, and {there} of them are there"):
            write_run_vectors(config.run_dir, "best", ItemTable.load(data), data, str(out))
        assert out.read_bytes() == b"older"


def test_inputs_are_fused_and_the_fusion_is_kept_for_new_items(folder, command):
    np.save(folder / "wide.npy", np.tile(VECTORS[:80][::-1], 3))
    command(
        "tokenize balanced-kmeans --data old/shards --out fused --embeddings.file wide.npy --embeddings.width 5 "
        + SMALL
    )
    tokenizer = json.loads((folder / "fused" / "tokenizer.json").read_text())
    assert tokenizer["dim"] == 5 and (folder / "fused" / "fusion.safetensors").exists()
    np.save(folder / "wide2.npy", np.tile(VECTORS[::-1], 3))
    command("tokenize add fused --data new/shards --out fused2 --embeddings.file wide2.npy")
    old, larger = load(folder, "fused", "old"), load(folder, "fused2", "new")
    np.testing.assert_array_equal(larger.codes[20:], old.codes)


def test_published_ids_are_imported_and_shown_beside_others(folder, command):
    names = [f"i{item}" for item in range(80)]
    sids = [[f"<a_{item % 7}>", f"<b_{item % 11}>"] for item in range(80)]
    pl.DataFrame({"item_id": names, "sid": sids}).write_parquet(folder / "sids.parquet")
    command("tokenize import --sids sids.parquet --data old/shards --out published")
    table = load(folder, "published", "old")
    assert table.codes[0].tolist() == [79 % 7, 79 % 11]
    command(f"tokenize random-codes --data old/shards --out beside {SMALL}")
    assert "needs the folder of a table at least" in command("tokenize report", 2)
    assert "--out must end in .png, as that is what is written; got both.csv" in command(
        "tokenize report published beside --out both.csv", 2
    )
    printed = command("tokenize report published beside --out both.png")
    assert table.fingerprint in printed and "beside" in printed and (folder / "both.png").exists()
    command("tokenize report published beside --out memory://pictures/both.png")
    assert Storage("memory://pictures").read("both.png")[1:4] == b"PNG"
    command("tokenize import --sids sids.parquet --data old/shards --out beside --overwrite")
    for imported in ("published", "beside"):
        message = command(f"tokenize add {imported} --data new/shards --out y", 1)
        assert "an imported table has none" in message


def test_names_and_help_are_those_of_the_folder(command):
    shown = command("tokenize --help")
    assert "rq-vae" in shown and "grail tokenize add | import | report | tree" in shown
    assert "did you mean 'residual-kmeans'?" in command("tokenize residual-kmean --data a --out b", 2)
    assert "--extra-codes belongs to" in command(
        f"tokenize random-codes --data old/shards --out z --collisions keep --extra-codes 3 {SMALL}", 2
    )


def vectors_of_run(process, config, step: int, out: str) -> None:
    item_vectors_job(process, config, step, out, Reporter(process.rank))


def test_a_runs_item_vectors_are_those_of_its_table_on_any_number_of_workers(tmp_path):
    config = tiny_config(build_tiny_data(tmp_path / "data"), tmp_path / "run", max_steps=2)
    ((result, state),) = run_on_processes(run, 1, config)
    matrices = {}
    for world_size in (1, 2):
        out = str(tmp_path / f"{world_size}.npy")
        run_on_processes(vectors_of_run, world_size, config, result["step"], out)
        _join([np.load(f"{part_file(out, rank)}.npy") for rank in range(world_size)], out)
        matrices[world_size] = np.load(out)
    assert matrices[1].shape == (NUM_ITEMS, 16)
    np.testing.assert_array_equal(matrices[1], matrices[2])
    rows = F.normalize(state["table/item"], dim=1).numpy()
    cosines = (rows * matrices[1]).sum(1) / np.linalg.norm(matrices[1], axis=1)
    np.testing.assert_allclose(cosines, 1, rtol=1e-5)
    other = ItemTable.load(build_tiny_data(tmp_path / "other", first_item=5))
    with pytest.raises(DataError, match="was trained on a catalogue of 60 items"):
        require_run_of(config.run_dir, other, "other")
