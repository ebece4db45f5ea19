"""What holds for every model that generates: decoding says what training said."""

import inspect
from dataclasses import replace

import pytest
import torch

from cluster.plugins import load_plugin, plugin_files
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.decoding.allowed_items import AllowedItems
from models.decoding.beam_search import BeamSearch
from models.decoding.space import CatalogueSpace
from models.decoding.trie import PrefixTrie
from models.generator import Generator
from models.process_reward import ProcessReward
from models.recommender import LossSum, StepContext
from models.tdm import TDM
from tests.generator_cases import (
    GENERATORS,
    NUM_ITEMS,
    PAGE_WISE,
    lookup_ids,
    make_generator,
    prompt_rows,
    semantic_ids,
)
from tests.training_cases import make_batch

everyone = pytest.mark.parametrize("name", GENERATORS)


def histories(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(NUM_ITEMS, (length,), generator=generator) for length in (4, 13, 2, 7)]


def training_loss(model: Generator, batch: SequenceBatch) -> LossSum:
    context = StepContext(step=0)
    batch = model.training_batch(batch, context)
    return model(lookup_ids(model, model.ids(batch, context)), batch, context)


@everyone
def test_the_training_loss_is_that_of_teacher_forcing_after_every_position(name):
    model = make_generator(name).eval()
    codes, sequences = semantic_ids().codes, histories()
    batch = make_batch(sequences)
    loss = training_loss(model, batch)
    prefixes = [sequence[: stop + 1] for sequence in sequences for stop in range(1, len(sequence))]
    prompts = replace(make_batch(prefixes), user_ids=batch.user_ids[batch.items.row_index()])
    paths = codes[torch.stack([prefix[-1] for prefix in prefixes])][:, None]
    log_probs = model.log_probabilities(prompt_rows(model, prompts), prompts, paths)
    assert loss.count == len(prefixes)
    of_codes = loss.sum - loss.metrics.get("prm_loss", 0)
    torch.testing.assert_close(of_codes, -log_probs.sum(), rtol=1e-5, atol=1e-3)
    levels = torch.stack([loss.metrics[f"loss_level_{level}"] for level in (1, 2, 3)])
    torch.testing.assert_close(levels, -log_probs.sum((0, 1)), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    "name", [name for name in GENERATORS if hasattr(GENERATORS[name], "label_smoothing")]
)
def test_smoothed_labels_change_the_loss_of_every_code(name):
    model = make_generator(name).eval()
    plain = training_loss(model, make_batch(histories())).metrics
    model.config = replace(model.config, label_smoothing=0.5)
    smoothed = training_loss(model, make_batch(histories())).metrics
    for level in (1, 2, 3):
        assert not torch.isclose(plain[f"loss_level_{level}"], smoothed[f"loss_level_{level}"], rtol=1e-4)


@everyone
def test_a_beam_as_wide_as_the_catalogue_ranks_all_items_by_their_probability(name):
    model = make_generator(name).eval()
    ids, batch = semantic_ids(), make_batch(histories())
    trie = PrefixTrie.build(ids.codes, ids.code_sizes)
    rows = prompt_rows(model, batch)
    search = BeamSearch.Config(width=NUM_ITEMS).build()
    found = search.search(model, rows, batch, CatalogueSpace(trie), k=NUM_ITEMS)
    every_path = ids.codes.expand(batch.num_users, -1, -1)
    with torch.no_grad():
        scores = model.log_probabilities(rows, batch, every_path).sum(-1)
    assert torch.equal(found.items.sort(dim=1).values, torch.arange(NUM_ITEMS).expand_as(found.items))
    torch.testing.assert_close(found.log_probs, scores.gather(1, found.items), rtol=1e-4, atol=1e-4)
    assert (found.log_probs.diff(dim=1) <= 0).all()


@everyone
def test_log_probabilities_of_a_search_are_those_of_teacher_forcing_under_its_mask_and_temperature(name):
    model = make_generator(name).eval()
    ids, batch = semantic_ids(), make_batch(histories())
    trie, rows = PrefixTrie.build(ids.codes, ids.code_sizes), prompt_rows(model, batch)
    deny = Jagged.from_lengths(torch.arange(24), torch.full((batch.num_users,), 6))
    space = CatalogueSpace(trie, AllowedItems.build(trie, num_users=batch.num_users, deny=deny))
    for over in ("all", "allowed"):
        search = BeamSearch.Config(width=20, temperature=0.7, over=over).build()
        found = search.search(model, rows, batch, space, k=20)
        with torch.no_grad():
            forced = model.log_probabilities(
                rows, batch, found.paths, space=space, distribution=search.distribution()
            )
        assert found.filled.all()
        torch.testing.assert_close(forced.sum(-1), found.log_probs, atol=1e-5, rtol=0)


def test_every_generator_of_the_folder_has_a_case():
    modules = [load_plugin("models", name) for name in plugin_files("models")]
    written = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Generator) and value.__module__ == module.__name__
    }
    usable = {model for model in written if not inspect.isabstract(model) and hasattr(model, "Config")}
    tested = {type(make_generator(name)) for name in (*GENERATORS, *PAGE_WISE)}
    assert usable - tested == {ProcessReward, TDM}, "which propose no codes; they have tests of their own"
    assert not any(model.proposes_codes for model in usable - tested)
    assert len(tested) >= 6


@everyone
def test_a_batch_without_users_has_a_loss_with_gradients(name):
    model = make_generator(name)
    loss = training_loss(model, make_batch([]))
    assert loss.count == 0 and loss.sum == 0
    loss.sum.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
