"""GenRec and URM on a tiny decoder of Hugging Face, made on the spot: our attention against transformers' own."""

import sys
from pathlib import Path

import pytest
import torch

from cluster.errors import ConfigError
from data_streams.jagged import Jagged
from models.genrec import GenRec
from models.kernels.page_attention import PageLayout
from models.objectives.sampled_softmax import SampledSoftmax
from models.pretrained_decoder import Packed, PretrainedDecoder
from models.tables import LookedUp
from models.urm import URM
from tests.generator_cases import MAX_LENGTH, NUM_ITEMS, semantic_ids
from tests.models.test_genrec import loss_of, one_row_per_page, page_batch
from tests.text_cases import by_letters, make_texts
from tests.training_cases import make_batch

WIDTH, HEADS, KEY_HEADS = 16, 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    import transformers  # takes a second, and only where these tests are run

    config = transformers.Qwen2Config(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("decoder")
    transformers.Qwen2Model(config).save_pretrained(path)
    return str(path)


def make_model(folder: str, **options) -> GenRec:
    torch.manual_seed(1)
    config = GenRec.Config(pretrained=folder, init_scale=0.3, page_items=4, **options)
    return config.build(
        num_items=NUM_ITEMS, max_length=MAX_LENGTH, item_feature_dim=0, semantic_ids=semantic_ids()
    ).eval()


def test_states_equal_those_of_transformers_on_one_sequence_per_page(folder):
    from transformers import AutoModel

    model, batch = make_model(folder), page_batch()
    plain = AutoModel.from_pretrained(folder).eval()
    paths = model.item_codes[batch.pages.items.values]
    history, written = model.encode_pages(batch, paths)
    tokens = model.merger(model.codes(model.item_codes[batch.items.values]))
    ends = batch.pages.history_ends(batch.items).tolist()
    users = batch.pages.history_lengths.row_index().tolist()
    for page, (user, end) in enumerate(zip(users, ends, strict=True)):
        first, last = batch.pages.items.offsets[page : page + 2].tolist()
        before = tokens[int(batch.items.offsets[user]) : end]
        sequence = torch.cat((before, model.codes(paths[first:last]).flatten(0, 1)))
        expected = plain(inputs_embeds=sequence[None]).last_hidden_state[0]
        torch.testing.assert_close(
            written[first:last].flatten(0, 1), expected[len(before) :], atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(history[end - 1], expected[len(before) - 1], atol=1e-4, rtol=1e-4)


def test_packed_pages_are_one_row_per_page_and_all_weights_learn(folder):
    model, batch = make_model(folder), page_batch()
    packed = loss_of(model, batch)
    torch.testing.assert_close(packed.sum, loss_of(model, one_row_per_page(batch)).sum, rtol=1e-5, atol=1e-4)
    packed.sum.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_a_rank_without_users_takes_part(folder):
    model, nobody = make_model(folder, target="item"), make_batch([])
    loss = loss_of(model, nobody)
    loss.sum.backward()
    assert loss.sum == 0 and all(parameter.grad is not None for parameter in model.decoder.parameters())
    assert model.path_logits({}, nobody, torch.zeros(0, 4, 3, dtype=torch.int64))[2].shape == (0, 4, 3)


def test_decoding_step_by_step_says_what_training_says(folder):
    model = make_model(folder, target="item")
    sequences = [torch.tensor([5, 70, 31, 8]), torch.tensor([90, 2])]
    batch = make_batch(sequences)
    loss = loss_of(model, batch)
    prefixes = [sequence[: stop + 1] for sequence in sequences for stop in range(1, len(sequence))]
    prompts = make_batch(prefixes)
    paths = semantic_ids().codes[torch.stack([prefix[-1] for prefix in prefixes])][:, None]
    log_probs = model.log_probabilities({}, prompts, paths)
    torch.testing.assert_close(loss.sum, -log_probs.sum(), rtol=1e-4, atol=1e-3)


def test_new_tokens_begin_like_those_of_the_vocabulary(folder):
    model = make_model(folder)
    vectors = model.codes.vectors.weight
    assert not any("embed_tokens" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        model.decoder.vocabulary_mean += 5.0
    model.decoder.initialise_like_vocabulary(model.codes.vectors)
    torch.testing.assert_close(vectors.mean(0), model.decoder.vocabulary_mean, atol=0.3, rtol=0)
    assert vectors.std(0).mean().item() == pytest.approx(model.decoder.vocabulary_spread, rel=0.3)


def test_the_vocabulary_is_kept_where_it_is_asked_for_and_layers_run_some_at_a_time(folder):
    from transformers import AutoModel

    decoder, plain = PretrainedDecoder(folder, num_words=50), AutoModel.from_pretrained(folder).eval()
    tokens, length = torch.tensor([3, 49, 7, 7, 12]), 5
    embedded = decoder.vocabulary(tokens)
    torch.testing.assert_close(embedded, plain.get_input_embeddings()(tokens))
    plan = Packed(one_sequence(length))
    half = decoder.run_layers(embedded, torch.arange(length), plan, 0, 1)
    states = decoder.finish(decoder.run_layers(half, torch.arange(length), plan, 1, decoder.num_layers))
    expected = plain(input_ids=tokens[None]).last_hidden_state[0]
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-4)
    scores = decoder.vocabulary(states, predict=True)
    torch.testing.assert_close(scores, states @ decoder.vocabulary.weight.T)
    assert not hasattr(PretrainedDecoder(folder), "vocabulary")


def one_sequence(length: int) -> PageLayout:
    nothing = torch.zeros(0, dtype=torch.int64)
    return PageLayout.build(
        Jagged.from_lengths(torch.zeros(length), torch.tensor([length])),
        Jagged.from_lengths(nothing, nothing),
        Jagged.from_lengths(nothing, torch.tensor([0])),
    )


def test_only_safetensors_are_read(tmp_path):
    Path(tmp_path / "config.json").write_text("{}")
    Path(tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"config.json and \*.safetensors"):
        make_model(str(tmp_path))


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="install the extra"):
        make_model("anywhere")


def make_urm(folder: str, words: bool) -> URM:
    objective = SampledSoftmax.Config(num_negatives=6).build(num_items=NUM_ITEMS)
    config = URM.Config(
        pretrained=folder, num_queries=3, by_action=True, reads_text=words, item_width=8, init_scale=0.3
    )
    return config.build(
        num_items=NUM_ITEMS,
        max_length=MAX_LENGTH,
        item_feature_dim=0,
        objective=objective,
        actions=("cart", "click"),
        texts=make_texts(NUM_ITEMS, num_users=2) if words else None,
    ).eval()


@pytest.mark.parametrize("words", [False, True])
def test_urm_asks_with_the_states_of_transformers_on_one_sequence_per_prompt(folder, words):
    from transformers import AutoModel

    model, plain = make_urm(folder, words), AutoModel.from_pretrained(folder).eval()
    sequences = [torch.tensor([5, 70, 31, 8]), torch.tensor([90, 2])]
    batch = make_batch(sequences)
    table = torch.randn(NUM_ITEMS, 8, generator=torch.Generator().manual_seed(0))
    rows = {
        name: LookedUp(ids=ids, rows=table[ids] if name == "history" else torch.empty(len(ids), 0))
        for name, ids in model.query_ids(batch).items()
    }
    queries = model.query(rows, batch)
    objective, profiles = model.tokens.weight[4:], [torch.zeros(0, model.decoder.width)] * 2
    if words:
        vocabulary = plain.get_input_embeddings()
        objective = vocabulary(by_letters(["the next item to click"]).values)
        users = model.texts.users
        profiles = [vocabulary(part) for part in users.values.split(users.lengths.tolist())]
    for user, sequence in enumerate(sequences):
        items = model.item_projection(table[sequence[:-1]])
        tokens = torch.cat((profiles[user], items, objective, model.tokens.weight[:3]))
        states = plain(inputs_embeds=tokens[None]).last_hidden_state[0, -3:]
        expected = model.objective.queries(model.query_projection(states))
        torch.testing.assert_close(queries[user], expected, atol=1e-4, rtol=1e-4)
    queries.sum().backward()
    assert all(weights.grad is not None for weights in model.parameters())
