"""Attention heads that do not divide a width are refused before anything is trained."""

import dataclasses

import pytest
import torch

from cluster.errors import ConfigError
from models.layers.cross_attention import CrossDecoderBlock
from models.layers.full_encoder import FullBlock
from models.layers.heads import checked_heads
from models.layers.qformer import QFormerBlock
from models.layers.transformer import TransformerBlock
from models.sasrec import Block, SASRec
from tests.generator_cases import GENERATORS, MAX_LENGTH, NUM_ITEMS, semantic_ids


def test_heads_that_divide_the_width_pass():
    assert checked_heads(4, 64) == 4


@pytest.mark.parametrize("heads", [0, 3])
def test_other_heads_are_refused_with_both_numbers(heads):
    with pytest.raises(ConfigError, match=f"got a width of 64 and {heads} heads"):
        checked_heads(heads, 64)


@pytest.mark.parametrize("block", [FullBlock, QFormerBlock, TransformerBlock, CrossDecoderBlock])
def test_blocks_refuse_them(block):
    with pytest.raises(ConfigError, match="a width of 16 and 5 heads"):
        block(width=16, num_heads=5, feedforward=torch.nn.Identity(), dropout=0.0)


def test_models_refuse_them():
    parts = {"num_items": NUM_ITEMS, "max_length": MAX_LENGTH, "item_feature_dim": 0}
    with pytest.raises(ConfigError, match="a width of 16 and 5 heads"):
        Block(SASRec.Config(width=16, num_heads=5))
    promise = GENERATORS["promise"]
    narrow = dataclasses.replace(promise.prm, width=10, num_heads=4)
    for config in (
        dataclasses.replace(GENERATORS["decoder-only"], num_heads=5),
        dataclasses.replace(promise, num_heads=5),
        dataclasses.replace(promise, prm=narrow),
    ):
        with pytest.raises(ConfigError, match="got a width of"):
            config.build(**parts, semantic_ids=semantic_ids())
