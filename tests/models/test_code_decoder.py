"""The blocks of the two decoders of OneRec against what their reports say, written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_streams.jagged import Jagged
from models.kernels.context_attention import (
    NEVER,
    ContextCells,
    ContextLayout,
    reference_context_attention,
)
from models.kernels.rms_norm import EPSILON
from models.layers.code_decoder import CodeBlock
from models.layers.feedforward import FeedForward
from models.layers.lazy_decoder import LazyBlock, LazyShape
from models.layers.rotary import rotate
from models.onerec import EncodedBlock

WIDTH, HEADS, LEVELS = 16, 4, 3
POSITIONS = torch.tensor([1, 2, 4])
"""Of three targets of one user, who did four things: each sees what was before it."""


def make_block(name: str) -> CodeBlock:
    feedforward = FeedForward(WIDTH, 24, init_scale=0.4)
    if name == "onerec":
        return EncodedBlock(width=WIDTH, num_heads=HEADS, feedforward=feedforward, dropout=0.0)
    shape = LazyShape(width=WIDTH, num_heads=HEADS, kv_layers=1, kv_split=2, kv_groups=2, dropout=0.0)
    return LazyBlock(shape, feedforward)


def normed(norm: nn.Module, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, (WIDTH,), norm.weight, EPSILON)


def with_context(block: CodeBlock, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    queries = F.linear(normed(block.context_norm, hidden), block.context_query.weight)
    queries = queries.unflatten(-1, (HEADS, -1))
    if isinstance(block, LazyBlock):
        queries = rotate(queries, POSITIONS[:, None].expand(-1, LEVELS))
    sees = [list(range(position)) for position in POSITIONS.tolist()]
    attended = reference_context_attention(queries, keys, values, sees).flatten(2)
    return hidden + F.linear(attended, block.context_output.weight)


def with_codes(block: CodeBlock, hidden: Tensor) -> Tensor:
    projected = F.linear(normed(block.code_norm, hidden), block.query_key_value.weight)
    parts = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in projected.chunk(3, dim=-1))
    attended = F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2)
    return hidden + F.linear(attended, block.code_output.weight)


def with_feedforward(block: CodeBlock, hidden: Tensor) -> Tensor:
    gate, value = F.linear(normed(block.feedforward_norm, hidden), block.feedforward.expand.weight).chunk(
        2, dim=-1
    )
    return hidden + F.linear(F.silu(gate) * value, block.feedforward.contract.weight)


@pytest.mark.parametrize("name", ["onerec-v2", "onerec"])
def test_a_block_reads_the_user_and_the_earlier_codes_in_the_order_of_its_report(name):
    torch.manual_seed(0)
    block = make_block(name)
    for norm in (block.context_norm, block.code_norm, block.feedforward_norm):
        nn.init.normal_(norm.weight)
    keys, values = torch.randn(2, 4, block.kv_groups, WIDTH // HEADS)
    sequences = Jagged.from_lengths(torch.arange(4), torch.tensor([4]))
    targets = Jagged.from_lengths(POSITIONS, torch.tensor([3]))
    layout = ContextLayout.build(sequences, torch.arange(1, 5), torch.full((4,), NEVER), targets)
    hidden = torch.randn(3, LEVELS, WIDTH)
    found = block(hidden, POSITIONS, ContextCells.build(keys, values, layout), layout)
    if name == "onerec":
        attended = with_context(block, with_codes(block, hidden), keys, values)
    else:
        attended = with_codes(block, with_context(block, hidden, keys, values))
    torch.testing.assert_close(found, with_feedforward(block, attended), rtol=1e-4, atol=1e-4)
