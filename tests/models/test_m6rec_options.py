"""Options of M6-Rec that do not fit each other are refused by name."""

from dataclasses import replace

import pytest

from cluster.errors import ConfigError
from launch.recipes import m6_rec
from tests.models.test_m6rec import FORWARD, make_model
from trainer.checks import check


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="separate-blocks must be 0 to 3"):
        make_model(FORWARD, separate_blocks=4)
    with pytest.raises(ConfigError, match="joint-tokens last needs lower layers"):
        make_model(FORWARD, separate_blocks=0, joint_tokens="last")
    with pytest.raises(ConfigError, match=r"num-soft-prompts must be at least 4 .* got 3"):
        make_model("m6-rec-ranking", tuning="option", num_soft_prompts=3)
    with pytest.raises(ConfigError, match="joint-tokens all, got last"):
        make_model("m6-rec-ranking", scoring="likelihood", joint_tokens="last")
    with pytest.raises(ConfigError, match=r"learns nothing but words; leave it out, got 0.5"):
        make_model("m6-rec-ranking", scoring="likelihood", language_weight=0.5)
    with pytest.raises(ConfigError, match="even width"):
        make_model(FORWARD, width=6, num_heads=2)
    with pytest.raises(ConfigError, match=r"at least 1, got model\.width 0, model\.adapter-width -1"):
        make_model(FORWARD, width=0, adapter_width=-1)
    with pytest.raises(ConfigError, match="max-tokens must be at least 1"):
        replace(make_model(FORWARD).config.text, max_tokens=0)


def test_a_frozen_language_model_must_have_learnt():
    recipe = m6_rec.recipe()
    tuned = replace(recipe, model=replace(recipe.model, tuning="option"))
    check(recipe)
    check(replace(tuned, init_from="runs/a"))
    with pytest.raises(ConfigError, match=r"frozen as it is.*--init-from RUN"):
        check(tuned)
