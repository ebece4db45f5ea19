"""The process reward model: its loss against a loop, its scores one by one, its draws, its tables."""

import dataclasses

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError
from models.decoding.trie import PrefixTrie
from models.drawn_positions import PLACES, draw_positions
from models.kernels.info_nce import info_nce
from models.objectives.negatives import draw_different
from models.path_reward import ProcessRewardConfig, negatives_name
from models.process_reward import ProcessReward
from models.recommender import StepContext
from models.semantic_ids import SemanticIds
from sharding.lookup import ItemFeatures, features_of_request
from tests.generator_cases import (
    CODE_SIZES,
    GENERATORS,
    MAX_LENGTH,
    NUM_ITEMS,
    lookup_ids,
    make_generator,
    semantic_ids,
    unsharded_lookup,
)
from tests.training_cases import make_batch

CONTEXT = StepContext(step=3, seed=1)


def histories(lengths=(4, 13, 2, 7)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(NUM_ITEMS, (length,), generator=generator) for length in lengths]


def make_promise(**prm):
    config = GENERATORS["promise"]
    config = dataclasses.replace(config, prm=dataclasses.replace(config.prm, **prm))
    torch.manual_seed(5)
    return config.build(
        num_items=NUM_ITEMS, max_length=MAX_LENGTH, item_feature_dim=0, semantic_ids=semantic_ids()
    ).eval()


def trained_on(model, batch, context=CONTEXT):
    batch = model.training_batch(batch, context)
    return batch, lookup_ids(model, model.ids(batch, context))


def test_info_nce_by_hand():
    scores = torch.tensor([[1.0, 2.0, 0.0], [0.0, 5.0, 0.0]])
    same = torch.tensor([[False, False], [True, False]])
    expected = [torch.tensor([1.0, 2.0, 0.0]).logsumexp(0) - 1, torch.tensor(2.0).log()]
    torch.testing.assert_close(info_nce(scores, same), torch.stack(expected))


@pytest.mark.parametrize(("positions", "likeness_negatives"), [(None, None), (2, None), (2, 15), (None, 15)])
def test_the_loss_is_that_of_a_loop_over_positions_depths_and_negatives(positions, likeness_negatives):
    model = make_promise(positions=positions, likeness_negatives=likeness_negatives)
    batch, rows = trained_on(model, make_batch(histories()))
    losses = model(rows, batch, CONTEXT).metrics
    lookup, codes = unsharded_lookup(model), semantic_ids().codes
    negatives = model.prm.draw_negatives(CONTEXT)
    places, total = batch.supervision[PLACES], torch.zeros(3)
    for user, place in zip(places.row_index().tolist(), places.values.tolist(), strict=True):
        first, stop = batch.items.offsets[user : user + 2].tolist()
        history = batch.items.values[first : first + place + 1]
        target = codes[batch.targets[first + place]]
        prompt = make_batch([torch.cat((history, history[:1]))])
        weight = 1 if positions is None else (stop - first) / positions
        for depth in (1, 2, 3):
            drawn = negatives[depth][: model.prm.config.num_negatives]
            drawn = drawn[(drawn != target[:depth]).any(1)]
            paths = torch.zeros(1, 1 + len(drawn), 3, dtype=torch.int64)
            paths[0, :, :depth] = torch.cat((target[None, :depth], drawn))
            scores = model.prefix_scores(lookup(model.prefix_ids(prompt, paths)), prompt, paths)
            total[depth - 1] += weight * -scores[0, :, depth - 1].log_softmax(0)[0].detach()
    for depth in (1, 2, 3):
        torch.testing.assert_close(losses[f"prm_loss_level_{depth}"], total[depth - 1], rtol=1e-4, atol=1e-3)


