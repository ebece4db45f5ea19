import dataclasses

import polars as pl
import pytest

from cluster.errors import CheckpointError, ConfigError
from cluster.reporter import Event
from cluster.storage import Storage
from launch.cli import run as grail
from launch.commands.evaluate import EvaluateOptions
from launch.commands.pretrain import parse_config
from launch.commands.recommend import RecommendOptions, _require_rows
from launch.plots import points, write_curves
from launch.run_directory import (
    CHECKPOINTS,
    CONFIG,
    KeptDocuments,
    absolute,
    folder_and_name,
    has_checkpoint,
    load_config,
    parse_checkpoint,
    prepare,
    require_own_folder,
    way_on,
    write_document,
)
from launch.served_run import parse_served
from models.objectives.full_softmax import FullSoftmax
from tests.tiny_run import build_tiny_data
from trainer.checks import check
from trainer.configuration import LogConfig, PretrainConfig
from trainer.metric_log import MetricLog


def test_a_run_is_started_again_from_what_it_wrote(tmp_path):
    options = ["--run-dir", str(tmp_path / "run"), "--model.num-blocks", "4", "--seed", "3"]
    config = parse_config("sasrec", options)
    assert config.model.num_blocks == 4 and config.recipe == "sasrec"
    prepare(config)
    assert load_config(str(tmp_path / "run")) == config
    again = parse_config(str(tmp_path / "run" / "config.yaml"), ["--train.max-steps", "9"])
    assert again == dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=9))


def test_a_file_or_a_data_set_is_no_run_directory(tmp_path, capsys):
    build_tiny_data(tmp_path)
    (tmp_path / "file").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    line = [
        "pretrain",
        "sasrec",
        "--data.path",
        str(tmp_path / "shards"),
        "--cluster.in-process",
        "--run-dir",
    ]
    for folder, words in (
        ("file", "file is a file; name another one"),
        ("file/run", "file is a file; name another one"),
        ("shards", "shards holds a data set; name another one, such as"),
    ):
        assert grail([*line, str(tmp_path / folder)]) == 2
        assert words in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_neither_pretraining_nor_alignment_goes_on_with_a_run_of_the_other(tmp_path):
    for name in ("pretrained", "aligned"):
        (tmp_path / name / "checkpoints" / "step-3").mkdir(parents=True)
    (tmp_path / "aligned" / "align.yaml").touch()
    for name, alignment in (("pretrained", False), ("aligned", True), ("new", False), ("new", True)):
        require_own_folder(str(tmp_path / name), alignment=alignment)
    with pytest.raises(ConfigError, match=r"go on with it by `grail align .*/aligned/align.yaml`, or name"):
        require_own_folder(str(tmp_path / "aligned"), alignment=False)
    with pytest.raises(ConfigError, match=r"pretrained holds a pretraining; name another one"):
        require_own_folder(str(tmp_path / "pretrained"), alignment=True)


def test_the_options_scripts_rely_on_are_there(tmp_path):
    config = parse_config(
        "sasrec-amazon",
        "--data.path d --run-dir r --cluster.workers 3 --train.max-steps 5 --train.epochs 2 "
        "--train.patience 1 --seed 4 --resume never --data.on-bad-shard skip --log.wandb offline --profile "
        "--init-from x "
        "--cluster.address 10.0.0.1:6379".split(),
    )
    assert (config.cluster.workers, config.train.max_steps, config.train.epochs) == (3, 5, 2)
    assert (config.train.patience, config.seed, config.resume, config.profile) == (1, 4, "never", True)
    assert (config.data.on_bad_shard, config.log.wandb) == ("skip", "offline")
    assert config.cluster.address == "10.0.0.1:6379"
    assert (config.data.path, config.run_dir, config.init_from) == tuple(map(absolute, ("d", "r", "x")))


