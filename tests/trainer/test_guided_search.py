"""Searches that a process reward model steers: against plain beams, on one and two ranks, and what is refused."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from cluster.errors import ConfigError
from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.configuration import DataConfig
from data_streams.jagged import Jagged
from data_streams.semantic_ids import SemanticIdTable
from models.process_reward import ProcessReward
from models.recommender import Recommender
from models.tables import Lookup
from sharding.configuration import ShardingConfig
from sharding.lookup import make_lookup
from tests.generator_cases import (
    GENERATORS,
    MAX_LENGTH,
    NUM_ITEMS,
    make_generator,
    semantic_ids,
    unsharded_lookup,
)
from tests.process_group import run_on_processes
from trainer.configuration import PretrainConfig, SearchConfig
from trainer.generative_search import GenerativeSearch, PrefixReward, check_prm

CPU = torch.device("cpu")
WIDTH = 6


def users(count: int, seed: int = 0) -> SequenceBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, MAX_LENGTH, (count,), generator=generator)
    items = Jagged.from_lengths(torch.randint(NUM_ITEMS, (int(lengths.sum()),), generator=generator), lengths)
    held_out = torch.randint(NUM_ITEMS, (count,), generator=generator)
    return SequenceBatch(user_ids=torch.arange(count), items=items, held_out=held_out, seen=items)


class Counting:
    """A lookup that counts its calls."""

    def __init__(self, lookup: Lookup):
        self.lookup, self.calls = lookup, 0

    def __call__(self, ids):
        self.calls += 1
        return self.lookup(ids)


def make_search(model, lookup, *, reward=None, process=None, **options) -> GenerativeSearch:
    config = SearchConfig(width=WIDTH, prm=reward is not None, **options)
    return GenerativeSearch.build(
        model, lookup, semantic_ids().codes, config=config, device=CPU, process=process, reward=reward
    )


def own_prm(model: Recommender, lookup: Lookup) -> PrefixReward:
    return PrefixReward(model=model, lookup=lookup)


def prm_alone() -> ProcessReward:
    config = GENERATORS["promise"]
    shared = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(ProcessReward.Config)}
    torch.manual_seed(11)
    return ProcessReward.Config(**shared).build(
        num_items=NUM_ITEMS, max_length=MAX_LENGTH, item_feature_dim=0, semantic_ids=semantic_ids()
    )


def test_as_many_candidates_as_the_beam_is_wide_leave_its_set_as_it_is():
    model = make_generator("promise")
    lookup, batch = unsharded_lookup(model), users(5)
    plain = make_search(model, lookup)._decode(batch, batch.seen)
    guided = make_search(model, lookup, reward=own_prm(model, lookup), candidates=(WIDTH,))
    found = guided._decode(batch, batch.seen)
    for own, expected in zip(found.kept, plain.kept, strict=True):
        assert torch.equal(own.sort(1).values, expected.sort(1).values)
    assert not torch.equal(found.kept[-1], plain.kept[-1]), "the PRM orders the result"


def test_the_result_is_ordered_by_the_scores_of_the_prm():
    model = make_generator("promise").eval()
    lookup, batch = unsharded_lookup(model), users(5)
    search = make_search(model, lookup, reward=own_prm(model, lookup), candidates=(NUM_ITEMS,))
    found = search.find(batch, k=WIDTH, rank_held_out=False, filter_seen=False)
    paths = semantic_ids().codes[found.items]
    with torch.no_grad():
        scores = model.prefix_scores(lookup(model.prefix_ids(batch, paths)), batch, paths)[..., -1]
    torch.testing.assert_close(found.scores, scores, rtol=1e-4, atol=1e-5)
    assert (found.scores.diff(dim=1) <= 0).all()


def test_the_prm_chooses_at_the_depths_it_is_asked_for():
    model = make_generator("promise")
    lookup, batch = unsharded_lookup(model), users(5)
    plain = make_search(model, lookup)._decode(batch, batch.seen)
    last = make_search(model, lookup, reward=own_prm(model, lookup), candidates=(24,), prm_depths=(3,))
    kept = [nodes.sort(1).values for nodes in last._decode(batch, batch.seen).kept]
    assert all(torch.equal(kept[depth], plain.kept[depth].sort(1).values) for depth in (0, 1))
    assert not torch.equal(kept[2], plain.kept[2].sort(1).values)
    with pytest.raises(ConfigError, match="the levels of the semantic IDs"):
        make_search(model, lookup, reward=own_prm(model, lookup), prm_depths=(4,))


@pytest.mark.parametrize("earlier", [(2, 3), (2, 9)])
def test_the_prm_leaves_narrower_and_wider_earlier_beams_alone_where_it_is_not_to_choose(earlier):
    model = make_generator("promise")
    lookup, batch = unsharded_lookup(model), users(5)
    plain = make_search(model, lookup, earlier_widths=earlier)._decode(batch, batch.seen)
    reward = own_prm(model, lookup)
    last = make_search(model, lookup, reward=reward, earlier_widths=earlier, prm_depths=(3,))
    for own, expected in zip(last._decode(batch, batch.seen).kept[:2], plain.kept[:2], strict=True):
        assert torch.equal(own.sort(1).values, expected.sort(1).values)


def test_each_depth_has_its_own_width_and_candidates():
    model = make_generator("promise")
    lookup, batch = unsharded_lookup(model), users(5)
    one = make_search(model, lookup, reward=own_prm(model, lookup), candidates=(24,), prm_depths=(2, 3))
    by_depth = make_search(model, lookup, reward=own_prm(model, lookup), depth_candidates=(WIDTH, 24, 24))
    for own, expected in zip(by_depth._decode(batch, None).kept, one._decode(batch, None).kept, strict=True):
        assert torch.equal(own, expected)
    narrow = make_search(model, lookup, earlier_widths=(2, 3))._decode(batch, None)
    assert [nodes.shape[1] for nodes in narrow.kept] == [2, 3, WIDTH]
    for option in ("earlier_widths", "depth_candidates"):
        with pytest.raises(ConfigError, match=f"search.{option.replace('_', '-')} must hold"):
            make_search(model, lookup, reward=own_prm(model, lookup), **{option: (WIDTH,)})


@pytest.mark.parametrize("candidates", [WIDTH, 4 * WIDTH])
def test_the_decoder_runs_as_often_whatever_the_number_of_candidates(candidates):
    model = make_generator("promise")
    lookup, tokens = unsharded_lookup(model), []
    model.decoder.final_norm.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].shape[:2]))
    search = make_search(model, lookup, reward=own_prm(model, lookup), candidates=(candidates,))
    search.find(users(5), k=WIDTH, rank_held_out=True, filter_seen=True)
    assert tokens == [(5, 1), (5, min(WIDTH, 4)), (5, WIDTH)]


def test_a_prm_alone_steers_any_generator_of_its_semantic_ids_and_searches_by_itself():
    generator, prm, batch = make_generator("decoder-only, codes alone"), prm_alone().eval(), users(5)
    of_prm = unsharded_lookup(prm)
    reward = PrefixReward(model=prm, lookup=of_prm)
    steered = make_search(generator, unsharded_lookup(generator), reward=reward, candidates=(NUM_ITEMS,))
    found = steered.find(batch, k=WIDTH, rank_held_out=False, filter_seen=True)
    alone = make_search(prm, of_prm, reward=reward).find(
        batch, k=WIDTH, rank_held_out=False, filter_seen=True
    )
    torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.items, alone.items), (
        "where the generator proposes everything, the PRM decides alone"
    )


def test_a_prm_alone_is_asked_about_every_prefix_that_goes_on_from_the_beam():
    prm, asked = prm_alone().eval(), []
    lookup, config = unsharded_lookup(prm), SearchConfig(width=2, prm=True)
    search = GenerativeSearch.build(
        *(prm, lookup, semantic_ids().codes),
        config=config,
        device=CPU,
        reward=PrefixReward(model=prm, lookup=lookup),
    )
    score = prm.prm.score
    prm.prm.score = lambda candidates, memory: (
        asked.append(candidates.tokens.shape[1]) or score(candidates, memory)
    )
    search.find(users(5), k=2, rank_held_out=False, filter_seen=True)
    assert asked == [4, 2 * 5, 2 * 3]


def find_on_rank(process: Process) -> dict:
    from sharding.apply import ShardedTables

    model = make_generator("promise")
    tables = ShardedTables(
        model.tables(), process=process, config=ShardingConfig(), seed=1, learning_rate=0.1
    )
    lookup = Counting(make_lookup(model.tables(), tables, None, CPU))
    search = make_search(model, lookup, reward=own_prm(model, lookup), process=process)
    batch = users(5) if process.rank == 0 else users(0)
    found = search.find(batch, k=WIDTH, rank_held_out=True, filter_seen=True)
    return {"items": found.items, "ranks": found.ranks, "lookups": lookup.calls}


def test_a_rank_without_users_takes_part_in_every_lookup():
    first, second = run_on_processes(find_on_rank, 2)
    model = make_generator("promise")
    lookup = unsharded_lookup(model)
    search = make_search(model, lookup, reward=own_prm(model, lookup))
    alone = search.find(users(5), k=WIDTH, rank_held_out=True, filter_seen=True)
    assert torch.equal(first["items"], alone.items) and torch.equal(first["ranks"], alone.ranks)
    assert first["lookups"] == second["lookups"] == 3 and second["items"].shape == (0, WIDTH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prm": True, "candidates": (40, 80)}, "search.candidates must not be below search.width"),
        ({"candidates": (100,)}, "say how --search.prm works"),
        ({"prm_run": "runs/x"}, "say how --search.prm works"),
        ({"depth_candidates": (50, 200)}, "say how --search.prm works"),
        ({"prm": True, "candidates": (60,), "depth_candidates": (50, 200)}, "must stand without"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SearchConfig(width=50, **options)


def make_run(model: Recommender, *, shift: int = 0, max_length: int = MAX_LENGTH) -> SimpleNamespace:
    codes = np.roll(semantic_ids().codes.numpy(), shift, axis=0).astype(np.int32)
    table = SemanticIdTable(item_ids=pl.Series(range(NUM_ITEMS)), codes=codes, code_sizes=(4, 5, 3))
    config = PretrainConfig(run_dir="runs/x", data=DataConfig(max_length=max_length))
    return SimpleNamespace(model=model, semantic_ids=table, config=config)


def test_a_prm_that_does_not_fit_is_refused():
    run, prm = make_run(make_generator("decoder-only")), prm_alone()
    check_prm(make_run(prm), run)
    for other, message in (
        (run, "needs a process reward model, and the DecoderOnly"),
        (make_run(prm, shift=1), "must know the semantic IDs of the run it steers"),
        (make_run(prm, max_length=4), "histories as long"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_prm(other, run)