def test_scores_differ_by_less_than_bf16_can_tell():
    model = make_promise(likeness_negatives=None)
    batch, paths = make_batch(histories()), semantic_ids().codes.unique(dim=0)
    paths = paths.expand(batch.num_users, -1, -1)
    rows = lookup_ids(model, model.prefix_ids(batch, paths))
    with torch.no_grad():
        exact = model.prefix_scores(rows, batch, paths)
        with torch.autocast("cpu", torch.bfloat16):
            scores = model.prefix_scores(rows, batch, paths)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, atol=0.1, rtol=0.1)
    for user in range(batch.num_users):
        assert len(scores[user, :, 2].unique()) == paths.shape[1]


def test_the_likeness_is_told_from_all_its_negatives_at_all_positions():
    model = make_promise(positions=2, likeness_negatives=15)
    batch, rows = trained_on(model, make_batch(histories()))
    losses, prm = model(rows, batch, CONTEXT).metrics, model.prm
    paths, states = semantic_ids().codes[batch.targets], model.encode(rows, batch)
    users = (
        torch.nn.functional.normalize(prm.likeness.of_user(states), dim=-1) / prm.config.likeness_temperature
    )
    for depth, drawn in prm.draw_negatives(CONTEXT).items():
        assert len(drawn) == min(15, prm.trie.num_nodes(depth))
        positive = prm.candidates(paths[:, :depth], rows, "positive").vectors
        others = prm.candidates(drawn, rows, "negative").vectors
        total = torch.zeros(())
        for user, own, path in zip(users, positive, paths[:, :depth], strict=True):
            kept = others[(drawn != path).any(1)]
            total += -(torch.cat((own[None], kept)) @ user).log_softmax(0)[0].detach()
        torch.testing.assert_close(losses[f"likeness_loss_level_{depth}"], total, rtol=1e-4, atol=1e-3)


def test_the_likeness_learns_from_its_own_loss_alone():
    model = make_promise(positions=2, likeness_negatives=15)
    batch, rows = trained_on(model, make_batch(histories()))
    losses = model.prm.loss(model.encode(rows, batch), semantic_ids().codes[batch.targets], rows, batch)
    of_scores = torch.stack([loss for name, loss in losses.items() if name.startswith("prm")]).sum()
    weights = [model.prm.likeness.of_user.weight, model.prm.likeness.of_row.weight]
    assert torch.autograd.grad(of_scores, weights, allow_unused=True, retain_graph=True) == (None, None)
    assert all(
        gradient.abs().sum() > 0 for gradient in torch.autograd.grad(losses["likeness_loss_level_2"], weights)
    )


def test_prefixes_of_one_code_alone_have_no_rows_to_be_alike_by():
    single = SemanticIds(codes=torch.arange(NUM_ITEMS)[:, None], code_sizes=(NUM_ITEMS,))
    model = GENERATORS["promise"].build(
        num_items=NUM_ITEMS, max_length=MAX_LENGTH, item_feature_dim=0, semantic_ids=single
    )
    batch, rows = trained_on(model, make_batch(histories()))
    model(rows, batch, CONTEXT).sum.backward()
    missing = [name for name, weight in model.prm.named_parameters() if weight.grad is None]
    assert not missing, "a weight without a gradient stops ZeRO"


def test_negatives_are_prefixes_of_the_catalogue_and_all_of_them_where_there_are_few():
    model = make_promise(num_negatives=5, likeness_negatives=None)
    drawn = model.prm.draw_negatives(CONTEXT)
    trie = PrefixTrie.build(semantic_ids().codes, CODE_SIZES)
    assert sorted(drawn[1].flatten().tolist()) == list(range(4)), "fewer prefixes than negatives: all of them"
    assert [len(drawn[depth]) for depth in (2, 3)] == [5, 5]
    assert all((trie.find(prefixes) >= 0).all() for prefixes in drawn.values())
    assert all(len(prefixes.unique(dim=0)) == len(prefixes) for prefixes in drawn.values())
    assert not torch.equal(drawn[3], model.prm.draw_negatives(StepContext(step=4, seed=1))[3])