def test_what_a_search_reads_is_named_from_the_root_on(tmp_path):
    options = "--search.prm --search.prm-run prm --search.allow a.txt --search.deny d.txt".split()
    trained = parse_config("promise", options)
    prepare(parse_config("promise", ["--run-dir", str(tmp_path)]))
    served, _ = parse_served("evaluate", [str(tmp_path), *options], EvaluateOptions)
    for search in (trained.search, served.search):
        assert (search.prm_run, search.allow, search.deny) == tuple(map(absolute, ("prm", "a.txt", "d.txt")))


def test_options_of_a_beam_are_refused_where_there_is_none(tmp_path):
    for option, value in (("search.width", "3"), ("data.semantic-ids", "ids")):
        with pytest.raises(ConfigError, match=rf"{option} is for models .* a SASRec ranks"):
            check(parse_config("sasrec", [f"--{option}", value]))
    check(parse_config("sasrec", ["--search.deny", "d.txt"]))
    prepare(parse_config("sasrec", ["--run-dir", str(tmp_path)]))
    for command, form in (("evaluate", EvaluateOptions), ("recommend", RecommendOptions)):
        with pytest.raises(ConfigError, match=r"search.method, search.width is for models .* a SASRec ranks"):
            parse_served(command, [str(tmp_path), "--search.method", "gumbel", "--search.width", "3"], form)
        with pytest.raises(ConfigError, match=r"data.semantic-ids is for models .* a SASRec ranks"):
            parse_served(command, [str(tmp_path), "--data.semantic-ids", "ids"], form)
        served, _ = parse_served(command, [str(tmp_path), "--search.deny", "d.txt"], form)
        assert served.search.deny == absolute("d.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--search.no-prm", "a ProcessReward proposes no codes"),
        ("--search.no-prm --search.method sample", "a ProcessReward proposes no codes"),
        ("--search.candidates 60", "search.candidates would have the likeliest"),
        ("--search.depth-candidates 60 60", "search.depth-candidates would have the likeliest"),
        ("--search.prm-depths 2", "search.prm-depths would have the likeliest"),
    ],
)
def test_a_prm_alone_is_not_searched_by_codes_that_are_all_alike(tmp_path, options, message):
    prepare(parse_config("promise-prm", ["--run-dir", str(tmp_path), "--data.semantic-ids", "ids"]))
    with pytest.raises(ConfigError, match=message):
        parse_served("evaluate", [str(tmp_path), *options.split()], EvaluateOptions)
    with pytest.raises(ConfigError, match=message):
        check(parse_config("promise-prm", ["--data.semantic-ids", "ids", *options.split()]))
    parse_served("evaluate", [str(tmp_path)], EvaluateOptions)
    check(parse_config("promise", ["--data.semantic-ids", "ids", *options.split()]))


def test_an_index_of_items_is_refused_where_none_is_searched(tmp_path):
    prepare(parse_config("decoder-amazon", ["--run-dir", str(tmp_path)]))
    for command, form in (("evaluate", EvaluateOptions), ("recommend", RecommendOptions)):
        with pytest.raises(ConfigError, match=r"evaluation.index hnsw is for models .* a DecoderOnly walks"):
            parse_served(command, [str(tmp_path), "--evaluation.index", "hnsw"], form)


def test_another_objective_takes_the_place_of_the_recipe_s_with_options_of_its_own():
    config = parse_config("sasrec", ["--objective", "full-softmax", "--objective.temperature", "0.5"])
    assert config.objective == FullSoftmax.Config(temperature=0.5)


def test_the_run_directory_is_named_after_the_recipe_where_none_is_given():
    assert parse_config("sasrec-amazon", []).run_dir == absolute("runs/sasrec-amazon")


def test_resume_never_refuses_a_run_directory_with_a_checkpoint(tmp_path):
    config = PretrainConfig(run_dir=str(tmp_path), resume="never")
    prepare(config)
    (tmp_path / "checkpoints" / "step-00000012").mkdir(parents=True)
    with pytest.raises(ConfigError, match="--resume never needs a run directory without checkpoints"):
        prepare(config)
    prepare(dataclasses.replace(config, resume="auto"))


