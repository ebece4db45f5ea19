"""GenRec: packed pages against one row per page, what masks hide, the merger, the page's loss, bad input."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from cluster.errors import ConfigError, DataError
from data_streams.batch import CLICKED, EXPOSED, ORDERED, Pages, SequenceBatch
from data_streams.configuration import DataConfig
from data_streams.jagged import Jagged
from models.genrec import GenRec, single_items
from models.recommender import StepContext
from tests.generator_cases import CODE_SIZES, MAX_LENGTH, NUM_ITEMS, semantic_ids
from trainer.checks import check
from trainer.configuration import PretrainConfig

CONTEXT = StepContext(step=0)
# User -> pages as (events before it, items and answers).
USERS = (
    (6, ((2, ((5, ORDERED), (9, CLICKED), (70, EXPOSED))), (5, ((11, CLICKED),)))),
    (3, ()),
    (11, ((1, ((40, CLICKED), (3, EXPOSED))), (4, ((8, ORDERED), (5, EXPOSED))), (11, ((96, CLICKED),) * 1))),
)


def make_genrec(**options) -> GenRec:
    config = GenRec.Config(
        **{"width": 16, "num_blocks": 2, "num_heads": 2, "feedforward_width": 32, "dropout": 0.0}
        | {"init_scale": 0.3, "page_items": 4}
        | options
    )
    torch.manual_seed(3)
    return config.build(
        num_items=NUM_ITEMS, max_length=MAX_LENGTH, item_feature_dim=0, semantic_ids=semantic_ids()
    ).eval()


def page_batch(users=USERS, histories=None) -> SequenceBatch:
    generator = torch.Generator().manual_seed(0)
    if histories is None:
        histories = [torch.randint(NUM_ITEMS, (length,), generator=generator) for length, _ in users]
    pages = [page for _, of_user in users for page in of_user]
    entries = torch.tensor([entry for _, page in pages for entry in page], dtype=torch.int64)
    entries = entries.view(-1, 2)
    counts = torch.tensor([len(page) for _, page in pages], dtype=torch.int64)
    before = torch.tensor([before for before, _ in pages], dtype=torch.int64)
    return SequenceBatch(
        user_ids=torch.arange(len(users)),
        items=Jagged.from_lengths(torch.cat(histories), torch.tensor([len(row) for row in histories])),
        pages=Pages(
            items=Jagged.from_lengths(entries[:, 0], counts),
            strengths=entries[:, 1],
            positions=torch.full((len(entries),), -1),
            history_lengths=Jagged.from_lengths(before, torch.tensor([len(pages) for _, pages in users])),
            times_s=torch.full((len(pages),), -1),
        ),
    )


def one_row_per_page(batch: SequenceBatch) -> SequenceBatch:
    """Every page with a copy of the history before it."""
    users, histories = [], []
    for user, (_, pages) in enumerate(USERS):
        for before, page in pages:
            first = int(batch.items.offsets[user])
            histories.append(batch.items.values[first : first + before])
            users.append((before, ((before, page),)))
    return page_batch(users, histories)


def loss_of(model: GenRec, batch: SequenceBatch):
    return model({}, model.training_batch(batch, CONTEXT), CONTEXT)


@pytest.mark.parametrize("target", ["page", "item"])
@pytest.mark.parametrize("options", [{}, {"merge": False, "separators": True}])
def test_packed_pages_are_one_row_per_page_with_gradients(target, options):
    model, batch = make_genrec(target=target, **options), page_batch()
    packed, separate = loss_of(model, batch), loss_of(model, one_row_per_page(batch))
    assert packed.count == separate.count == (9 if target == "page" else 6)
    torch.testing.assert_close(packed.sum, separate.sum, rtol=1e-5, atol=1e-4)
    parameters = list(model.parameters())
    given = torch.autograd.grad(packed.sum, parameters)
    for own, expected in zip(given, torch.autograd.grad(separate.sum, parameters), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def test_no_state_of_a_page_depends_on_what_its_mask_hides_bit_for_bit():
    model, batch = make_genrec(), page_batch()
    paths = model.item_codes[batch.pages.items.values]
    history, written = model.encode_pages(batch, paths)
    first_page, second_page = slice(0, 3), slice(3, 4)
    later = batch.items.values.clone()
    later[3] = (later[3] + 1) % NUM_ITEMS  # behind the first page of the first user, before the second
    changed_history = dataclasses.replace(batch, items=batch.items.with_values(later))
    of_history, of_pages = model.encode_pages(changed_history, paths)
    assert torch.equal(of_history[:3], history[:3]) and not torch.equal(of_history[3], history[3])
    assert torch.equal(of_pages[first_page], written[first_page])
    assert not torch.equal(of_pages[second_page], written[second_page])
    assert torch.equal(of_pages[4:], written[4:]), "other users"
    swapped = paths.clone()
    swapped[0] = model.item_codes[60]
    _, of_pages = model.encode_pages(batch, swapped)
    assert not torch.equal(of_pages[first_page], written[first_page])
    assert torch.equal(of_pages[3:], written[3:]), "pages do not see each other"
    swapped = paths.clone()
    swapped[2] = model.item_codes[60]
    _, of_pages = model.encode_pages(batch, swapped)
    assert torch.equal(of_pages[:2], written[:2]), "nor items that come later on their own page"


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"merge": False, "separators": True}, 4),
        ({"merge": True, "separators": True}, 2),
        ({"merge": False}, 3),
        ({"merge": True}, 1),
    ],
)
def test_the_merger_halves_the_prompt_with_separators_and_takes_a_third_without(options, tokens):
    model, batch = make_genrec(**options), page_batch()
    assert model.prefill({}, batch).lengths.tolist() == [6 * tokens, 3 * tokens, 11 * tokens]


def test_the_merger_begins_as_the_mean_of_the_codes():
    model = make_genrec(width=64, init_scale=0.02)
    vectors = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(0))
    difference = model.merger(vectors) - vectors.mean(1)
    expected = 0.02 * (3 * 64) ** 0.5
    assert difference.std().item() == pytest.approx(expected, rel=0.1)


def test_a_page_is_its_items_in_order_and_an_end_that_cannot_come_first():
    model = make_genrec()
    histories = [torch.tensor([4, 17, 33])]
    page = ((5, ORDERED), (9, EXPOSED))
    loss = loss_of(model, page_batch([(3, ((3, page),))], histories))
    first = model.log_probabilities(
        {}, page_batch([(3, ())], histories), semantic_ids().codes[torch.tensor([[5]])]
    )
    codes = semantic_ids().codes[[5, 9]]
    hidden = model.encode_pages(page_batch([(3, ((3, page),))], histories), codes)[1]
    with_end = lambda state: torch.cat((model.heads[0](state), model.end(state)), -1).log_softmax(-1)  # noqa: E731
    expected = first.sum() + with_end(hidden[0, 2])[codes[1, 0]] + with_end(hidden[1, 2])[CODE_SIZES[0]]
    for level in (1, 2):
        expected = expected + model.heads[level](hidden[1, level - 1]).log_softmax(-1)[codes[1, level]]
    torch.testing.assert_close(loss.sum, -expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss.metrics["loss_end"], -with_end(hidden[1, 2])[CODE_SIZES[0]].detach())


def test_point_wise_targets_are_the_chosen_items_after_the_history_of_their_page():
    pages = single_items(page_batch().pages)
    assert pages.items.values.tolist() == [5, 9, 11, 40, 8, 96]
    assert pages.items.lengths.tolist() == [1] * 6
    assert [row.tolist() for row in pages.history_lengths.values.split([3, 0, 3])] == [
        [2, 2, 5],
        [],
        [1, 4, 11],
    ]
    assert [b - a for a, b in pairwise(pages.history_lengths.offsets.tolist())] == [3, 0, 3]


def test_pages_that_are_missing_or_too_large_are_refused():
    with pytest.raises(DataError, match="without any"):
        loss_of(make_genrec(), dataclasses.replace(page_batch(), pages=None))
    with pytest.raises(DataError, match="with up to 3"):
        loss_of(make_genrec(page_items=2), page_batch())
    config = PretrainConfig(model=GenRec.Config(), data=DataConfig(path="x", semantic_ids="y"))
    with pytest.raises(ConfigError, match="learns whole pages"):
        check(config)
