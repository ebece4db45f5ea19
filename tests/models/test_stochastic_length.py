import numpy as np
import torch

from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.recommender import StepContext
from models.stochastic_length import shorten_histories

MAX_LENGTH = 64
ALPHA = 1.5
KEPT = 22  # 64 ** 0.75 = 22.6


def make_users(lengths, first_user=0):
    total = sum(lengths)
    return SequenceBatch(
        user_ids=torch.arange(first_user, first_user + len(lengths)),
        items=Jagged.from_lengths(torch.arange(total), torch.tensor(lengths)),
        targets=torch.arange(total) + 1000,
        features={"timestamp_s": torch.arange(total) * 10},
        target_features={"timestamp_s": torch.arange(total) * 10 + 10},
    )


def shorten(batch, step=0, seed=0, world_size=1):
    context = StepContext(step=step, seed=seed, world_size=world_size)
    return shorten_histories(batch, context, alpha=ALPHA, max_length=MAX_LENGTH)


def test_short_histories_stay_whole():
    batch = make_users([1, KEPT, 5])
    assert shorten(batch) is batch


def test_a_length_that_is_a_whole_number_is_not_rounded_down():
    # 32 ** 0.6 is 8, and 7.999999999999999 to the machine.
    context = StepContext(step=0, seed=0)
    shortened = shorten_histories(make_users([32] * 50), context, alpha=1.2, max_length=32)
    assert set(shortened.items.lengths.tolist()) == {8, 32}


def test_a_long_history_is_cut_to_the_chosen_length_or_kept_whole():
    lengths = {int(shorten(make_users([60], user)).items.lengths[0]) for user in range(200)}
    assert lengths == {KEPT, 60}


def test_the_share_kept_whole_is_that_of_the_paper():
    shortened = shorten(make_users([60] * 4000))
    share = (shortened.items.lengths == 60).float().mean().item()
    assert abs(share - MAX_LENGTH**ALPHA / 60**2) < 0.02


def test_an_event_keeps_its_order_target_and_columns():
    shortened = shorten(make_users([60, 3, 64]))
    for values in shortened.items.values.split(shortened.items.lengths.tolist()):
        assert (values.diff() > 0).all()
    events = shortened.items.values
    assert torch.equal(shortened.targets, events + 1000)
    assert torch.equal(shortened.features["timestamp_s"], events * 10)
    assert torch.equal(shortened.target_features["timestamp_s"], events * 10 + 10)


def test_newer_events_are_kept_more_often():
    events = shorten(make_users([60] * 2000)).items.values.numpy() % 60
    counts = np.bincount(events, minlength=60)
    assert counts[40:].sum() > 2 * counts[:20].sum()


def test_a_user_is_cut_alike_whoever_shares_the_step():
    alone = shorten(make_users([60], first_user=3), step=7)
    together = shorten(make_users([60, 60, 60], first_user=2), step=7)
    second = together.items.values.split(together.items.lengths.tolist())[1]
    assert torch.equal(alone.items.values, second - 60)


def test_steps_and_seeds_draw_anew():
    batch = make_users([60] * 20)
    first = shorten(batch).items.values
    assert not torch.equal(first, shorten(batch, step=1).items.values)
    assert not torch.equal(first, shorten(batch, seed=1).items.values)