def test_a_run_with_checkpoints_keeps_its_configuration_until_it_goes_on(tmp_path):
    config = parse_config("sasrec", ["--run-dir", str(tmp_path)])
    assert "pretrain" in way_on(str(tmp_path), CONFIG, prepare(config))
    (tmp_path / "checkpoints" / "step-00000012").mkdir(parents=True)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=99))
    document = prepare(longer)
    assert load_config(str(tmp_path)) == config
    assert way_on(str(tmp_path), CONFIG, document) == "Go on with the same command again."
    write_document(str(tmp_path), CONFIG, document)
    assert way_on(str(tmp_path), CONFIG, document) == f"Go on with: grail pretrain {tmp_path}/config.yaml"
    assert load_config(str(tmp_path)) == longer


def test_a_configuration_is_written_as_the_run_begins_and_not_when_its_workers_start_again(tmp_path):
    document = prepare(parse_config("sasrec", ["--run-dir", str(tmp_path)]))
    path, kept = tmp_path / CONFIG, KeptDocuments(str(tmp_path), {CONFIG: document})
    for kind, expected in (("started", "edited"), ("begun", None), ("begun", "edited")):
        path.write_text("edited")
        kept.on_event(Event(kind=kind, rank=0))
        assert (path.read_text() == "edited") == (expected == "edited")


def test_a_stopped_run_says_how_it_goes_on_while_its_configuration_is_being_edited(tmp_path):
    document = prepare(parse_config("sasrec", ["--run-dir", str(tmp_path)]))
    (tmp_path / CONFIG).write_text("train: [")
    assert way_on(str(tmp_path), CONFIG, document) == "Go on with the same command again."


def test_a_run_at_an_address_goes_on_with_the_command_that_is_printed():
    config = parse_config("sasrec", ["--run-dir", "memory://bucket/runs/a"])
    document = prepare(config)
    command = way_on(config.run_dir, CONFIG, document).split()
    assert command[-3:] == ["grail", "pretrain", "memory://bucket/runs/a/config.yaml"]
    assert parse_config(command[-1], []) == config
    with pytest.raises(
        CheckpointError, match=r"memory://bucket/runs/b\.yaml must be a file, and there is none"
    ):
        load_config("memory://bucket/runs/b.yaml")


def test_a_slash_at_the_end_of_an_address_makes_no_other_run_of_it():
    Storage("memory://slash/run/").folder(CHECKPOINTS).write("step-00000001/state.json", b"{}")
    config = parse_config(
        "sasrec", ["--run-dir", "memory://slash/run/", "--data.path", "memory://slash/data/"]
    )
    assert (config.run_dir, config.data.path) == ("memory://slash/run", "memory://slash/data")
    assert has_checkpoint(config.run_dir)


def test_a_path_is_split_where_its_name_begins(tmp_path, monkeypatch):
    assert folder_and_name("s3://bucket/run/config.yaml") == ("s3://bucket/run/", "config.yaml")
    assert folder_and_name("memory://config.yaml") == ("memory://", "config.yaml")
    assert folder_and_name("/config.yaml") == ("/", "config.yaml")
    prepare(parse_config("sasrec", ["--run-dir", str(tmp_path)]))
    monkeypatch.chdir(tmp_path)
    assert load_config("config.yaml").run_dir == load_config("./config.yaml").run_dir == str(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"must be a run directory with a config\.yaml, and there is none"
    ):
        load_config(str(tmp_path))


def test_what_is_written_to_a_disk_is_not_written_to_an_address(tmp_path, capsys):
    config = parse_config("sasrec", ["--run-dir", str(tmp_path)])
    prepare(config)
    for command in (
        ["checkpoint", "export", str(tmp_path), "--out", "s3://bucket/export"],
        ["recommend", str(tmp_path), "--all", "--out", "s3://bucket/all.parquet"],
    ):
        assert grail(command) == 2
        assert "--out must be a path on a disk, got s3://bucket/" in capsys.readouterr().err


def test_parts_of_hosts_that_share_no_folder_are_missed(tmp_path):
    pl.DataFrame({"user_row": [0, 1]}).write_parquet(tmp_path / "all.part-00000")
    with pytest.raises(ConfigError, match=r"workers wrote 5 rows beside .*, and 2 of them are there"):
        _require_rows([str(tmp_path / "all.part-00000")], 5, str(tmp_path / "all"))


