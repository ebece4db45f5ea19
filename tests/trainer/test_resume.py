"""A run that was stopped and resumed ends where an uninterrupted one does, at any world size."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from cluster.errors import CheckpointError
from cluster.reporter import Reporter
from cluster.storage import Storage
from data_streams.build import BuildConfig, build
from data_streams.item_table import ItemTable
from data_streams.semantic_ids import SemanticIdTable
from data_streams.sources.events import EventsSource
from launch.config_document import to_document
from models.climber_pilot import ClimberPilot
from models.trees.shape import codes_of_order
from tests.generator_cases import TREES
from tests.process_group import run_on_processes
from tests.tiny_run import (
    NUM_USERS,
    assert_same_state,
    build_tiny_data,
    run,
    tiny_config,
    with_train,
    write_events,
)
from trainer.audit import read_audit
from trainer.checkpoint_layout import committed_steps
from trainer.checkpoint_reader import CheckpointReader
from trainer.start import pretrain


def run_with_document(process, config):
    return pretrain(process, config, to_document(config), Reporter(process.rank))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_tiny_data(tmp_path_factory.mktemp("data"))


def test_resumed_equals_uninterrupted_to_the_last_bit(data, tmp_path):
    """With dropout, and with another number of steps between two checkpoints."""
    whole = tiny_config(data, tmp_path / "whole", dropout=0.3)
    parts = tiny_config(data, tmp_path / "parts", dropout=0.3)
    (expected_result, expected), *_ = run_on_processes(run, 2, whole)
    stopped, *_ = run_on_processes(run, 2, parts, 3)
    assert stopped[0]["status"] == "stopped"
    assert 0 < stopped[0]["step"] < expected_result["step"]
    (result, state), *_ = run_on_processes(run, 2, parts)
    assert result["status"] == "finished"
    assert {**result, "best": pytest.approx(result["best"])} == expected_result
    assert_same_state(state, expected, tolerance=0)


def test_a_run_that_goes_on_by_another_metric_forgets_what_was_best(data, tmp_path):
    """An ndcg@5 is below the recall@10 before, which would stay the best for good."""
    config = tiny_config(data, tmp_path / "run", selection_metric="recall@10", epochs=1)
    (first,) = run_on_processes(run_with_document, 1, config)
    further = with_train(config, selection_metric="ndcg@5", epochs=2)
    (result,) = run_on_processes(run_with_document, 1, further)
    assert first["best_step"] < result["best_step"] and result["best"] < first["best"]


def test_a_resumed_run_over_a_tree_equals_an_uninterrupted_one(data, tmp_path):
    items = ItemTable.load(data).item_ids
    codes = codes_of_order(np.arange(len(items)), 2)
    SemanticIdTable(item_ids=items, codes=codes, code_sizes=(2,) * codes.shape[1]).save(str(tmp_path / "ids"))
    base = tiny_config(data, tmp_path / "whole")
    whole = replace(
        base,
        model=TREES["jtm"],
        objective=None,
        data=replace(base.data, semantic_ids=str(tmp_path / "ids")),
    )
    parts = replace(whole, run_dir=str(tmp_path / "parts"))
    (_, expected), *_ = run_on_processes(run, 1, whole)
    stopped, *_ = run_on_processes(run, 2, parts, 3)
    (result, state), *_ = run_on_processes(run, 1, parts)
    assert 0 < stopped[0]["step"] < result["step"] and result["status"] == "finished"
    assert_same_state(state, expected, tolerance=2e-5)


def test_a_run_moved_from_two_to_one_to_three_workers_equals_an_uninterrupted_one(data, tmp_path):
    whole = tiny_config(data, tmp_path / "whole")
    parts = tiny_config(data, tmp_path / "parts", zero_stage=1)
    (expected_result, expected), *_ = run_on_processes(run, 2, whole)
    first, *_ = run_on_processes(run, 2, parts, 2)
    second, *_ = run_on_processes(run, 1, with_train(parts, zero_stage=2), 3)
    moved = replace(
        with_train(parts, zero_stage=3), sharding=replace(parts.sharding, placement={"item": "table_wise"})
    )
    third, *_ = run_on_processes(run, 3, moved)
    assert 0 < first[0]["step"] < second[0]["step"] < third[0]["step"] == expected_result["step"]
    assert_same_state(third[1], expected, tolerance=2e-5)
    for epoch, users in read_audit(Storage(parts.run_dir)).items():
        assert sorted(users) == list(range(NUM_USERS)), f"epoch {epoch}"


def test_a_finished_run_stays_as_it_is_and_goes_on_when_given_more_epochs(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", epochs=1)
    (first, state), *_ = run_on_processes(run, 1, config)
    (again, same), *_ = run_on_processes(run, 1, config)
    assert first["status"] == again["status"] == "finished" and first["step"] == again["step"]
    assert_same_state(same, state, tolerance=0)
    (more, _), *_ = run_on_processes(run, 1, with_train(config, epochs=2))
    assert more["step"] > first["step"] and more["epoch"] == 2


def test_the_last_checkpoint_tells_that_the_run_has_finished_also_where_its_step_was_saved_before(
    data, tmp_path
):
    config = tiny_config(
        data, tmp_path / "run", checkpoint_every_steps=1, learning_rate=0.0, table_learning_rate=0.0
    )
    (first, _), *_ = run_on_processes(run, 2, config)
    checkpoints = Storage(config.run_dir).folder("checkpoints")
    saved = CheckpointReader(checkpoints).shared_state["progress"]
    told = {name: first[name] for name in ("status", "step", "epoch")}
    assert first["status"] == "finished" and {name: saved[name] for name in told} == told
    assert saved["validations_without_gain"] == 1
    state = checkpoints.read(f"step-{first['step']:08d}/state.json")
    assert [again for again, _ in run_on_processes(run, 2, config)] == [first] * 2
    assert checkpoints.read(f"step-{first['step']:08d}/state.json") == state


def refusal(attempt):
    try:
        attempt()
    except CheckpointError as error:
        return str(error)
    return "no error"


def fail_to_run(process, config):
    from tests.tiny_run import StopAfter
    from trainer.start import pretrain

    return refusal(lambda: pretrain(process, config, {}, StopAfter(process.rank, None)))


def test_another_model_is_refused_with_what_differs_and_what_may_change(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", epochs=1)
    run_on_processes(run, 1, config)
    other = replace(config, model=replace(config.model, width=32, num_blocks=2))
    (message,) = run_on_processes(fail_to_run, 1, other)
    assert "model.model.width: 16 saved, 32 now" in message
    assert "num_blocks: 1 saved, 2 now" in message
    assert "may change on resume" in message


def fail_to_load(process, config):
    from trainer.assembly import assemble
    from trainer.checkpoint_reader import CheckpointReader
    from trainer.run_state import load_weights

    reader = CheckpointReader(Storage(f"{config.run_dir}/checkpoints"), "latest")
    return refusal(lambda: load_weights(reader, assemble(config, process)))


def test_another_catalogue_of_the_same_size_is_refused_also_at_the_end_of_an_epoch(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", epochs=1)
    run_on_processes(run, 1, config)
    assert run_on_processes(fail_to_load, 1, config) == ["no error"]
    moved = replace(
        config, data=replace(config.data, path=build_tiny_data(tmp_path / "shifted", first_item=20))
    )
    for fail, changed in ((fail_to_load, moved), (fail_to_run, with_train(moved, epochs=2))):
        (message,) = run_on_processes(fail, 1, changed)
        assert "must be of the catalogue at hand" in message and "--init-from" in message


def test_conditions_of_other_names_are_refused(tmp_path):
    """They are learnt by number, in the order of their names."""
    names = build_tiny_data(tmp_path / "data", categories=True)
    events, items = write_events(tmp_path / "raw", categories=True)
    turned = pl.read_parquet(items).with_columns(pl.col("categories").reverse())
    turned.write_parquet(items)
    others = pl.read_parquet(items).with_columns(pl.col("categories").list.eval("other " + pl.element()))
    config = tiny_config(names, tmp_path / "run", epochs=1)
    sizes = {"width": 16, "num_blocks": 1, "num_heads": 2, "time_window_s": None}
    pilot = ClimberPilot.Config(**sizes, condition_column="categories")
    config = replace(config, model=pilot)
    run_on_processes(run, 1, config)
    for number, (changed, message) in enumerate(((turned, "no error"), (others, "learnt others"))):
        changed.write_parquet(items)
        source = EventsSource.Config(events=(str(events),), items=str(items), order_column="pos")
        path = str(tmp_path / f"shards-{number}")
        build(source, BuildConfig(out=path, ray="never"))
        asked = replace(config, data=replace(config.data, path=path))
        assert message in run_on_processes(fail_to_load, 1, asked)[0]
    assert "learnt others" in run_on_processes(fail_to_run, 1, with_train(asked, epochs=2))[0]


def initialised(process, config):
    """Tables right after the start of a run, by raw item id."""
    from trainer.assembly import assemble
    from trainer.start import _initialise

    assembly = assemble(config, process)
    before = assembly.tables.pieces()[0].tensor.clone()
    _initialise(config.init_from, assembly)
    piece = assembly.tables.pieces()[0]
    ids = assembly.items.item_ids[piece.start : piece.start + piece.num_rows].to_list()
    return {name: (was, row) for name, was, row in zip(ids, before, piece.tensor.clone(), strict=True)}


def test_init_from_takes_rows_by_item_id_and_new_items_join_the_table(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", epochs=1)
    (_, state), *_ = run_on_processes(run, 1, config)
    shifted = build_tiny_data(tmp_path / "shifted", first_item=20)
    new = replace(tiny_config(shifted, tmp_path / "new"), init_from=config.run_dir)
    rows = {}
    for part in run_on_processes(initialised, 2, new):
        rows |= part
    assert len(rows) == 60
    for item in range(20, 60):
        assert (rows[f"i{item}"][1] == state["table/item"][item]).all()
    for item in range(60, 80):
        was, now = rows[f"i{item}"]
        assert (was == now).all()


def initialised_while_the_source_goes_on(process, config, steps):
    """The best step of the other run is another one whenever a rank looks."""
    from trainer import checkpoint_reader

    checkpoint_reader.best_step = lambda storage: steps[process.rank]
    return initialised(process, config)


def test_all_ranks_start_from_one_step_of_a_run_that_goes_on_meanwhile(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", epochs=1, checkpoint_every_steps=2, keep_last=9)
    run_on_processes(run, 1, config)
    checkpoints = Storage(f"{config.run_dir}/checkpoints")
    first, *_, last = committed_steps(checkpoints)
    expected = CheckpointReader(checkpoints, first).read_rows("table/item", 0, 60)
    new = replace(tiny_config(data, tmp_path / "new"), init_from=config.run_dir)
    rows = {}
    for part in run_on_processes(initialised_while_the_source_goes_on, 2, new, (first, last)):
        rows |= part
    for item, row in enumerate(expected):
        assert (rows[f"i{item}"][1] == row).all()
