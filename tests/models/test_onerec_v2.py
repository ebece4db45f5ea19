"""OneRec-V2: published sizes and costs, shared keys, targets, feedback, bad input."""

from dataclasses import replace

import pytest
import torch

from benchmarks.experiments.onerec_flops import encoder_decoder, gigaflops, lazy_decoder
from benchmarks.setting.flops import build_on_meta
from cluster.errors import ConfigError
from launch.recipes import onerec_v2
from models.layers.user_context import ContextConfig
from models.onerec_v2 import PUBLISHED, OneRecV2
from models.recommender import StepContext
from tests.generator_cases import GENERATORS, MAX_LENGTH, NUM_ITEMS, lookup_ids, make_generator, semantic_ids
from tests.training_cases import make_batch

CODES = (8192,) * 3
BLOCK_PARAMETERS = {"0.1b": 88, "0.2b": 173, "0.5b": 500, "1b": 1041, "2b": 2102, "4b": 4056, "8b": 7862}
"""Millions, worked out by hand: 18 x width^2 x blocks (2 + 4 + 12 per block) and three norms each."""
GIGAFLOPS = {"0.1b": 1.98, "0.5b": 9.55, "1b": 18.89}
"""Of the report, at a context of 512."""


def published(size: str) -> OneRecV2:
    config = replace(onerec_v2.recipe().model, size=size)
    return build_on_meta(config, code_sizes=CODES, max_length=512)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("size", BLOCK_PARAMETERS)
def test_published_sizes_have_the_published_numbers_of_parameters(size):
    model, shape = published(size), PUBLISHED[size]
    width, blocks = shape["width"], shape["num_blocks"]
    assert count(model.decoder.blocks) == blocks * (18 * width**2 + 3 * width)
    assert round(count(model.decoder.blocks) / 1e6) == BLOCK_PARAMETERS[size]
    billions = count(model.decoder.blocks) / 1e9
    assert round(billions, 0 if billions > 1 else 1) == float(size.removesuffix("b"))
    others = count(model) - count(model.decoder.blocks)
    context = 64 * 64 + 64 + 64 * width + width
    assert others == 2 * sum(CODES) * width + 5 * width + context


def test_the_published_mixture_has_4b_parameters_of_which_half_a_billion_are_active():
    model = published("4b-a0.5b")
    mixtures = [block.feedforward for block in model.decoder.blocks][2:]
    idle = sum(count(mixture.experts) for mixture in mixtures) * (53 - 3) / 53
    total = count(model.decoder.blocks)
    width, expert = 1408, 3 * 1408 * 1408
    assert total == 14 * (6 * width**2 + 3 * width) + 2 * 12 * width**2 + 12 * (54 * expert + 53 * width)
    assert (round(total / 1e9), round((total - idle) / 1e9, 1)) == (4, 0.5)


@pytest.mark.parametrize("size", GIGAFLOPS)
def test_a_step_costs_what_the_report_says(size):
    assert gigaflops(lazy_decoder(size), 512) == pytest.approx(GIGAFLOPS[size], rel=0.07)


def test_at_least_the_reported_share_of_an_encoder_decoder_of_equal_size_is_saved():
    lazy = lazy_decoder("1b")
    other = encoder_decoder(lazy)
    sizes = [count(build_on_meta(config, code_sizes=CODES, max_length=512)) for config in (lazy, other)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)
    assert gigaflops(lazy, 512) < (1 - 0.94) * gigaflops(other, 512)


def test_keys_and_values_are_shared_between_neighbouring_blocks():
    config = GENERATORS["onerec-v2"]
    assert (config.num_blocks, config.kv_layers, config.kv_split, config.kv_groups) == (3, 2, 2, 2)
    model = make_generator("onerec-v2")
    assert model.decoder.sources == (0, 0, 1)
    vectors = torch.randn(5, model.key_values.shape.context_dim)
    own = model.key_values(vectors, torch.zeros(5, dtype=torch.int64))
    chunks = torch.nn.functional.rms_norm(vectors.view(5, 4, 8), (8,)).view(5, 4, 2, 4)
    for place, part in enumerate((own[0].keys, own[0].values, own[1].keys, own[1].values)):
        torch.testing.assert_close(part, chunks[:, place])
    assert not any("key" in name and "query" not in name for name, _ in model.decoder.named_parameters())


def test_every_level_of_codes_has_a_norm_and_scores_of_its_own():
    model, hidden = make_generator("onerec-v2"), torch.randn(5, 16)
    for level, (norm, head) in enumerate(zip(model.norms, model.heads, strict=True)):
        torch.nn.init.normal_(norm.weight)
        expected = torch.nn.functional.rms_norm(hidden, (16,), norm.weight) @ head.weight.T
        torch.testing.assert_close(model.scores(level, hidden), expected)


def test_with_one_target_per_user_the_newest_alone_is_learnt():
    context, users = StepContext(step=0), [torch.arange(6), torch.arange(20, 23)]
    model = make_generator("onerec-v2")
    model.config = replace(model.config, targets_per_user=1)
    batch = model.training_batch(make_batch(users), context)
    loss = model(lookup_ids(model, model.ids(batch, context)), batch, context)
    assert model.num_targets(batch) == loss.count == 2
    prompts = make_batch(users)
    paths = semantic_ids().codes[torch.tensor([5, 22])][:, None]
    log_probs = model.log_probabilities(lookup_ids(model, model.prompt_ids(prompts)), prompts, paths)
    torch.testing.assert_close(loss.sum, -log_probs.sum())


def with_feedback(actions: list[int]) -> torch.Tensor:
    """Scores of the first codes after five events that were answered so."""
    config = replace(
        GENERATORS["onerec-v2"],
        context=ContextConfig(
            hidden=24, actions=True, play_time=True, positive_length=2, positive_actions=("like",)
        ),
    )
    assert config.event_columns == ("action", "play_time_s", "duration_s") and config.needs_actions
    torch.manual_seed(0)
    model = config.build(
        num_items=NUM_ITEMS,
        max_length=MAX_LENGTH,
        item_feature_dim=0,
        semantic_ids=semantic_ids(),
        actions=("click", "like"),
    )
    columns = {
        "action": torch.tensor(actions, dtype=torch.int8),
        "play_time_s": torch.arange(5.0),
        "duration_s": torch.full((5,), 9.0),
    }
    batch = replace(make_batch([torch.arange(6)]), features=columns)
    state = model.prefill(lookup_ids(model, model.prompt_ids(batch)), batch)
    return model.step(state, 0, None, None)[0]


def test_feedback_changes_what_is_recommended():
    assert not torch.allclose(with_feedback([0, 0, 0, 0, 0]), with_feedback([0, 1, 0, 0, 0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "must be a multiple of twice model.num-heads"),
        ({"kv_groups": 3}, r"must divide the 4 heads, got 3; use one of \[1, 2, 4\]"),
        ({"kv_layers": 5}, "must lie in 1..4, the number of blocks, got 5"),
        ({"num_dense_blocks": 5}, "must lie in 0..4, got 5"),
        ({"targets_per_user": 0}, "must be at least 1, got 0; leave it out to predict every event"),
        ({"size": "0.1b", "kv_layers": 13}, "must lie in 1..12"),
    ],
)
def test_impossible_shapes_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        OneRecV2.Config(**options)
