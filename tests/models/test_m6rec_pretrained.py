"""M6-Rec on a tiny language model of Hugging Face, made on the spot, against transformers' own attention."""

from pathlib import Path

import pytest
import torch

from cluster.errors import ConfigError
from data_streams.jagged import Jagged
from models.m6rec_ranking import M6RecRanking
from models.texts import Texts
from tests.models.test_m6rec import CONTEXT, Written, looked_up, make_users
from tests.models.test_mtgr import CODES, random_log
from tests.text_cases import WORDS, make_texts

WIDTH = 16


def save(folder: Path, *, words: int = WORDS, is_tied: bool = True) -> str:
    import transformers  # takes a second, and only where these tests are run

    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=is_tied,
    )
    torch.manual_seed(0)
    transformers.LlamaModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("language-model"))


def make_model(folder: str, texts: Texts | None = None, **options) -> M6RecRanking:
    torch.manual_seed(1)
    sizes = {"separate_blocks": 1, "num_soft_prompts": 6}
    config = M6RecRanking.Config(pretrained=folder, **{**sizes, **options})
    return config.build(texts=texts or make_texts(12, 4), actions=CODES).eval()


def test_states_equal_those_of_transformers_under_the_mask_of_a_prefix_language_model(folder):
    from transformers import AutoModel

    model, batch = make_model(folder, separate_blocks=0), make_users()
    written, plain = Written(model), AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    candidates = torch.tensor([[2, 9], [1, 4], [0, 5]])
    rows = looked_up(model, model.candidate_ids(batch, candidates))
    found = model.logits(rows, batch, candidates)
    for user in range(3):
        history = batch.items.values[batch.items.offsets[user] : batch.items.offsets[user + 1]].tolist()
        region = [token for part in (written.user(user), *map(written.item, history)) for token in part]
        for slot, item in enumerate(candidates[user].tolist()):
            tokens = [*region, WORDS + 2, *written.candidate(item)]
            length = len(tokens)
            mask = torch.ones(length, length).tril().bool()
            mask[: len(region), : len(region)] = True
            hidden = torch.zeros(1, 1, length, length).masked_fill(~mask, torch.finfo(torch.float32).min)
            states = plain(
                inputs_embeds=model.encoder.embed(torch.tensor(tokens))[None], attention_mask=hidden
            )
            expected = model.classifier(states.last_hidden_state[0, -1])
            torch.testing.assert_close(found[user, slot], expected, atol=1e-4, rtol=1e-4)


def test_adapters_begin_as_nothing_and_alone_are_trained_beside_prompts_and_marks(folder):
    model, plain = (make_model(folder, tuning=tuning) for tuning in ("option-adapter", "option"))
    batch, candidates = make_users(), torch.tensor([[2], [1], [0]])
    plain.load_state_dict(model.state_dict(), strict=False)
    scores = [
        one.logits(looked_up(one, one.candidate_ids(batch, candidates)), batch, candidates)
        for one in (model, plain)
    ]
    torch.testing.assert_close(*scores)
    learnt = {name for name, _ in model.named_parameters()}
    adapters = {name for name in learnt if ".mlp.adapter." in name}
    assert len(adapters) == 3 * 4
    assert learnt - adapters == {"encoder.marks.weight", "encoder.soft_prompts.weight"}
    trained = model.training_batch(random_log(), CONTEXT)
    model(looked_up(model, model.ids(trained, CONTEXT)), trained, CONTEXT).sum.backward()
    assert all(weights.grad is not None for weights in model.parameters())


def test_a_rank_without_users_takes_part(folder):
    model = make_model(folder, scoring="likelihood")
    batch = model.training_batch(random_log(), CONTEXT).select(0, 0)
    loss = model(looked_up(model, model.ids(batch, CONTEXT)), batch, CONTEXT)
    loss.sum.backward()
    assert loss.sum == 0 and all(weights.grad is not None for weights in model.parameters())


def test_a_language_model_that_does_not_fit_is_refused(folder, tmp_path):
    longer = Texts(
        items=Jagged.from_lengths(torch.zeros(1).int(), torch.tensor([1])),
        users=None,
        vocabulary_size=WORDS + 1,
        fingerprint="",
    )
    with pytest.raises(ConfigError, match="must know all 41 tokens"):
        make_model(folder, longer)
    with pytest.raises(ConfigError, match="has others for that"):
        make_model(save(tmp_path, is_tied=False), scoring="likelihood")


def test_a_language_model_whose_layers_cannot_be_run_alone_is_refused(tmp_path):
    import transformers

    sizes = {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "vocab_size": WORDS}
    transformers.GPT2Model(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"GPT2Model in .* has no layers, rotary_emb, norm"):
        make_model(str(tmp_path))


def test_a_language_model_that_scales_the_scores_of_words_does_not_judge_by_likelihood(tmp_path):
    import transformers

    sizes = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.CohereConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, logit_scale=0.25, tie_word_embeddings=True
    )
    transformers.CohereModel(config).save_pretrained(tmp_path)
    make_model(str(tmp_path))
    with pytest.raises(ConfigError, match="or scales the scores"):
        make_model(str(tmp_path), scoring="likelihood")


def test_language_models_that_scale_the_vectors_of_words_are_refused(tmp_path):
    import transformers

    sizes = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    kinds = {
        # One scales them in the embedding, the other on the way to the layers.
        "gemma": transformers.GemmaModel(transformers.GemmaConfig(**sizes, **heads)),
        "granite": transformers.GraniteModel(
            transformers.GraniteConfig(**sizes, **heads, embedding_multiplier=12.0)
        ),
    }
    for name, model in kinds.items():
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match="vectors as they are"):
            make_model(str(tmp_path / name))
