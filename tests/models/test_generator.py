"""Teacher forcing with shared prompts against one pass per user and path."""

import torch

from models.decoding.distribution import CodeDistribution
from models.decoding.space import CatalogueSpace
from models.decoding.trie import PrefixTrie
from tests.models.decoding.tiny_generator import make_codes, make_generator, make_users, one_user

SIZES = (4, 5, 3)


def test_path_logits_equal_one_pass_per_path():
    model = make_generator(SIZES, 20)
    rows, batch = make_users([3, 11, 1, 6], 20)
    paths = make_codes(4 * 7, SIZES).view(4, 7, 3)
    logits = model.path_logits(rows, batch, paths)
    for user in range(4):
        history = one_user(rows, batch, user)[0]["history"].rows
        for number in range(7):
            expected = model.path_logits_one_by_one(history, paths[user, number])
            for level in range(3):
                torch.testing.assert_close(logits[level][user, number], expected[level], atol=1e-5, rtol=1e-5)


def test_gradients_of_shared_prompts_equal_those_of_one_pass_per_path():
    model = make_generator(SIZES, 20)
    rows, batch = make_users([3, 8], 20)
    history = rows["history"].rows.requires_grad_()
    paths = make_codes(2 * 4, SIZES).view(2, 4, 3)
    model.log_probabilities(rows, batch, paths).sum().backward()
    shared = [history.grad.clone(), *(parameter.grad.clone() for parameter in model.parameters())]
    history.grad = None
    model.zero_grad()
    for user in range(2):
        first, last = batch.items.offsets[user : user + 2].tolist()
        for path in paths[user]:
            logits = model.path_logits_one_by_one(history[first:last], path)
            sum(scores.log_softmax(0)[code] for scores, code in zip(logits, path, strict=True)).backward()
    alone = [history.grad, *(parameter.grad for parameter in model.parameters())]
    for ours, expected in zip(shared, alone, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_paths_outside_the_catalogue_have_no_probability_and_finite_gradients():
    model = make_generator(SIZES, 20)
    rows, batch = make_users([3], 20)
    trie = PrefixTrie.build(torch.tensor([[0, 1, 2], [0, 1, 0], [3, 4, 1]]), SIZES)
    paths = torch.tensor([[[0, 1, 2], [0, 1, 1], [0, 2, 0], [2, 1, 0], [-1, -1, -1], [3, 4, 1]]])
    result = model.log_probabilities(
        rows, batch, paths, space=CatalogueSpace(trie), distribution=CodeDistribution(temperature=0.5)
    )
    inside = torch.tensor(
        [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool
    )
    assert torch.equal(result[0] > float("-inf"), inside)
    assert result[0, 5, 1:].tolist() == [0.0, 0.0], "an only child is certain"
    result[result > float("-inf")].sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.heads[0].weight.grad.abs().sum() > 0
