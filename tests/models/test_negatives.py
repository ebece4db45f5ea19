import math

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError
from models.objectives.in_batch_softmax import InBatchSoftmax
from models.objectives.negatives import NegativeSampler, NegativeSampling
from models.objectives.sampled_softmax import SampledSoftmax
from models.recommender import StepContext

COUNTS = np.array([0, 1, 4, 9, 16, 100, 0, 25])
STEPS = 2000


def sampler(**options):
    config = NegativeSampling(num_negatives=10, **options)
    return NegativeSampler(config, len(COUNTS), COUNTS)


def frequencies(drawn_by):
    """Mean number of draws of each item per step, over many steps."""
    drawn = torch.cat([drawn_by.draw(0, step) for step in range(STEPS)])
    return torch.bincount(drawn, minlength=len(COUNTS)) / STEPS


@pytest.mark.parametrize(("share", "uniform"), [(0.0, 10), (1.0, 0), (0.3, 7)])
def test_items_are_drawn_as_often_as_expected(share, uniform):
    drawn_by = sampler(popularity_share=share, popularity_power=0.5)
    roots = torch.tensor([0.0, 1, 2, 3, 4, 10, 0, 5])
    expected = uniform / 8 + (10 - uniform) * roots / roots.sum()
    torch.testing.assert_close(drawn_by.expected_counts(torch.arange(8)), expected)
    # Five standard deviations of the mean of a Poisson number.
    assert ((frequencies(drawn_by) - expected).abs() <= 5 * (expected / STEPS).sqrt()).all()


def test_a_step_draws_the_same_items_on_every_rank_and_other_steps_others():
    drawn_by = sampler(popularity_share=0.5)
    assert torch.equal(drawn_by.draw(3, 7), sampler(popularity_share=0.5).draw(3, 7))
    assert not torch.equal(drawn_by.draw(3, 7), drawn_by.draw(3, 8))
    assert not torch.equal(drawn_by.draw(3, 7), drawn_by.draw(4, 7))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_with_log_q_the_sum_over_negatives_estimates_that_over_the_catalogue(share):
    """exp(loss + s+) - exp(s+) is the estimated sum; its mean over many steps is the sum itself."""
    counts = np.arange(1, 31)
    config = SampledSoftmax.Config(
        num_negatives=16, popularity_share=share, log_q=True, normalised=False, temperature=1.0
    )
    objective = config.build(num_items=30, item_counts=counts)
    generator = torch.Generator().manual_seed(0)
    state, rows = torch.randn(1, 4, generator=generator), torch.randn(30, 4, generator=generator)
    target = torch.tensor([12])
    positive = (state @ rows[12]).item()
    estimates = []
    for step in range(STEPS):
        context = StepContext(step=step)
        ids = objective.ids(target, context)
        vectors = {name: rows[entry] for name, entry in ids.items()}
        loss = objective(objective.queries(state), target, vectors, ids, context).sum.item()
        estimates.append(math.exp(loss + positive) - math.exp(positive))
    others = [score for item, score in enumerate((rows @ state[0]).tolist()) if item != 12]
    expected = sum(math.exp(score) for score in others)
    assert abs(np.mean(estimates) - expected) <= 4 * np.std(estimates) / math.sqrt(STEPS)


def test_counts_are_asked_for_only_where_popularity_counts():
    assert not NegativeSampling().needs_item_counts
    assert NegativeSampling(popularity_share=0.5).needs_item_counts
    assert InBatchSoftmax.Config(log_q=True).needs_item_counts
    assert not InBatchSoftmax.Config(log_q=False).needs_item_counts


@pytest.mark.parametrize("counts", [None, np.zeros(5, dtype=np.int64)])
def test_popularity_without_training_events_is_refused(counts):
    with pytest.raises(ConfigError, match="needs training events to count, and there are none"):
        SampledSoftmax.Config(popularity_share=0.5).build(num_items=5, item_counts=counts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 0}, "objective.num-negatives must be at least 1, got 0"),
        ({"popularity_share": 1.5}, r"objective.popularity-share must lie in 0..1, got 1.5"),
    ],
)
def test_an_impossible_sampling_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        NegativeSampling(**options)
