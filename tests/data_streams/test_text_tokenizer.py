"""Texts as tokens: trained tokenizers repeat themselves, folders are read safely, and mistakes name the way out."""

import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cluster.errors import ConfigError
from data_streams.text_tokenizer import TOKENIZER, TextTokenizer

TEXTS = ["Title: Red polish. Brand: OPI", "Title: Blue Polish", "", "Title: Crème brûlée 3 oz"] * 3


def test_a_tokenizer_depends_on_its_texts_alone_and_gives_any_text_back(tmp_path):
    trained, again = (TextTokenizer.train(TEXTS, 300) for _ in range(2))
    assert trained.fingerprint == again.fingerprint and 256 < trained.size <= 300
    trained.save(str(tmp_path))
    loaded = TextTokenizer.load(str(tmp_path))
    assert loaded.fingerprint == trained.fingerprint
    rows, num_cut = loaded.encode(["Unseen: ñandú", "Red polish"], 50)
    tokens = rows.values.tolist()
    assert num_cut == 0 and max(tokens) < loaded.size
    written = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert written.decode(tokens[: rows.lengths[0]]).strip() == "unseen: ñandú"
    assert TextTokenizer.train(TEXTS[::2], 300).fingerprint != trained.fingerprint


def test_every_token_is_below_the_size_where_numbers_are_left_out(tmp_path):
    gap = Tokenizer(models.WordLevel({"red": 0, "polish": 7}))
    gap.pre_tokenizer = pre_tokenizers.Whitespace()
    gap.save(str(tmp_path / TOKENIZER))
    tokenizer = TextTokenizer.load(str(tmp_path))
    assert tokenizer.size == 8 and tokenizer.encode(["polish red"], 5)[0].values.tolist() == [7, 0]


def test_long_texts_are_cut_off_and_counted():
    tokenizer = TextTokenizer.train(TEXTS, 300)
    whole, none_cut = tokenizer.encode(TEXTS, 1000)
    rows, num_cut = tokenizer.encode(TEXTS, 3)
    assert none_cut == 0 and num_cut == sum(whole.lengths > 3).item() > 0
    assert rows.max_length == 3 and rows.lengths.tolist() == whole.lengths.clamp(max=3).tolist()
    first = whole.values[whole.offsets[:-1][whole.lengths > 0]]
    assert rows.values[rows.offsets[:-1][rows.lengths > 0]].tolist() == first.tolist()


def test_a_folder_without_a_tokenizer_or_with_another_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must hold tokenizer\.json"):
        TextTokenizer.load(str(tmp_path))
    (tmp_path / TOKENIZER).write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        TextTokenizer.load(str(tmp_path))
    with pytest.raises(ConfigError, match="at least 256"):
        TextTokenizer.train(TEXTS, 100)


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[hf\]'"):
        TextTokenizer.train(TEXTS, 300)
