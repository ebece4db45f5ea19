"""TDM: samples, loss and search against what is written out node by node."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cluster.errors import ConfigError, DataError
from models.drawn_positions import PLACES, drawn_events
from models.layers.window_attention import LatestEvents, WindowAttention
from models.recommender import StepContext
from models.semantic_ids import SemanticIds
from models.tdm import TDM
from models.tree_nodes import TreeNodes
from tests.generator_cases import NUM_ITEMS, TREES, lookup_ids, make_generator, tree_ids, unsharded_lookup
from tests.models.test_generators import histories
from tests.training_cases import make_batch

everyone = pytest.mark.parametrize("name", TREES)
CONTEXT = StepContext(step=7, seed=3)


def prepared(name: str, sequences=None):
    model = make_generator(name).eval()
    batch = model.training_batch(make_batch(histories() if sequences is None else sequences), CONTEXT)
    return model, batch, lookup_ids(model, model.ids(batch, CONTEXT))


@everyone
def test_the_loss_is_that_of_a_loop_over_samples_levels_and_nodes(name):
    model, batch, rows = prepared(name, histories()[2:])
    expected, items, lookup = 0.0, batch.items, unsharded_lookup(model)
    events, positions = drawn_events(batch), batch.supervision[PLACES]
    with torch.no_grad():
        for number, event in enumerate(events.tolist()):
            user = int(positions.row_index()[number])
            first, stop = items.offsets[user : user + 2].tolist()
            alone = make_batch([torch.cat((items.values[first : event + 1], torch.tensor([0])))])
            for depth in model.nodes.depths:
                nodes = model.samples(depth, batch, CONTEXT)[number]
                for place, label in zip(nodes, [1.0] + [0.0] * (len(nodes) - 1), strict=True):
                    ids = model.prompt_ids(alone) | model.node_ids(depth, place.view(1, 1), alone)
                    found = lookup(ids)
                    score = model.node_scores(depth, found, model.prefill(found, alone))[0, 0]
                    loss = F.binary_cross_entropy_with_logits(score, torch.tensor(label))
                    expected += float(loss) * (stop - first) / model.config.positions
        loss = model(rows, batch, CONTEXT)
    assert loss.count == batch.num_tokens
    assert float(loss.sum) == pytest.approx(expected, rel=1e-5)
    assert float(sum(loss.metrics.values())) == pytest.approx(expected, rel=1e-5)


def test_the_windows_of_the_past_are_short_where_it_is_near():
    published = TDM.Config().build(num_items=NUM_ITEMS, semantic_ids=tree_ids())
    assert published.attention.windows == (1, 1, 1, 2, 2, 2, 10, 10, 20, 20)
    assert published.layers[0].linear.weight.shape == (128, 11 * 24)


def test_attention_is_an_mlp_of_behaviour_product_and_candidate():
    torch.manual_seed(0)
    attention = WindowAttention(width=4, hidden=6, windows=(1, 2, 3))
    candidates, behaviours = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    latest = LatestEvents.build(torch.tensor([4, 7]), torch.tensor([0, 5]), 5)
    assert latest.events.tolist() == [[4, 3, 2, 1, 0], [7, 6, 5, 4, 3]]
    assert latest.is_there.tolist() == [[True] * 5, [True, True, True, False, False]]
    first = torch.cat((attention.of_behaviour, attention.of_product, attention.of_candidate), dim=1)
    found = attention(candidates, behaviours, latest.is_there)
    for sample, seen in ((0, 5), (1, 3)):
        for number, node in enumerate(candidates[sample]):
            weighted = []
            for behaviour in behaviours[sample][:seen]:
                hidden = first @ torch.cat((behaviour, behaviour * node, node)) + attention.bias
                weight = F.leaky_relu(hidden, 0.25) @ attention.output + attention.output_bias
                weighted.append(weight * behaviour)
            windows = [weighted[:1], weighted[1:3], weighted[3:6]]
            means = [torch.stack(w).mean(0) if w else torch.zeros(4) for w in windows]
            torch.testing.assert_close(found[sample, number], torch.cat(means), rtol=1e-4, atol=1e-5)


@everyone
def test_the_ancestors_of_what_was_taken_are_told_from_other_nodes_of_their_level(name):
    model, batch, _ = prepared(name)
    taken, codes = batch.targets[drawn_events(batch)], tree_ids().codes
    for depth in model.nodes.depths:
        nodes = model.samples(depth, batch, CONTEXT)
        assert nodes.shape == (len(taken), 1 + model.num_negatives[depth - 1])
        binary = (codes[:, :depth] * 2 ** torch.arange(depth - 1, -1, -1)).sum(1)
        # A node is positive if and only if an item below it is: the max-heap property of the targets.
        assert torch.equal(nodes[:, 0], binary[taken])
        assert not (nodes[:, 1:] == nodes[:, :1]).any()
        assert set(nodes.flatten().tolist()) <= set(binary.tolist())


def test_negatives_are_uniform_over_the_other_nodes_of_the_level():
    nodes, item, count = TreeNodes(tree_ids()), 11, 6000
    for depth in (1, 3, nodes.depth):
        drawn = nodes.draw_negatives(
            depth,
            torch.tensor([item]),
            count,
            seed=1,
            users=torch.tensor([5]),
            numbers=torch.tensor([0]),
        )
        others = nodes.trie.num_nodes(depth) - 1
        found, times = drawn.unique(return_counts=True)
        assert len(found) == others and int(nodes.above(depth, torch.tensor(item))) not in found.tolist()
        assert (times / count * others - 1).abs().max() < 6 * (others / count) ** 0.5


def test_the_samples_of_a_user_have_negatives_of_their_own():
    nodes, items = TreeNodes(tree_ids()), torch.tensor([11, 11, 11])
    users, numbers = torch.tensor([5, 5, 6]), torch.tensor([0, 1, 0])
    drawn = nodes.draw_negatives(nodes.depth, items, 20, seed=1, users=users, numbers=numbers)
    first, second, other = (set(row.tolist()) for row in drawn)
    # Of 96 nodes two times 20 have about four in common.
    assert max(len(first & second), len(first & other), len(second & other)) < 12


def test_negatives_depend_on_the_step_and_the_user_and_not_on_the_others():
    model = make_generator("tdm")
    both, alone = make_batch(histories()[:2]), make_batch(histories()[:1])
    (first, other), positions = (
        [
            [model.samples(7, model.training_batch(b, c), c) for b in (both, alone)]
            for c in (CONTEXT, replace(CONTEXT, step=8))
        ],
        model.config.positions,
    )
    assert torch.equal(first[0][:positions], first[1])
    assert not torch.equal(first[0], other[0])


def test_negatives_grow_towards_the_leaves():
    nodes = TreeNodes(tree_ids())
    numbers = nodes.negatives_per_depth(100)
    assert list(numbers) == sorted(numbers) and numbers[0] == 1 and numbers[-1] == 40
    assert all(number < nodes.trie.num_nodes(depth) for depth, number in enumerate(numbers, start=1))


@everyone
def test_users_in_one_batch_get_the_scores_they_get_one_by_one(name):
    model, sequences = make_generator(name).eval(), histories()
    batch, places = make_batch(sequences), torch.arange(12).expand(len(sequences), -1)
    for depth in (4, model.nodes.depth):
        scores = []
        for part, wanted in [(batch, places), *((make_batch([s]), places[:1]) for s in sequences)]:
            rows = lookup_ids(model, model.prompt_ids(part) | model.node_ids(depth, wanted, part))
            with torch.no_grad():
                scores.append(model.node_scores(depth, rows, model.prefill(rows, part)))
        torch.testing.assert_close(scores[0], torch.cat(scores[1:]), rtol=1e-4, atol=1e-6)


@everyone
def test_a_batch_without_users_has_a_loss_with_gradients(name):
    model, batch, rows = prepared(name, [])
    loss = model.train()(rows, batch, CONTEXT)
    assert loss.count == 0 and loss.sum == 0
    loss.sum.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_inner_nodes_have_rows_by_their_place_and_leaves_those_of_their_items():
    nodes = TreeNodes(tree_ids())
    rows = [nodes.rows(depth, torch.arange(2**depth)) for depth in nodes.inner_depths]
    assert torch.equal(torch.cat(rows), torch.arange(nodes.num_inner))
    assert torch.equal(nodes.rows(nodes.depth, nodes.leaves), torch.arange(NUM_ITEMS))


def test_what_is_no_tree_and_options_that_cannot_work_are_told():
    shared = SemanticIds(codes=torch.from_numpy(np.arange(6) // 2)[:, None].repeat(1, 2), code_sizes=(4, 4))
    with pytest.raises(DataError, match=r"have 2 levels and 3 items too many .* grail tokenize tree"):
        TreeNodes(shared)
    config = TREES["tdm"]
    for options, message in (
        ({"windows": ()}, "windows of TDM must be at least 1"),
        ({"positions": 0}, "model.positions must be at least 1, or None for all, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(config, **options)
    single = SemanticIds(codes=torch.tensor([[0, 0], [0, 1], [0, 2]]), code_sizes=(4, 4))
    with pytest.raises(
        ConfigError, match=r"level-negatives must be 0 where a level has one node, as level 1"
    ):
        replace(config, level_negatives=(1, 1)).build(num_items=3, semantic_ids=single)
    replace(config, level_negatives=(0, 1)).build(num_items=3, semantic_ids=single)
    with pytest.raises(ConfigError, match=r"level-negatives must hold 7 numbers, .* holds \(1, 2\)"):
        replace(config, level_negatives=(1, 2)).build(num_items=NUM_ITEMS, semantic_ids=tree_ids())
