"""TIGER: how tokens lie, who sees what, and all prefixes of a user in one pass against a row for each."""

from dataclasses import replace

import pytest
import torch

from cluster.errors import ConfigError
from data_streams.jagged import Jagged
from models.kernels.length_buckets import bucket_layout
from models.recommender import StepContext
from models.tables import hash_ids
from models.tiger import PREFIXES, History, Tiger, all_prefixes
from tests.generator_cases import MAX_LENGTH, NUM_ITEMS, TIGER, make_generator, prompt_rows, semantic_ids
from tests.training_cases import make_batch

CONTEXT = StepContext(step=0)


def rows(*lengths: int) -> Jagged:
    return Jagged.from_lengths(torch.arange(sum(lengths)), torch.tensor(lengths))


def test_a_user_token_comes_before_the_codes_of_each_row():
    history = History.build(rows(2, 1), 2)
    assert history.tokens.offsets.tolist() == [0, 5, 8] and history.tokens.max_length == 5
    assert history.tokens.values.tolist() == [0, 1, 1, 2, 2, 0, 1, 1]
    assert history.place_of_code.tolist() == [1, 2, 3, 4, 6, 7]
    assert history.order.tolist() == [0, 2, 3, 4, 5, 1, 6, 7], "two users, then six codes"


def test_a_target_sees_the_user_and_all_codes_up_to_the_item_before_it():
    history = History.build(rows(2), 2)
    (masks,) = history.prefix_masks(bucket_layout(history.tokens))
    assert masks[0].sum(1).tolist() == [0, 3, 3, 5, 5]
    assert masks[0, 1].tolist() == [True, True, True, False, False]


def test_all_prefixes_of_each_row():
    items = Jagged.from_lengths(torch.tensor([3, 5, 7]), torch.tensor([2, 1]))
    prefixes = all_prefixes(items)
    assert prefixes.values.tolist() == [3, 3, 5, 7] and prefixes.lengths.tolist() == [3, 1]
    assert all_prefixes(rows()).values.tolist() == []


def test_prefixes_belong_to_their_user_in_a_part_of_the_batch():
    batch = make_batch([torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6, 7])])
    part = make_generator("tiger").training_batch(batch, CONTEXT).select(1, 2)
    assert part.supervision[PREFIXES].values.tolist() == [4, 4, 5, 4, 5, 6]


def test_gradients_of_one_pass_over_users_equal_those_of_a_row_for_each_prefix():
    sequences = [torch.arange(5) + 20, torch.arange(9) * 3 + 1, torch.tensor([8, 8])]
    batch, gradients = make_batch(sequences), []
    model = make_generator("tiger, causal encoder")
    prompts = make_batch([sequence[: stop + 1] for sequence in sequences for stop in range(1, len(sequence))])
    prompts = replace(prompts, user_ids=batch.user_ids[batch.items.row_index()])
    paths = semantic_ids().codes[batch.targets][:, None]
    for loss in (
        model({}, batch, CONTEXT).sum,
        -model.log_probabilities(prompt_rows(model, prompts), prompts, paths).sum(),
    ):
        model.zero_grad()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("name", "sees_later"), [("tiger", True), ("tiger, causal encoder", False)])
def test_only_a_bidirectional_encoder_sees_later_items(name, sees_later):
    model = make_generator(name).eval()
    firsts = []
    for last in (5, 6):
        batch = make_batch([torch.tensor([1, 2, 3, last, 0])])
        firsts.append(model._encode(batch.user_ids, batch.items)[0][:7])
    assert torch.equal(*firsts) != sees_later


def test_the_user_token_is_a_hash_of_the_user():
    ids = torch.arange(10_000)
    counts = hash_ids(ids, 2000).bincount(minlength=2000)
    assert counts.max() < 20 and (counts == 0).float().mean() < 0.02
    model = make_generator("tiger").eval()
    batch = make_batch([torch.tensor([1, 2, 3])])
    path = semantic_ids().codes[None, None, 4]
    by_user = [
        model.log_probabilities({}, replace(batch, user_ids=torch.tensor([user])), path).sum().item()
        for user in range(20)
    ]
    tokens = hash_ids(torch.arange(20), TIGER["user_tokens"]).tolist()
    pairs = set(zip(tokens, by_user, strict=True))
    assert len(pairs) == len(set(by_user)) == len(set(tokens)) > 3


def test_a_model_without_user_tokens_is_refused():
    with pytest.raises(ConfigError, match=r"model.user-tokens, .* must be at least 1, got 0, 4, 4"):
        Tiger.Config(user_tokens=0)


def test_the_published_size_has_the_weights_of_the_published_shape():
    model = Tiger.Config().build(
        num_items=NUM_ITEMS, max_length=MAX_LENGTH, item_feature_dim=0, semantic_ids=semantic_ids()
    )
    block = 128 * 3 * 384 + 384 * 128 + 2 * 128 * 1024
    decoder_block = block + 128 * 3 * 384 + 384 * 128
    matrices = [p.numel() for name, p in model.named_parameters() if "blocks" in name and p.dim() == 2]
    assert sum(matrices) == 4 * (block + decoder_block)
