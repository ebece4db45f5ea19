"""Every model that generates semantic IDs, small, for tests that must hold for all of them."""

import torch

from data_streams.batch import SequenceBatch
from models.decoder_only import DecoderOnly
from models.generator import Generator
from models.semantic_ids import SemanticIds
from models.tables import Ids, Lookup
from sharding.lookup import make_lookup
from sharding.unsharded import UnshardedTables
from tests.models.decoding.tiny_generator import make_codes

CODE_SIZES = (4, 5, 3)
NUM_ITEMS = 97
MAX_LENGTH = 12
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
}


def semantic_ids() -> SemanticIds:
    return SemanticIds(codes=make_codes(NUM_ITEMS, CODE_SIZES), code_sizes=CODE_SIZES)


def make_generator(name: str, seed: int = 5) -> Generator:
    torch.manual_seed(seed)
    return GENERATORS[name].build(
        num_items=NUM_ITEMS, max_length=MAX_LENGTH, item_feature_dim=0, semantic_ids=semantic_ids()
    )


def unsharded_lookup(model: Generator) -> Lookup:
    device = torch.device("cpu")
    tables = UnshardedTables(model.tables(), seed=1, learning_rate=0.1, device=device)
    return make_lookup(model.tables(), tables, None, device)


def lookup_ids(model: Generator, ids: Ids):
    return unsharded_lookup(model)(ids)


def prompt_rows(model: Generator, batch: SequenceBatch):
    return lookup_ids(model, model.prompt_ids(batch))
