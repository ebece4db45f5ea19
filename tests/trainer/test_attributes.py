import pytest

from cluster.errors import ConfigError
from data_streams.configuration import DataConfig
from launch.cli import run as grail
from tests.text_cases import make_text_model
from tests.tiny_run import build_tiny_data
from tests.training_cases import Case, make_model
from trainer.attributes import add_attributes, described_attributes
from trainer.metric_log import read_metrics

QUICK = (
    "--train.max-steps 4 --log.every-steps 1 --train.precision fp32 --cluster.workers 1 --cluster.in-process "
    "--data.num-streams 2 --model.num-blocks 1 --model.width 8"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_tiny_data(tmp_path_factory.mktemp("data"), categories=True)


def test_a_run_with_attributes_is_trained_evaluated_exported_and_started_from(data, tmp_path, capsys):
    plain, run = tmp_path / "plain", tmp_path / "run"
    line = ["pretrain", "sasrec", "--data.path", data, *QUICK]
    assert grail([*line, "--run-dir", str(plain)]) == 0
    line += ["--data.item-attributes", "categories", "--data.attribute-rows", "64"]
    assert grail([*line, "--run-dir", str(run), "--init-from", str(plain)]) == 0
    losses = [line["train/loss"] for line in read_metrics(str(run)) if "train/loss" in line]
    assert len(losses) == 4
    assert grail(["evaluate", str(run)]) == 0 and grail(["recommend", str(run), "--users", "2"]) == 0
    assert "item_attributes" in (run / "plan.txt").read_text()
    assert grail(["checkpoint", "export", str(run)]) == 0
    capsys.readouterr()
    # A row would mean something else.
    assert (
        grail([*line, "--run-dir", str(run), "--train.max-steps", "6", "--data.item-attributes", "title"])
        == 1
    )
    assert "item_attributes" in capsys.readouterr().err


def test_a_run_that_starts_from_another_keeps_the_attributes_of_its_rows(data, tmp_path, capsys):
    line = ["pretrain", "sasrec", "--data.path", data, *QUICK]
    attributes = ["--data.item-attributes", "categories", "--data.attribute-rows", "64"]
    assert grail([*line, *attributes, "--run-dir", str(tmp_path / "start")]) == 0
    line += ["--init-from", str(tmp_path / "start"), "--run-dir", str(tmp_path / "run")]
    capsys.readouterr()
    for options, message in (
        ([], "lacks categories; give --data.item-attributes categories"),
        (
            [*attributes, "--data.attribute-rows", "32"],
            "item_attributes must have as many rows as in the run",
        ),
    ):
        assert grail([*line, *options]) == 1
        assert message in " ".join(capsys.readouterr().err.split())
    assert grail([*line, *attributes[:1], "title", *attributes[1:]]) == 0


def test_attributes_without_rows_to_add_them_to_are_refused(data):
    text_model = make_text_model("m6-rec", 0, num_items=9, objective=make_model(Case()).objective, actions=())
    with pytest.raises(ConfigError, match="added to rows of items, and M6Rec has none"):
        add_attributes(text_model, DataConfig(path=data, item_attributes=("categories",)))
    with pytest.raises(ConfigError, match="added to rows of users, and SASRec has none"):
        add_attributes(make_model(Case()), DataConfig(path=data, user_attributes=("user_id",)))


def test_rows_of_users_have_attributes_of_users_and_none_of_items(data):
    model = make_model(Case(model="mtgr of drawn windows"))
    add_attributes(
        model, DataConfig(path=data, item_attributes=("categories",), user_attributes=("user_id",))
    )
    described = {spec.name: spec.describes for spec in model.all_tables()}
    assert described == {"item": None, "user": None, "item_attributes": "item", "user_attributes": "user"}


def test_the_order_of_columns_and_their_number_mean_nothing(data):
    columns = ("title", "categories")
    (first, second), described = (make_model(Case()), make_model(Case())), []
    for model, chosen in ((first, columns), (second, (*reversed(columns), "title"))):
        config = DataConfig(path=data, item_attributes=chosen)
        add_attributes(model, config)
        described.append(described_attributes(config))
    assert described[0] == described[1]
    assert first.item_attributes.ids.values.equal(second.item_attributes.ids.values)