def test_every_part_of_a_batch_has_all_negatives_of_the_step():
    model = make_promise(num_negatives=5, likeness_negatives=None)
    batch = model.training_batch(make_batch(histories()), CONTEXT)
    for part in (batch, batch.select(0, 1), batch.select(1, 1)):
        for depth, drawn in model.prm.draw_negatives(CONTEXT).items():
            assert torch.equal(part.shared[negatives_name(depth)], drawn)


def drawn_again_and_again(number: int, wanted: int, generator: torch.Generator) -> list[int]:
    """The naive way: one after another, and once more where it has been drawn before."""
    drawn: list[int] = []
    while len(drawn) < min(number, wanted):
        one = int(torch.randint(number, (1,), generator=generator))
        if one not in drawn:
            drawn.append(one)
    return drawn


@pytest.mark.parametrize(("number", "wanted"), [(12, 3), (5, 3), (3, 3), (2, 3)])
def test_negatives_are_drawn_without_replacement_as_a_naive_loop_draws_them(number, wanted):
    draws = 3000
    counts = torch.zeros(2, number)
    together = torch.zeros(2, number, number)
    for way, draw in enumerate((draw_different, drawn_again_and_again)):
        generator = torch.Generator().manual_seed(way)
        for _ in range(draws):
            found = torch.as_tensor(draw(number, wanted, generator))
            assert len(set(found.tolist())) == len(found) == min(number, wanted)
            counts[way, found] += 1
            together[way, found[:, None], found[None]] += 1
    share = min(number, wanted) / number
    pair = share * (min(number, wanted) - 1) / (number - 1)
    torch.testing.assert_close(counts / draws, torch.full((2, number), share), atol=0.04, rtol=0)
    off_diagonal = together[:, ~torch.eye(number, dtype=torch.bool)] / draws
    torch.testing.assert_close(off_diagonal, torch.full_like(off_diagonal, pair), atol=0.04, rtol=0)


def test_candidates_do_not_see_each_other_nor_later_events():
    model = make_promise()
    lookup = unsharded_lookup(model)
    long, short = histories((9, 5))
    batch = make_batch([long, short])
    paths = semantic_ids().codes[torch.tensor([[3, 50, 7], [8, 9, 10]])]
    together = model.prefix_scores(lookup(model.prefix_ids(batch, paths)), batch, paths)
    for user, history in enumerate((long, short)):
        for number in range(3):
            alone = make_batch([history])
            one = paths[user : user + 1, number : number + 1]
            scores = model.prefix_scores(lookup(model.prefix_ids(alone, one)), alone, one)
            torch.testing.assert_close(scores[0, 0], together[user, number], rtol=1e-4, atol=1e-5)


def test_drawn_positions_depend_on_the_user_and_the_step_alone():
    sequences = histories((6, 12, 9))
    batch = dataclasses.replace(make_batch(sequences), user_ids=torch.tensor([7, 70, 5]))
    drawn = draw_positions(batch, CONTEXT, 3).supervision[PLACES]
    assert (drawn.values < batch.items.lengths.repeat_interleave(3)).all() and (drawn.values >= 0).all()
    last = draw_positions(batch.select(2, 3), CONTEXT, 3).supervision[PLACES]
    assert torch.equal(last.values, drawn.values[6:])
    later = draw_positions(batch, StepContext(step=4, seed=1), 3).supervision[PLACES]
    assert not torch.equal(later.values, drawn.values)


def test_a_large_depth_is_hashed_and_unknown_prefixes_have_no_row_of_their_own():
    prm = make_promise(most_rows=30, hash_rows=64).prm
    sizes = {spec.name: (spec.num_rows, spec.hash_rows) for spec in prm.tables()}
    trie = PrefixTrie.build(semantic_ids().codes, CODE_SIZES)
    assert sizes["path_2"] == (trie.num_nodes(2) + 1, None)
    assert sizes["path_3"] == (trie.num_nodes(3) + 1, 64)
    unknown = torch.tensor([[0, 99]])
    assert trie.find(unknown).item() == -1
    assert prm.path_ids(unknown) == {"path_2": torch.tensor([trie.num_nodes(2)])}
    known = torch.tensor([[[0, 1, 2], [0, 1, 1]]])
    assert prm.path_ids(known)["path_3"].tolist() == [(0 * 5 + 1) * 3 + 2, (0 * 5 + 1) * 3 + 1]


