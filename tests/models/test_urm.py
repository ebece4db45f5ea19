"""URM: several queries per user against naive loops, no later event seen, packed as one by one; told in words."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from launch.recipes import sasrec
from models.drawn_positions import PLACES, drawn_events
from models.kernels import cross_entropy
from models.kernels.page_attention import PageLayout
from models.objectives.full_softmax import FullSoftmax
from models.objectives.sampled_softmax import SampledSoftmax
from models.recommender import StepContext
from models.tables import LookedUp
from models.urm import ACTION, URM
from sharding.item_index import ItemIndex
from tests.text_cases import by_letters, make_texts
from tests.trainer.test_evaluate import make_items
from tests.training_cases import NUM_ITEMS, make_batch
from trainer.assembly import build_model
from trainer.configuration import EvaluationConfig

MAX_LENGTH, ITEM_WIDTH, FEATURES = 12, 8, 5
CONTEXT = StepContext(step=3, seed=1)
ACTIONS = ("cart", "click", "exposure")
SAMPLED = SampledSoftmax.Config(num_negatives=6, log_q=True, temperature=0.5)


def make_model(objective=SAMPLED, asked="", num_users=5, **options) -> URM:
    torch.manual_seed(5)
    sizes = {"width": 16, "num_heads": 2, "feedforward_width": 24, "item_width": ITEM_WIDTH}
    config = URM.Config(
        **{**sizes, "dropout": 0.0, "init_scale": 0.5, "num_queries": 3, "positions": 8, **options}
    )
    parts = {"actions": ACTIONS} if config.by_action else {}
    if config.reads_text:
        parts["texts"] = make_texts(NUM_ITEMS, num_users)
    return config.build(
        num_items=NUM_ITEMS,
        max_length=MAX_LENGTH,
        item_feature_dim=FEATURES,
        objective=objective.build(num_items=NUM_ITEMS),
        asked=asked,
        **parts,
    ).eval()


def sequences(lengths=(2, 12, 5, 5, 1)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(NUM_ITEMS, (length + 1,), generator=generator) for length in lengths]


def make_users(users=None, first=0) -> SequenceBatch:
    batch = make_batch(sequences() if users is None else users, first)
    return replace(batch, target_features={ACTION: batch.targets.to(torch.int8) % 2})


def rows_of(model, ids, requires_grad=False):
    """Rows of each feature from the table it belongs to, and the items' features."""
    found = {name: LookedUp(ids=values, rows=torch.empty(len(values), 0)) for name, values in ids.items()}
    for number, table in enumerate(model.tables()):
        generator = torch.Generator().manual_seed(number)
        rows = torch.randn(table.num_rows, table.dim, generator=generator)
        features = torch.randn(NUM_ITEMS, FEATURES, generator=generator)
        for name in table.features:
            if name in ids:
                own = rows[ids[name]].requires_grad_(requires_grad)
                found[name] = LookedUp(ids=ids[name], rows=own, item_features=features[ids[name]])
    return found


def queries_of(model, batch):
    return model.query(rows_of(model, model.query_ids(batch)), batch)


def loss_of(model, batch):
    batch = model.training_batch(batch, CONTEXT)
    loss = model(rows_of(model, model.ids(batch, CONTEXT)), batch, CONTEXT)
    assert loss.count == model.num_targets(batch)
    return loss


