"""M6-Rec against its definition written out on dense masks, one sequence at a time; and what tuning trains."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.kernels.length_buckets import BucketLayout, padded_layout
from models.layers.attention_plan import Plan
from models.objectives.sampled_softmax import SampledSoftmax
from models.recommender import StepContext
from models.tables import LookedUp
from models.text_reader import ITEM_END, REGION_BEGIN, REGION_END, TEXT_BEGIN, TEXT_END
from models.text_reading import Reading
from sharding.lookup import make_lookup
from sharding.unsharded import UnshardedTables
from tests.models.test_mtgr import CODES, log_of_two_users, random_log
from tests.text_cases import TEXT_RANKERS, WORDS, make_text_model
from trainer.configuration import TrainConfig
from trainer.dense_module import DenseModule
from trainer.plain_engine import PlainEngine

NUM_ITEMS, NUM_USERS = 12, 4
CONTEXT = StepContext(step=3, seed=1)
HISTORIES = ([5, 7, 3, 5], [2], [11, 0, 8, 9, 1, 4, 6])
PUBLISHED, FORWARD = "m6-rec as published", "m6-rec"


def make_model(name: str, **options):
    objective = SampledSoftmax.Config(num_negatives=6, temperature=0.5).build(num_items=NUM_ITEMS)
    model = make_text_model(
        name,
        5,
        num_items=NUM_ITEMS,
        num_users=NUM_USERS,
        objective=objective,
        actions=CODES,
        **options,
    )
    for weights in [*model.parameters(), *model.encoder.buffers()]:
        # What a new model begins with would hide mistakes.
        nn.init.normal_(weights, std=0.3)
    return model.eval()


def make_users(histories=HISTORIES) -> SequenceBatch:
    spans = [torch.tensor([*items, (items[-1] + 1) % NUM_ITEMS]) for items in histories]
    return SequenceBatch(
        user_ids=torch.arange(len(histories)),
        items=Jagged.from_lengths(
            torch.cat([span[:-1] for span in spans]), torch.tensor([len(span) - 1 for span in spans])
        ),
        targets=torch.cat([span[1:] for span in spans]),
    )


def looked_up(model, ids):
    device = torch.device("cpu")
    tables = UnshardedTables(model.tables(), seed=0, learning_rate=0.0, device=device)
    return make_lookup(model.tables(), tables, None, device)(ids)


def loss_of(model, batch):
    batch = model.training_batch(batch, CONTEXT)
    return model(looked_up(model, model.ids(batch, CONTEXT)), batch, CONTEXT)


@dataclass(frozen=True)
class Dense(Plan):
    """One sequence and what each of its tokens sees, [N, N] bool."""

    mask: Tensor

    def attend(self, layer, queries, keys, values):
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / queries.shape[-1] ** 0.5
        weights = scores.masked_fill(~self.mask, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values)


class Written:
    """The encoder of a model by its definition: segment by segment, then one sequence with one dense mask."""

    def __init__(self, model):
        self.model, self.encoder, self.texts = model, model.encoder, model.texts
        self.config = model.config

    def text(self, rows: Jagged, row: int) -> list[int]:
        return rows.values[rows.offsets[row] : rows.offsets[row + 1]].tolist()

    def item(self, item: int) -> list[int]:
        return [*self.text(self.texts.items, item), WORDS + ITEM_END]

    def candidate(self, item: int) -> list[int]:
        return [WORDS + TEXT_BEGIN, *self.text(self.texts.items, item), WORDS + TEXT_END]

    def user(self, user: int) -> list[int]:
        soft = self.encoder.reader.soft_prompts()
        return [*soft, WORDS + REGION_BEGIN, *self.text(self.texts.users, user)]

    def separate(self, tokens: list[int], *, is_causal=False) -> Tensor:
        length = len(tokens)
        mask = torch.ones(length, length, dtype=torch.bool)
        plan = Dense(mask.tril() if is_causal else mask)
        hidden = self.encoder.embed(torch.tensor(tokens))
        return self.encoder.decoder.run_layers(
            hidden, torch.arange(length), plan, 0, self.encoder.num_separate
        )

    def states(self, region: list[Tensor], prompt: list[Tensor] = ()) -> Tensor:
        """Of all tokens, after segments of a region and of a prompt behind it."""
        lengths = [len(part) for part in region]
        num_region, hidden = sum(lengths), torch.cat((*region, *prompt))
        place = torch.arange(len(hidden))
        mask = place <= place[:, None]
        if self.config.region == "bidirectional":
            mask[:num_region, :num_region] = True
        else:
            ends = torch.tensor(lengths).cumsum(0).repeat_interleave(torch.tensor(lengths))
            mask[:num_region] = place < ends[:, None]
        decoder = self.encoder.decoder
        return decoder.finish(
            decoder.run_layers(hidden, place, Dense(mask), self.encoder.num_separate, decoder.num_layers)
        )

    def kept(self, states: Tensor) -> Tensor:
        return states[-1:] if self.config.joint_tokens == "last" else states

    def region(self, user: int, items) -> list[Tensor]:
        behaviours = [self.kept(self.separate(self.item(item))) for item in items]
        return [self.separate(self.user(user)), *behaviours]

    def query(self, user: int, items) -> Tensor:
        return self.states(self.region(user, items), [self.separate([WORDS + REGION_END])])[-1]

    def item_state(self, item: int) -> Tensor:
        return self.states([self.kept(self.separate(self.item(item)))])[-1]

    def shown(self, user: int, items, candidate: int) -> Tensor:
        """States of [EOS'] and the candidate."""
        close = self.separate([WORDS + REGION_END])
        own = self.kept(self.separate(self.candidate(candidate), is_causal=True))
        return self.states(self.region(user, items), [close, own])[-1 - len(own) :]


FORMS = [
    {"separate_blocks": 0},
    {"separate_blocks": 1},
    {"separate_blocks": 3},
    {"separate_blocks": 2, "joint_tokens": "last"},
]


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("name", [PUBLISHED, FORWARD])
def test_queries_items_and_loss_are_those_of_one_sequence_at_a_time(name, options):
    model, batch = make_model(name, **options), make_users()
    written = Written(model)
    queries = model.query(looked_up(model, model.query_ids(batch)), batch)
    expected = torch.stack([written.query(user, items) for user, items in enumerate(HISTORIES)])
    torch.testing.assert_close(queries, model.objective.queries(expected), atol=1e-5, rtol=1e-4)
    items = torch.tensor([3, 11, 3])
    vectors = model.item_vectors(looked_up(model, model.item_ids(items))["item"])
    expected = torch.stack([written.item_state(item) for item in items.tolist()])
    torch.testing.assert_close(vectors, model.objective.candidates(expected), atol=1e-5, rtol=1e-4)
    trained = model.training_batch(batch, CONTEXT)
    places = trained.supervision["prm_places"]
    pairs = list(zip(places.row_index().tolist(), places.values.tolist(), strict=True))
    states = torch.stack([written.query(user, HISTORIES[user][: place + 1]) for user, place in pairs])
    every = torch.stack([written.item_state(item) for item in range(NUM_ITEMS)])
    targets = trained.targets[[int(batch.items.offsets[user]) + place for user, place in pairs]]
    negatives = model.objective.ids(targets, CONTEXT)["negative"]
    wanted = model.objective(
        model.objective.queries(states),
        targets,
        {
            "target": model.objective.candidates(every[targets]),
            "negative": model.objective.candidates(every[negatives]),
        },
        {"target": targets, "negative": negatives},
        CONTEXT,
    )
    loss = loss_of(model, batch)
    torch.testing.assert_close(loss.sum, wanted.sum, atol=1e-4, rtol=1e-4)
    assert loss.count == wanted.count == model.num_targets(trained)


@pytest.mark.parametrize("options", FORMS[:3])
@pytest.mark.parametrize("name", TEXT_RANKERS)
def test_candidates_get_the_scores_and_likelihoods_of_one_sequence_for_each(name, options):
    model = make_model(name, **options)
    written, batch = Written(model), make_users()
    candidates = torch.tensor([[2, 9, 2], [1, -1, -1], [-1, 0, 5]])
    ids = model.candidate_ids(batch, candidates)
    found = model.logits(looked_up(model, ids), batch, candidates)
    spoken = make_model(name, **options, scoring="likelihood", language_weight=0.0)
    spoken.load_state_dict(model.state_dict(), strict=False)
    ids = spoken.candidate_ids(batch, candidates)
    likelihoods = spoken.logits(looked_up(spoken, ids), batch, candidates)
    for user, slot in (candidates >= 0).nonzero().tolist():
        item = int(candidates[user, slot])
        states = written.shown(user, HISTORIES[user], item)
        torch.testing.assert_close(found[user, slot], by_hand(written, states, item), atol=1e-4, rtol=1e-4)
        words = torch.tensor(written.text(model.texts.items, item))
        scores = F.linear(states[1 : 1 + len(words)], model.encoder.decoder.vocabulary.weight)
        expected = -F.cross_entropy(scores, words)
        torch.testing.assert_close(likelihoods[user, slot], expected.expand(2), atol=1e-4, rtol=1e-4)


def test_items_are_not_laid_out_as_long_as_histories_where_all_rows_are(monkeypatch):
    """As on an accelerator."""
    model, shapes = make_model(PUBLISHED, positions=1), []
    expected = loss_of(model, make_users()).sum

    def padded(rows: Jagged) -> BucketLayout:
        layout = padded_layout(rows)
        shapes.extend(layout.buckets)
        return layout

    for module in ("text_encoder", "kernels.page_attention"):
        monkeypatch.setattr(f"models.{module}.bucket_layout", padded)
    torch.testing.assert_close(loss_of(model, make_users()).sum, expected)
    longest = max(length for _, length in shapes)
    # A copy of the history for each prompt, and the mark that stands for none.
    assert [rows for rows, length in shapes if length == longest] == [len(HISTORIES) + 1]


def test_an_item_without_words_is_as_likely_as_any_word_and_not_certain():
    model = make_model("m6-rec-ranking as published", scoring="likelihood", language_weight=0.0)
    reader, items = model.encoder.reader, model.texts.items
    lengths = items.lengths.clone()
    lengths[0] = 0
    texts = replace(model.texts, items=Jagged.from_lengths(items.values[items.lengths[0] :], lengths))
    model.encoder.reader = replace(reader, texts=texts)
    candidates = torch.tensor([[0, 1], [2, 0], [0, -1]])
    scores = model.logits(
        looked_up(model, model.candidate_ids(make_users(), candidates)), make_users(), candidates
    )
    assert torch.allclose(scores[candidates == 0], torch.tensor(-math.log(WORDS)))
    assert (scores[candidates > 0] != scores[0, 0]).all()


def by_hand(written: Written, states: Tensor, item: int) -> Tensor:
    """Log-odds of click and cart, from the states of [EOS'] and all of a candidate."""
    model = written.model
    found = options_by_hand(model, states[-1])
    if not model.config.likeness:
        return found
    cosine = F.normalize(states[0], dim=0) @ F.normalize(written.item_state(item), dim=0)
    return found + cosine * model.likeness.weight[:, 0]


def options_by_hand(model, state: Tensor) -> Tensor:
    if model.config.tuning == "full":
        return model.classifier(state)
    no_click, yes_click, no_cart, yes_cart = model.encoder.soft_prompts.weight[-4:]
    chances = [
        torch.stack((state @ no, state @ yes)).softmax(0)[1]
        for no, yes in ((no_click, yes_click), (no_cart, yes_cart))
    ]
    return torch.stack(chances).logit()


@pytest.mark.parametrize("name", ["m6-rec-ranking", "m6-rec-ranking as published"])
@pytest.mark.parametrize("window", ["request", "span"])
def test_the_loss_of_answers_and_words_equals_a_loop_over_candidates(name, window):
    model = make_model(name, window=window)
    written, batch = Written(model), model.training_batch(random_log(num_users=2), CONTEXT)
    parts = batch.supervision
    candidates, answers = parts["candidates"], parts["answers"].values.float()
    total, words_total = 0.0, 0.0
    for number, user in enumerate(candidates.row_index().tolist()):
        start, known = int(batch.items.offsets[user]), int(parts["visible"].values[number])
        history = batch.items.values[start : start + known].tolist()
        item = int(candidates.values[number])
        states = written.shown(int(batch.user_ids[user]), history, item)
        total += F.binary_cross_entropy_with_logits(
            by_hand(written, states, item), answers[number], reduction="sum"
        )
        words = torch.tensor(written.text(model.texts.items, item))
        scores = F.linear(states[1 : 1 + len(words)], model.encoder.decoder.vocabulary.weight)
        words_total += answers[number, 0] * F.cross_entropy(scores, words)
    loss = model(looked_up(model, model.ids(batch, CONTEXT)), batch, CONTEXT)
    expected = total + model.config.language_weight * words_total
    torch.testing.assert_close(loss.sum, expected, atol=1e-4, rtol=1e-4)
    if model.config.language_weight:
        torch.testing.assert_close(loss.metrics["words"], words_total.detach(), atol=1e-4, rtol=1e-4)


def test_one_request_is_drawn_with_what_was_taken_before_it():
    model = make_model("m6-rec-ranking as published")
    batch = model.training_batch(random_log(num_users=40), CONTEXT)
    candidates, visible = batch.supervision["candidates"], batch.supervision["visible"].values
    # Each page shows three items, and one is clicked on every page before.
    assert candidates.lengths.tolist() == [3] * 40
    assert torch.equal(visible, batch.items.lengths[candidates.row_index()])
    assert set(visible.tolist()) == set(range(6))


def test_behaviours_that_see_no_later_one_hide_it_bit_by_bit():
    model, batch = make_model(FORWARD), make_users()
    trained = model.training_batch(batch, CONTEXT)
    reading_ids = model.ids(trained, CONTEXT)
    before = model.encoder(reading_of(model, reading_ids)).prompts
    # The texts of user 2's fifth behaviour, item 1, which nobody else has.
    start, stop = model.texts.items.offsets[1:3].tolist()
    model.texts.items.values[start:stop] = (model.texts.items.values[start:stop] + 1) % WORDS
    after = model.encoder(reading_of(model, model.ids(trained, CONTEXT))).prompts
    places, user = trained.supervision["prm_places"].values, trained.supervision["prm_places"].row_index()
    assert torch.equal((before != after).any(1), (user == 2) & (places >= 4))


def reading_of(model, ids):
    return Reading.of(looked_up(model, ids))


def test_lower_states_of_a_text_do_not_depend_on_what_it_is_read_with():
    model = make_model(PUBLISHED, separate_blocks=2)
    alone = model.encoder.reader.items(torch.tensor([8]).numpy())
    together = reading_of(model, model.query_ids(make_users()))
    (row,) = [
        row
        for row in range(together.segments.num_rows)
        if segment(together, together.segments.values, row).tolist() == Written(model).item(8)
    ]
    found = segment(together, model.encoder.separate(together), row)
    torch.testing.assert_close(found, segment(alone, model.encoder.separate(alone), 0), atol=1e-6, rtol=1e-5)


def segment(reading, values, row: int) -> Tensor:
    return values[reading.segments.offsets[row] : reading.segments.offsets[row + 1]]


@pytest.mark.parametrize("name", [FORWARD, PUBLISHED, *TEXT_RANKERS])
def test_a_rank_without_users_takes_part(name):
    model = make_model(name)
    batch = log_of_two_users().select(1, 2) if name in TEXT_RANKERS else make_users().select(0, 0)
    loss = loss_of(model, batch)
    loss.sum.backward()
    assert loss.sum == 0 and loss.count == 0
    assert all(weights.grad is not None for weights in model.parameters())


def test_options_leave_the_language_model_as_it_is_and_nothing_is_kept_for_it():
    model = make_model("m6-rec-ranking of adapters", window="span").train()
    frozen = {name: tensor.clone() for name, tensor in model.named_buffers()}
    module = DenseModule(model, torch.float32)
    engine = PlainEngine(module, TrainConfig(learning_rate=0.1))
    before = {name: weights.clone() for name, weights in model.named_parameters()}
    batch = model.training_batch(random_log(), CONTEXT)
    for _ in range(2):
        engine.backward(looked_up(model, model.ids(batch, CONTEXT)), batch, CONTEXT, 1.0)
        engine.step(0.1)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.named_buffers())
    assert all(not torch.equal(weights, before[name]) for name, weights in model.named_parameters())
    names = {piece.name for piece in engine.pieces()}
    assert {f"exp_avg/{name}" for name in before} == {name for name in names if "exp_avg/" in name}
    # Checkpoints keep the frozen part all the same.
    assert {f"dense/{name}" for name in (*before, *frozen)} <= names
    assert set(model.added_parameters) == {
        *(name for name in before if "marks" not in name),
        "classifier.",
        "likeness.",
    }


def test_a_model_knows_no_items_but_by_their_words():
    small, large = (
        make_text_model(
            FORWARD,
            5,
            num_items=count,
            objective=SampledSoftmax.Config(num_negatives=2).build(num_items=count),
        )
        for count in (NUM_ITEMS, 9 * NUM_ITEMS)
    )
    assert small.tables() == []
    large.load_state_dict(small.state_dict())
    rows = LookedUp(ids=torch.arange(NUM_ITEMS), rows=torch.zeros(NUM_ITEMS, 0))
    large.texts.items.values[: len(small.texts.items.values)] = small.texts.items.values
    torch.testing.assert_close(large.item_vectors(rows), small.item_vectors(rows))
