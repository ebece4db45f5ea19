"""Shared-prompt attention against plain attention, one query at a time."""

import pytest
import torch

from cluster.errors import DataError
from data_streams.jagged import Jagged
from models.layers.shared_prompt_attention import (
    PromptKeyValues,
    PromptLayout,
    SuffixKeyValues,
    shared_prompt_attention,
)

HEADS, DIM, WIDTH = 2, 4, 3


def prompts(lengths: list[int]) -> tuple[Jagged, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    keys, values = torch.randn(2, sum(lengths), HEADS, DIM, generator=generator)
    return Jagged.from_lengths(torch.zeros(sum(lengths)), torch.tensor(lengths)), keys, values


def naive(queries, jagged, keys, values, suffix, scale):
    result = torch.empty_like(queries)
    for user in range(queries.shape[0]):
        first, last = jagged.offsets[user : user + 2].tolist()
        for number in range(WIDTH):
            own_keys, own_values = keys[first:last], values[first:last]
            if suffix is not None:
                own_keys = torch.cat((own_keys, suffix.keys[user, number]))
                own_values = torch.cat((own_values, suffix.values[user, number]))
            scores = torch.einsum("hd,nhd->hn", queries[user, number], own_keys) * scale
            result[user, number] = torch.einsum("hn,nhd->hd", scores.softmax(-1), own_values)
    return result


@pytest.mark.parametrize("lengths", [[5, 2, 9, 5, 1], [4, 4, 4], [7]])
@pytest.mark.parametrize("suffix_length", [0, 1, 3])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_many_queries_of_a_user_see_its_prompt_and_their_own_suffix(lengths, suffix_length, scale):
    jagged, keys, values = prompts(lengths)
    queries = torch.randn(len(lengths), WIDTH, HEADS, DIM)
    suffix = None
    for _ in range(suffix_length):
        suffix = SuffixKeyValues.append(suffix, *torch.randn(2, len(lengths), WIDTH, HEADS, DIM))
    prompt = PromptKeyValues.build(keys, values, PromptLayout.build(jagged))
    attended = shared_prompt_attention(queries, prompt, suffix, scale)
    expected = naive(queries, jagged, keys, values, suffix, scale or DIM**-0.5)
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)


def test_a_suffix_follows_its_parents():
    keys = torch.arange(6.0).view(2, 3, 1, 1, 1)
    suffix = SuffixKeyValues(keys=keys, values=-keys).reorder(torch.tensor([[2, 2, 0, 1], [0, 1, 1, 1]]))
    assert suffix.keys.flatten().tolist() == [2, 2, 0, 1, 3, 4, 4, 4]
    assert torch.equal(suffix.values, -suffix.keys)


def test_an_empty_prompt_is_refused():
    with pytest.raises(DataError, match="at least one token"):
        PromptLayout.build(Jagged.from_lengths(torch.zeros(3), torch.tensor([3, 0])))
