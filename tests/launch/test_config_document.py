import dataclasses

import pytest

from cluster.errors import ConfigError
from cluster.plugins import discover
from launch.config_document import from_document, from_yaml, to_document, to_yaml
from models.sasrec import SASRec
from trainer.configuration import PretrainConfig

RECIPES = {name: module.recipe() for name, module in discover("launch.recipes").items()}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_being_written_and_read(name):
    text = to_yaml(to_document(RECIPES[name]))
    assert from_document(PretrainConfig, from_yaml(text, "config.yaml")) == RECIPES[name]


def test_tuples_and_mappings_survive():
    config = PretrainConfig(model=SASRec.Config(width=8))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, columns=("action", "timestamp_s")),
        sharding=dataclasses.replace(config.sharding, placement={"item": "row_wise"}),
        train=dataclasses.replace(config.train, patience=2, learning_rate=1.0),
    )
    assert from_document(PretrainConfig, from_yaml(to_yaml(to_document(config)), "text")) == config


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"train": {"epoch": 3}}, "there is no option train.epoch; did you mean 'epochs'"),
        ({"train": {"epochs": "many"}}, "train.epochs must be of type int, got 'many'"),
        ({"train": {"epochs": True}}, "train.epochs must be of type int, got True"),
        ({"resume": "sometimes"}, "resume must be one of auto, never, got 'sometimes'"),
        ({"data": 3}, "data must be a section of options, got 3"),
        ({"data": {"columns": "action"}}, "data.columns must be a list, got 'action'"),
        ({"sharding": {"placement": {"item": "x"}}}, "sharding.placement.item must be one of"),
        ({"model": {"width": 3}}, "model must be a section with the name of its type"),
        ({"model": {"type": "models.sasrec.SASRec"}}, "model.type must name a configuration"),
        ({"model": {"type": "models.sasrec.Nothing.Config"}}, "model.type must name a configuration"),
        ({"model": {"type": "models.sasrec.SASRec.Config", "wide": 3}}, "there is no option model.wide"),
    ],
)
def test_a_value_that_does_not_fit_is_named_by_its_path(document, message):
    with pytest.raises(ConfigError, match=message):
        from_document(PretrainConfig, document)


@pytest.mark.parametrize(
    "name", ["os.system", "subprocess.Popen", "launch.cli.Path", "models.sasrec.dataclass"]
)
def test_a_type_outside_of_the_packages_is_never_reached(name):
    with pytest.raises(ConfigError, match=r"model\.type must name a configuration of cluster"):
        from_document(PretrainConfig, {"model": {"type": name}})


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']", "[1, 2", "- a\n- b"])
def test_yaml_that_is_no_plain_configuration_is_refused(text):
    with pytest.raises(ConfigError, match=r"runs/x/config\.yaml must"):
        from_yaml(text, "runs/x/config.yaml")
