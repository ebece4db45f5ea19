"""What lower layers have said of a text is not computed again, and changes nothing."""

import pytest
import torch

from models.text_reading import Reading
from tests.models.test_m6rec import CONTEXT, FORWARD, PUBLISHED, looked_up, make_model, make_users
from tests.text_cases import TEXT_RANKERS

CANDIDATES = torch.tensor([[2, 9, 2], [1, -1, -1], [-1, 0, 5]])
LAST = {"joint_tokens": "last"}


def queries(model, users=None):
    users = users or make_users()
    ids = model.query_ids(users)
    return model.query(looked_up(model, ids), users), len(ids["segments"])


def scores(model):
    ids = model.candidate_ids(make_users(), CANDIDATES)
    found = model.logits(looked_up(model, ids), make_users(), CANDIDATES)
    return found[CANDIDATES >= 0], len(ids["segments"])


def as_if_new(model, ask):
    """The same weights without a memory."""
    model.train()
    found = ask(model)
    model.eval()
    return found


@pytest.mark.parametrize("options", [{}, LAST, {"separate_blocks": 0}])
@pytest.mark.parametrize("name", [PUBLISHED, FORWARD])
def test_queries_are_the_same_however_often_texts_were_read(name, options):
    if name == PUBLISHED:
        options = {**options, "positions": 1}
    model = make_model(name, **options)
    expected, all_tokens = as_if_new(model, queries)
    (first, read), (second, again) = queries(model), queries(model)
    others, fewer = queries(model, make_users([[0, 3, 10], [7]]))
    expected_others, _ = as_if_new(model, lambda model: queries(model, make_users([[0, 3, 10], [7]])))
    for found, wanted in ((first, expected), (second, expected), (others, expected_others)):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    # Then marks and profiles are read alone, and one new item.
    assert read == all_tokens and again < read and fewer < read


@pytest.mark.parametrize("name", TEXT_RANKERS)
def test_so_are_scores_of_candidates(name):
    model = make_model(name)
    expected, all_tokens = as_if_new(model, scores)
    for _ in range(3):
        found, read = scores(model)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert read < all_tokens


def test_a_full_memory_forgets_and_fills_up_again():
    model = make_model(FORWARD)
    expected, all_tokens = as_if_new(model, queries)
    model.encoder.remembered.most_rows = 5
    for _ in range(3):
        found, read = queries(model)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert read == all_tokens


def test_other_weights_are_not_answered_from_memory():
    model = make_model(FORWARD)
    before, _ = queries(model)
    model.train()
    with torch.no_grad():
        model.encoder.marks.weight.mul_(2)
    model.eval()
    after, _ = queries(model)
    torch.testing.assert_close(after, as_if_new(model, queries)[0])
    assert not torch.allclose(before, after)


def test_what_is_laid_out_and_never_read_does_not_harm():
    model = make_model(FORWARD)
    expected, _ = as_if_new(model, queries)
    model.query_ids(make_users())
    torch.testing.assert_close(queries(model)[0], expected)


def test_readings_in_another_order_are_refused():
    model = make_model(FORWARD)
    first, second = (model.query_ids(make_users()) for _ in range(2))
    model.encoder(Reading.of(looked_up(model, first)))
    with pytest.raises(RuntimeError, match="must be read in the order they were laid out in"):
        model.encoder(Reading.of(looked_up(model, second)))


def test_steps_of_training_and_likelihoods_read_everything():
    """A step is laid out in the background, also while validation answers from memory."""
    model = make_model(FORWARD)
    queries(model)
    batch = model.training_batch(make_users(), CONTEXT)
    assert not len(model.ids(batch, CONTEXT)["remembered_from"])
    spoken = make_model("m6-rec-ranking as published", scoring="likelihood", language_weight=0.0)
    tokens = [scores(spoken)[1] for _ in range(2)]
    assert tokens[0] == tokens[1]
