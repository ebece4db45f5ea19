"""Infilling against its definition written out, one user at a time."""

import pytest
import torch
import torch.nn.functional as F

from cluster.errors import ConfigError
from models.drawn_positions import drawn_events
from models.text_reader import REGION_END, TEXT_BEGIN
from models.text_reading import Reading
from tests.models.test_m6rec import CONTEXT, HISTORIES, WORDS, Written, looked_up, make_model, make_users


@pytest.mark.parametrize("options", [{}, {"region": "behaviours"}, {"separate_blocks": 0}])
def test_the_loss_is_that_of_the_words_of_one_behaviour_behind_all_the_others(options):
    model = make_model("m6-rec-infilling", **options)
    written, batch = Written(model), model.training_batch(make_users(), CONTEXT)
    left_out = drawn_events(batch) - batch.items.offsets[:-1]
    assert len(set(left_out.tolist())) > 1
    expected = 0.0
    for user, (items, place) in enumerate(zip(HISTORIES, left_out.tolist(), strict=True)):
        region = written.region(user, items)
        region[1 + place] = written.separate([WORDS + TEXT_BEGIN])
        close, own = written.separate([WORDS + REGION_END]), written.candidate(items[place])
        states = written.states(region, [close, written.separate(own, is_causal=True)])[-len(own) :]
        words = torch.tensor(own[1:-1])
        scores = F.linear(states[: len(words)], model.encoder.decoder.vocabulary.weight)
        expected += F.cross_entropy(scores, words)
    loss = model(looked_up(model, model.ids(batch, CONTEXT)), batch, CONTEXT)
    torch.testing.assert_close(loss.sum, expected, atol=1e-4, rtol=1e-4)
    assert loss.count == model.num_targets(batch) == len(HISTORIES)


def test_what_is_left_out_is_not_read():
    """Its words come into the loss and nowhere else: the region is the same whatever they are."""
    model, batch = make_model("m6-rec-infilling"), make_users()
    batch = model.training_batch(batch, CONTEXT)
    ids = model.ids(batch, CONTEXT)
    hidden = int(batch.items.values[drawn_events(batch)[2]])
    assert HISTORIES[2].count(hidden) == 1
    start, stop = model.texts.items.offsets[hidden : hidden + 2].tolist()
    before = looked_up(model, ids)
    model.texts.items.values[start:stop] = (model.texts.items.values[start:stop] + 1) % WORDS
    after = looked_up(model, model.ids(batch, CONTEXT))
    old, new = (model.encoder(Reading.of(rows)) for rows in (before, after))
    assert torch.equal(old.begins, new.begins) and not torch.equal(old.prompts[2], new.prompts[2])


def test_words_need_all_tokens():
    with pytest.raises(ConfigError, match="needs --model"):
        make_model("m6-rec-infilling", joint_tokens="last")


def test_a_ranker_and_a_retriever_start_from_it():
    weights = make_model("m6-rec-infilling").state_dict()
    for name in ("m6-rec as published", "m6-rec-ranking as published"):
        other = make_model(name)
        missing = [key for key in other.state_dict() if key not in weights]
        assert all(key.startswith(other.added_parameters) for key in missing)
        assert not weights.keys() - other.state_dict().keys()