@pytest.mark.parametrize("log_q", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_the_loss_over_several_queries_is_its_formula_and_the_best_query_alone_learns(
    log_q, normalised, monkeypatch
):
    monkeypatch.setitem(cross_entropy.BLOCK_CELLS, "cpu", 64 * 15)
    config = replace(SAMPLED, num_negatives=5, log_q=log_q, normalised=normalised)
    objective = config.build(num_items=NUM_ITEMS)
    generator = torch.Generator().manual_seed(0)
    states, target_rows, table = (
        torch.randn(*shape, generator=generator, requires_grad=True)
        for shape in ((70, 3, 4), (70, 4), (NUM_ITEMS, 4))
    )
    targets, negatives = torch.arange(70) % 7, torch.tensor([1, 2, 9, 9, 15])
    loss = objective(
        objective.queries(states),
        targets,
        {"target": objective.candidates(target_rows), "negative": objective.candidates(table[negatives])},
        {"target": targets, "negative": negatives},
        CONTEXT,
    )
    queries, positives, items = (
        F.normalize(part, dim=-1) if normalised else part for part in (states, target_rows, table)
    )
    correction = math.log(5 / NUM_ITEMS) if log_q else 0.0
    expected, best_of_positive = 0.0, []
    for t in range(70):
        # Indexing with the arg-max keeps the others out of the graph.
        products = [queries[t] @ positives[t] / 0.5, *(queries[t] @ items[j] / 0.5 for j in negatives)]
        best_of_positive.append(int(products[0].argmax()))
        positive, *others = (product[product.argmax()] for product in products)
        kept = [s - correction for s, j in zip(others, negatives, strict=True) if j != targets[t]]
        expected = expected + torch.stack([positive, *kept]).logsumexp(0) - positive
    assert len(set(best_of_positive)) == 3 and loss.count == 70
    torch.testing.assert_close(loss.sum, expected)
    inputs = [states, target_rows, table]
    for found, wanted in zip(
        torch.autograd.grad(loss.sum, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_score_is_the_best_product_of_the_projected_states_and_both_parts_of_an_item():
    model, batch = make_model(SampledSoftmax.Config(normalised=False), item_features=True), make_users()
    rows = rows_of(model, model.item_ids(torch.arange(NUM_ITEMS)))["target"]
    vectors = rows.rows + rows.item_features @ model.feature_projection.weight.T
    torch.testing.assert_close(model.item_vectors(rows), vectors)
    queries = queries_of(model, batch)
    assert queries.shape == (5, 3, ITEM_WIDTH)
    index = ItemIndex(vectors.detach(), num_items=NUM_ITEMS)
    items, scores = index.search(queries.detach(), 4)
    for user in range(5):
        naive = torch.stack([max(query @ vector for query in queries[user]) for vector in vectors])
        assert items[user].tolist() == naive.argsort(descending=True)[:4].tolist()
        torch.testing.assert_close(scores[user], naive.sort(descending=True).values[:4])


def test_the_decoder_reads_rows_and_features_through_one_layer():
    model = make_model(item_features=True)
    rows = rows_of(model, {"history": torch.tensor([4, 9])})["history"]
    layer = model.item_projection
    joined = torch.cat((rows.rows, rows.item_features), dim=1)
    torch.testing.assert_close(model.item_tokens(rows), joined @ layer.weight.T + layer.bias)


def test_one_query_without_an_objective_is_plain_retrieval_with_any_loss():
    for objective in (SAMPLED, FullSoftmax.Config(temperature=0.5)):
        model, batch = make_model(objective, num_queries=1), make_users()
        queries = queries_of(model, batch)
        assert queries.shape == (5, ITEM_WIDTH)
        prepared = model.training_batch(batch, CONTEXT)
        rows = rows_of(model, model.ids(prepared, CONTEXT))
        events = drawn_events(prepared)
        prefixes = [
            torch.cat((user[: place + 1], user[:1]))
            for user, places in zip(sequences(), prepared.supervision[PLACES].values.split(8), strict=True)
            for place in places
        ]
        vectors = {name: model.item_vectors(rows[name]) for name in model.objective.features}
        ids = {name: rows[name].ids for name in model.objective.features}
        expected = model.objective(
            queries_of(model, make_batch(prefixes)), batch.targets[events], vectors, ids, CONTEXT
        )
        torch.testing.assert_close(loss_of(model, batch).sum, expected.sum, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("words", [False, True])
def test_packed_users_are_users_one_by_one(words):
    model = make_model(by_action=True, positions=None, newest_item=True, reads_text=words)
    packed, batch = loss_of(model, make_users()), make_users()
    single = [make_users([user], first=number) for number, user in enumerate(sequences())]
    alone = [loss_of(model, user) for user in single]
    torch.testing.assert_close(packed.sum, sum(loss.sum for loss in alone), rtol=1e-5, atol=1e-4)
    assert packed.count == sum(loss.count for loss in alone) == batch.num_tokens
    queries = torch.cat([queries_of(model, user) for user in single])
    torch.testing.assert_close(queries_of(model, batch), queries, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("newest", "words"), [(False, False), (True, False), (True, True)])
def test_no_query_depends_on_a_later_event_bit_for_bit(newest, words):
    options = {"positions": None, "newest_item": newest, "reads_text": words}
    model, batch = make_model(by_action=True, **options), make_users()
    prepared = model.training_batch(batch, CONTEXT)
    changed = prepared.items.values.clone()
    start, stop = int(batch.items.offsets[1]), int(batch.items.offsets[2])
    changed[start + 6] = (changed[start + 6] + 1) % NUM_ITEMS
    before, after = (all_queries(model, prepared, items) for items in (prepared.items.values, changed))
    differs = (before != after).flatten(1).any(1)
    assert differs.nonzero()[:, 0].tolist() == list(range(start + 6, stop))


def all_queries(model, batch, items):
    batch = replace(batch, items=batch.items.with_values(items))
    return model.ask(rows_of(model, model.ids(batch, CONTEXT)))


def test_the_last_query_token_knows_those_before_it_and_none_behind_it():
    model, batch = make_model(), make_users()
    before = queries_of(model, batch)
    with torch.no_grad():
        model.tokens.weight[1] += 1.0
    same = (queries_of(model, batch) == before).all(-1).all(0)
    assert same.tolist() == [True, False, False]


def test_the_objective_that_is_asked_for_changes_the_queries_and_is_what_training_was_told():
    clicks, carts = (make_model(by_action=True, asked=asked) for asked in ("", "cart"))
    batch = make_users()
    assert (clicks.asked, carts.asked) == (1, 0)
    first, second = queries_of(clicks, batch), queries_of(carts, batch)
    assert not torch.isclose(first, second).all(-1).any()
    prepared = replace(batch, target_features={ACTION: torch.zeros_like(batch.targets)})
    prepared = clicks.training_batch(prepared, StepContext(step=0))
    ends = prepared.supervision[PLACES].values + 1 == prepared.items.lengths.repeat_interleave(8)
    trained = all_queries(clicks, prepared, prepared.items.values)[ends]
    user = prepared.supervision[PLACES].row_index()[ends]
    assert len(user)
    torch.testing.assert_close(trained, second[user], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_a_row_serves_both_ends_or_each_has_its_own(shared):
    model, batch = make_model(shared_rows=shared), make_users()
    names = [table.name for table in model.tables()]
    assert names == (["item"] if shared else ["item", "output"])
    prepared = model.training_batch(batch, CONTEXT)
    ids = model.ids(prepared, CONTEXT)
    features = {name for table in model.tables() for name in table.features}
    assert features < set(ids)
    rows = rows_of(model, ids, requires_grad=True)
    model(rows, prepared, CONTEXT).sum.backward()
    assert all(rows[name].rows.grad.any() for name in features)
    assert all(weights.grad is not None and weights.grad.any() for weights in model.parameters())


def test_a_prompt_in_words_is_the_profile_the_items_the_objective_and_the_queries_in_one_row():
    model, batch = make_model(by_action=True, reads_text=True, asked="cart"), make_users()
    history = rows_of(model, model.query_ids(batch))["history"]
    items = model.item_tokens(history)
    said = by_letters(["the next item to cart"])
    for user, queries in enumerate(queries_of(model, batch)):
        start, stop = batch.items.offsets[user : user + 2]
        words = [row_of(model.texts.users, user), said.values]
        profile, objective = (model.vocabulary(part.long()) for part in words)
        row = torch.cat((profile, items[start:stop], objective, model.tokens.weight))
        states = model.decoder(row, torch.arange(len(row)), only_history(len(row)))[-3:]
        expected = F.normalize(model.query_projection(states).float(), dim=-1)
        torch.testing.assert_close(F.normalize(queries, dim=-1), expected, rtol=1e-5, atol=1e-5)


def only_history(length: int) -> PageLayout:
    none = torch.zeros(0, dtype=torch.int64)
    pages, visible = Jagged.from_lengths(none, none), Jagged.from_lengths(none, torch.zeros(1).long())
    return PageLayout.build(Jagged.from_lengths(torch.zeros(length), torch.tensor([length])), pages, visible)


def row_of(rows: Jagged, number: int) -> torch.Tensor:
    return rows.values[rows.offsets[number] : rows.offsets[number + 1]]


def test_an_objective_may_be_told_in_any_words():
    said = {"descriptions": ("cart=goes into the cart",), "by_action": True, "reads_text": True}
    batch = make_users()
    by_name, in_words, in_others = (
        queries_of(make_model(asked=asked, **said), batch)
        for asked in ("cart", "goes into the cart", "is returned")
    )
    torch.testing.assert_close(by_name, in_words, rtol=0, atol=0)
    assert not torch.isclose(by_name, in_others).all(-1).any()


def test_a_rank_without_users_takes_part():
    model, nobody = make_model(by_action=True, reads_text=True), make_users([])
    loss = loss_of(model, nobody)
    loss.sum.backward()
    assert (loss.sum, loss.count) == (0, 0)
    assert all(weights.grad is not None for weights in model.parameters())
    assert queries_of(model, nobody).shape == (0, 3, ITEM_WIDTH)


def test_what_cannot_work_is_refused():
    for options in ({"num_queries": 0}, {"positions": 0}):
        with pytest.raises(ConfigError, match=r"must be at least 1"):
            URM.Config(**options)
    with pytest.raises(ConfigError, match=r"model.num-queries 3 needs --objective sampled-softmax"):
        make_model(FullSoftmax.Config())
    with pytest.raises(ConfigError, match=r"must be an action .* of cart, click; got exposure"):
        make_model(by_action=True, asked="exposure")
    with pytest.raises(ConfigError, match=r"must be an action .* of none; got click"):
        make_model(asked="click")
    with pytest.raises(ConfigError, match=r"model.reads-text needs something to read"):
        make_model(reads_text=True, num_users=0)
    with pytest.raises(
        ConfigError, match=r"model.descriptions need --model.reads-text and --model.by-action"
    ):
        URM.Config(descriptions=("cart=goes into the cart",), reads_text=True)
    for wrong in ("like=is liked", "cart"):
        with pytest.raises(
            ConfigError, match=r"must be ACTION=WORDS with an action of cart, click, exposure"
        ):
            make_model(by_action=True, reads_text=True, descriptions=(wrong,))
    with pytest.raises(ConfigError, match=r"model.by-action needs data with actions"):
        URM.Config(by_action=True).build(
            num_items=9, max_length=4, item_feature_dim=0, objective=SAMPLED.build(num_items=9)
        )


def test_a_model_of_one_objective_cannot_be_asked_for_another():
    config = replace(sasrec.recipe(), evaluation=EvaluationConfig(objective="purchase"))
    with pytest.raises(
        ConfigError, match=r"evaluation.objective purchase needs a model of several objectives"
    ):
        build_model(config, make_items(), None, None)