def test_a_checkpoint_is_named_by_word_or_step():
    assert [parse_checkpoint(text) for text in ("latest", "best", "120")] == ["latest", "best", 120]
    with pytest.raises(ConfigError, match="must be latest, best or the number of a step"):
        parse_checkpoint("newest")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.max-gradient-norm", "0"], "must be above 0, or None, which turns clipping off; got 0.0"),
        (["--cluster.workers", "9"], r"data.num-streams must be at least cluster.workers \(9\), got 8"),
        (
            ["--cluster.max-workers", "9"],
            r"data.num-streams must be at least cluster.max-workers \(9\), got 8",
        ),
        (
            ["--cluster.min-workers", "2"],
            "cluster.min-workers must be at least 1 and at most cluster.workers",
        ),
        (["--train.epochs", "0"], "train.epochs must be at least 1, got 0"),
        (["--train.max-steps", "0"], "train.max-steps must be at least 1, got 0"),
        (["--train.learning-rate", "-1"], r"train.learning-rate must be at least 0, got -1.0"),
        (["--train.learning-rate", "nan"], r"train.learning-rate must be at least 0, got nan"),
        (["--train.final-rate-fraction", "inf"], r"train.final-rate-fraction must be at least 0, got inf"),
        (["--seed", "-1"], r"^seed must be at least 0, got -1"),
        (["--model.width", "0"], r"model.width must be at least 1, got 0"),
        (["--model.init-scale", "-0.1"], r"model.init-scale must be at least 0, got -0.1"),
        (["--train.warmup-steps", "-1"], r"train.warmup-steps must be at least 0, got -1"),
        (
            ["--train.schedule", "constant", "--train.final-rate-fraction", "0.1"],
            r"rates fall to, .* leave either out",
        ),
        (["--train.final-rate-fraction", "-0.1"], r"train.final-rate-fraction must be at least 0, got -0.1"),
        (["--evaluation.cutoffs", "5", "0"], r"evaluation.cutoffs must be .* each at least 1, got \(5, 0\)"),
        (
            ["--evaluation.users-per-batch", "0"],
            "evaluation.users-per-batch .* must be at least 1 .* got 0, 10",
        ),
        (["--train.ema-decay", "1"], "train.ema-decay must lie in 0..1, below 1, or be None; got 1.0"),
        (["--data.attribute-rows", "0"], "data.attribute-rows must be at least 1, got 0"),
        (["--log.every-steps", "0"], "log.every-steps must be at least 1, got 0"),
        (["--train.selection-metric", "ndcg@7"], "train.selection-metric must be one of recall@5, .* ndcg@7"),
    ],
)
def test_options_that_cannot_work_are_refused_before_any_worker_starts(options, message):
    with pytest.raises(ConfigError, match=message):
        check(parse_config("sasrec", options))


@pytest.mark.parametrize("share", ["1.5", "-0.1", "nan"])
def test_a_share_of_label_smoothing_that_is_none_is_refused(share):
    options = ["--data.semantic-ids", "ids", "--model.label-smoothing", share]
    with pytest.raises(ConfigError, match=r"model.label-smoothing must be at least 0 and below 1, got"):
        check(parse_config("decoder-amazon", options))


def test_curves_are_drawn_from_the_numbers_of_a_run(tmp_path):
    assert write_curves(str(tmp_path), "ndcg@10") is None
    log = MetricLog(str(tmp_path), LogConfig(), {})
    for step in range(1, 4):
        log.write(step, {"train/loss": 1 / step, "train/learning_rate": 0.1, "train/targets_per_s": 9.0})
    log.write(3, {"validation/ndcg@10": 0.2})
    log.close()
    path = write_curves(str(tmp_path), "ndcg@10")
    assert open(path, "rb").read(8) == b"\x89PNG\r\n\x1a\n"
    assert points([{"step": 1, "a": 5}, {"step": 2}], "a") == ([1], [5])
