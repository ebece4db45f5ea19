import dataclasses

import pytest

from cluster.errors import ConfigError
from launch.config_document import to_document
from launch.recipes.sasrec import recipe
from trainer.settings import changed_settings


def test_a_run_that_goes_on_says_what_was_changed_and_keeps_its_seed():
    config = recipe()
    saved = to_document(config)
    train = dataclasses.replace(config.train, epochs=99, keep_last=7)
    assert changed_settings(saved, to_document(dataclasses.replace(config, train=train))) == []
    train = dataclasses.replace(train, learning_rate=0.25)
    changed = dataclasses.replace(config, train=train, data=dataclasses.replace(config.data, path="other"))
    assert changed_settings(saved, to_document(changed)) == [
        "data.path  -> other",
        f"train.learning-rate {config.train.learning_rate} -> 0.25",
    ]
    with pytest.raises(ConfigError, match="must keep its seed, which is 0, and 4 was given"):
        changed_settings(saved, to_document(dataclasses.replace(config, seed=4)))


def test_an_alignment_says_by_what_else_it_learns_now():
    terms = {"hit": {"name": "hit", "weight": 1.0, "reward": {"type": "hit"}}}
    saved = {"align": {"temperature": 1.0, "stop_on": [], "objective": {"alpha": 0.1}, "rewards": terms}}
    heavier = {"hit": {**terms["hit"], "weight": 2.0}}
    now = {"temperature": 0.3, "stop_on": ["reward-hacking"], "objective": {"alpha": 0.1}, "rewards": heavier}
    assert changed_settings(saved, {"align": now}) == [
        "align.temperature 1.0 -> 0.3",
        "align.rewards.hit.weight 1.0 -> 2.0",
    ]


def test_what_one_of_two_versions_does_not_know_is_no_change():
    assert changed_settings({}, to_document(recipe())) == []
    assert changed_settings({"train": {"former": 1}}, {"train": {"learning_rate": 1.0}, "seed": 3}) == []
