"""Every model that generates semantic IDs, small, for tests that must hold for all of them."""

from dataclasses import replace

import numpy as np
import torch

from data_streams.batch import SequenceBatch
from models.decoder_only import DecoderOnly
from models.generator import Generator
from models.genrec import GenRec
from models.layers.feedforward import FeedForwardConfig
from models.layers.moe import MixtureConfig
from models.layers.user_context import ContextConfig
from models.lifelong_history import LifelongConfig
from models.onerec import OneRec
from models.onerec_v2 import OneRecV2
from models.path_reward import ProcessRewardConfig
from models.promise import Promise
from models.semantic_ids import SemanticIds
from models.tables import Ids, Lookup
from models.tdm import TDM
from models.tiger import Tiger
from models.trees.shape import codes_of_order
from sharding.lookup import make_lookup
from sharding.unsharded import UnshardedTables
from tests.models.decoding.tiny_generator import make_codes

CODE_SIZES = (4, 5, 3)
NUM_ITEMS = 97
MAX_LENGTH = 12
TIGER = {
    "width": 16,
    "num_encoder_blocks": 2,
    "num_decoder_blocks": 2,
    "num_heads": 2,
    "head_width": 12,
    "feedforward_width": 32,
    "dropout": 0.0,
    "user_tokens": 7,
    "init_scale": 0.3,
}
GENERATORS = {
    "decoder-only": DecoderOnly.Config(
        width=16,
        num_blocks=2,
        num_depth_blocks=1,
        num_heads=2,
        feedforward_width=32,
        dropout=0.0,
        init_scale=0.3,
    ),
    "decoder-only, codes alone": DecoderOnly.Config(
        width=16,
        num_blocks=1,
        num_depth_blocks=2,
        num_heads=2,
        feedforward_width=32,
        dropout=0.0,
        item_rows=False,
        init_scale=0.3,
    ),
    "tiger": Tiger.Config(**TIGER),
    "tiger, causal encoder": Tiger.Config(**TIGER, encoder="causal"),
    "genrec, item by item": GenRec.Config(
        target="item",
        width=16,
        num_blocks=2,
        num_heads=2,
        feedforward_width=32,
        dropout=0.0,
        init_scale=0.3,
    ),
    "promise": Promise.Config(
        width=16,
        num_blocks=1,
        num_decoder_blocks=2,
        num_heads=2,
        feedforward_width=32,
        dropout=0.0,
        init_scale=0.3,
        prm=ProcessRewardConfig(
            width=12, feedforward_width=32, dropout=0.0, num_negatives=8, positions=2, likeness_negatives=15
        ),
    ),
    "onerec-v2": OneRecV2.Config(
        width=16,
        num_blocks=3,
        num_heads=4,
        kv_layers=2,
        kv_split=2,
        kv_groups=2,
        feedforward=FeedForwardConfig(hidden=32),
        context=ContextConfig(hidden=24, user_rows=50, short_length=3),
        dropout=0.0,
        init_scale=0.3,
    ),
    "onerec-v2 of experts": OneRecV2.Config(
        width=16,
        num_blocks=2,
        num_heads=2,
        feedforward=MixtureConfig(num_experts=4, top_k=2, num_shared=1, hidden=16),
        num_dense_blocks=1,
        dense_feedforward=FeedForwardConfig(hidden=32),
        context=ContextConfig(hidden=24),
        dropout=0.0,
        init_scale=0.3,
    ),
    "onerec": OneRec.Config(
        width=16,
        num_encoder_blocks=1,
        num_decoder_blocks=2,
        num_heads=2,
        encoder_feedforward=FeedForwardConfig(hidden=32),
        decoder_feedforward=MixtureConfig(num_experts=4, top_k=2, hidden=16),
        context=ContextConfig(hidden=24, user_rows=50, short_length=3),
        dropout=0.0,
        init_scale=0.2,
    ),
    "onerec, lifelong": OneRec.Config(
        width=16,
        num_encoder_blocks=1,
        num_decoder_blocks=1,
        num_heads=2,
        encoder_feedforward=FeedForwardConfig(hidden=32),
        decoder_feedforward=FeedForwardConfig(hidden=32),
        context=ContextConfig(hidden=24, item_codes=False, short_length=2),
        lifelong=LifelongConfig(num_queries=3, num_blocks=1, hidden=32),
        dropout=0.0,
        init_scale=0.3,
    ),
}
GENERATORS["onerec, lifelong alone"] = replace(
    GENERATORS["onerec, lifelong"], context=ContextConfig(hidden=24)
)
PAGE_WISE = {"genrec": replace(GENERATORS["genrec, item by item"], target="page")}
"""Generators whose batches must come with pages."""
TREES = {
    "tdm": TDM.Config(
        width=8,
        windows=(4, 2, 1),
        attention_hidden=6,
        hidden=(12, 8),
        num_negatives=20,
        positions=2,
        init_scale=0.3,
    )
}
TREES["jtm"] = replace(TREES["tdm"], hierarchical_history=True, window_products=True)
"""Scorers of the nodes of a tree, which propose no codes."""


def semantic_ids() -> SemanticIds:
    return SemanticIds(codes=make_codes(NUM_ITEMS, CODE_SIZES), code_sizes=CODE_SIZES)


def tree_ids() -> SemanticIds:
    order = np.random.default_rng(0).permutation(NUM_ITEMS)
    codes = torch.from_numpy(codes_of_order(order, 2)).long()
    return SemanticIds(codes=codes, code_sizes=(2,) * codes.shape[1])


def make_generator(name: str, seed: int = 5) -> Generator:
    torch.manual_seed(seed)
    return {**GENERATORS, **PAGE_WISE, **TREES}[name].build(
        num_items=NUM_ITEMS,
        max_length=MAX_LENGTH,
        item_feature_dim=0,
        semantic_ids=tree_ids() if name in TREES else semantic_ids(),
    )


def unsharded_lookup(model: Generator) -> Lookup:
    device = torch.device("cpu")
    tables = UnshardedTables(model.tables(), seed=1, learning_rate=0.1, device=device)
    return make_lookup(model.tables(), tables, None, device)


def lookup_ids(model: Generator, ids: Ids):
    return unsharded_lookup(model)(ids)


def prompt_rows(model: Generator, batch: SequenceBatch):
    return lookup_ids(model, model.prompt_ids(batch))