def test_whole_paths_bring_the_row_of_their_item_and_paths_of_no_item_none():
    model = make_promise()
    lookup, codes = unsharded_lookup(model), semantic_ids().codes
    every = torch.cartesian_prod(*(torch.arange(size) for size in CODE_SIZES))
    missing = every[model.prm.trie.find(every) < 0][:1]
    paths = torch.cat((codes[17:18], missing))
    rows = lookup(model.prm.path_ids(paths))
    plain = model.codes(paths).sum(1) * model.config.width**0.5
    item = lookup({"history": torch.tensor([17])})["history"].rows * model.config.width**0.5
    expected = model.prm.embed(plain + torch.cat((item, torch.zeros_like(item))))
    expected[0] += (
        lookup({"path_3": model.prm.trie.find(codes[17:18])})["path_3"].rows[0] * model.prm.width**0.5
    )
    torch.testing.assert_close(model.prm.candidates(paths, rows).tokens, expected)


def test_only_items_have_features_not_the_prefixes_of_a_prm():
    model = make_promise(most_rows=1, hash_rows=64)
    features = ItemFeatures(np.arange(2.0 * NUM_ITEMS, dtype=np.float32).reshape(NUM_ITEMS, 2))
    batch = model.training_batch(make_batch(histories()), CONTEXT)
    ids = model.ids(batch, CONTEXT)
    found = features_of_request(features, model.tables(), ids)
    assert set(found) == {"history", "positive_item", "negative_item"}
    torch.testing.assert_close(found["history"][:, 0], 2.0 * batch.items.values)
    assert features_of_request(None, model.tables(), ids) == {}


def test_the_model_of_a_prm_alone_has_the_same_scores_as_its_encoder_and_prm_in_the_joint_model():
    joint = make_promise()
    config = GENERATORS["promise"]
    shared = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(ProcessReward.Config)}
    alone = ProcessReward.Config(**shared).build(
        num_items=NUM_ITEMS, max_length=MAX_LENGTH, item_feature_dim=0, semantic_ids=semantic_ids()
    )
    weights = joint.state_dict()
    alone.load_state_dict({name: weights[name] for name in alone.state_dict()})
    batch, rows = trained_on(joint, make_batch(histories()))
    expected = joint(rows, batch, CONTEXT).metrics["prm_loss"]
    loss = alone.eval()(trained_on(alone, make_batch(histories()))[1], batch, CONTEXT)
    torch.testing.assert_close(loss.sum.detach(), expected)
    assert loss.count == batch.num_tokens


def test_a_prm_needs_blocks_sizes_negatives_and_positions():
    with pytest.raises(ConfigError, match=r"num-blocks of the PRM must be at least 1, .* got 0"):
        ProcessRewardConfig(num_blocks=0)
    for name, wrong in {"num_heads": 0, "width": 1, "feedforward_width": 0, "hash_rows": 0}.items():
        with pytest.raises(ConfigError, match=f"{name.replace('_', '-')} of the PRM must be .*, got {wrong}"):
            ProcessRewardConfig(**{name: wrong})
    for wrong in ({"num_negatives": 0}, {"positions": 0}):
        with pytest.raises(ConfigError, match="at least one negative and one position"):
            ProcessRewardConfig(**wrong)
    with pytest.raises(
        ConfigError, match="likeness-negatives of the PRM must be at least its num-negatives 8"
    ):
        ProcessRewardConfig(num_negatives=8, likeness_negatives=7)
    with pytest.raises(ConfigError, match="likeness-temperature of the PRM must be above 0, and got"):
        ProcessRewardConfig(likeness_temperature=0.0)
    assert make_generator("promise").num_targets(make_batch(histories())) == 22
