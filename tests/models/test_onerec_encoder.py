"""What OneRec encodes a user with, the encoder and the queries of a long history, written out row by row."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_streams.jagged import Jagged
from models.kernels.context_attention import NEVER, ContextLayout
from models.kernels.rms_norm import EPSILON
from models.layers.feedforward import FeedForward
from models.layers.full_encoder import FullEncoder
from models.layers.qformer import QFormer
from models.layers.rotary import rotate

WIDTH, HEADS = 16, 4


def with_random_norms(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.RMSNorm):
            nn.init.normal_(part.weight)
    return module


def feedforwards() -> list[nn.Module]:
    return [FeedForward(WIDTH, 24, init_scale=0.4) for _ in range(2)]


def normed(norm: nn.Module, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, (WIDTH,), norm.weight, EPSILON)


def by_head(rows: Tensor) -> Tensor:
    """Shapes: [n, D] -> [heads, n, D / heads]."""
    return rows.unflatten(-1, (HEADS, -1)).transpose(0, 1)


def finished(block: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
    """Attention and feed-forward part, each added to what came in. Shapes: [n, D], [heads, n, D / heads] -> [n, D]."""
    hidden = hidden + F.linear(attended.transpose(0, 1).flatten(1), block.output.weight)
    inner = F.linear(normed(block.feedforward_norm, hidden), block.feedforward.expand.weight)
    gate, value = inner.chunk(2, dim=-1)
    return hidden + F.linear(F.silu(gate) * value, block.feedforward.contract.weight)


def test_the_encoder_is_blocks_of_full_attention_and_a_last_norm():
    torch.manual_seed(0)
    encoder = FullEncoder(width=WIDTH, num_heads=HEADS, feedforwards=feedforwards(), dropout=0.0)
    with_random_norms(encoder)
    sizes, hidden = [3, 5], torch.randn(8, WIDTH)
    expected = []
    for row in hidden.split(sizes):
        for block in encoder.blocks:
            projected = F.linear(normed(block.attention_norm, row), block.query_key_value.weight)
            parts = (by_head(part) for part in projected.chunk(3, dim=-1))
            row = finished(block, row, F.scaled_dot_product_attention(*parts))
        expected.append(normed(encoder.final_norm, row))
    found = encoder(hidden, Jagged.from_lengths(hidden, torch.tensor(sizes)))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_the_queries_of_a_target_read_what_it_knows_of_a_long_history():
    torch.manual_seed(0)
    qformer = QFormer(num_queries=2, width=WIDTH, num_heads=HEADS, feedforwards=feedforwards(), dropout=0.0)
    with_random_norms(qformer)
    events, places, positions = torch.randn(4, WIDTH), torch.arange(4), torch.tensor([1, 3, 4])
    layout = ContextLayout.build(
        Jagged.from_lengths(places, torch.tensor([4])),
        places + 1,
        torch.full((4,), NEVER),
        Jagged.from_lengths(positions, torch.tensor([3])),
    )
    found = qformer(positions, events, places, layout)
    read = normed(qformer.event_norm, events)
    for target, position in enumerate(positions.tolist()):
        hidden, at = qformer.queries.weight * WIDTH**0.5, torch.full((2,), position)
        for block in qformer.blocks:
            queries = F.linear(normed(block.query_norm, hidden), block.query.weight)
            keys, values = F.linear(read[:position], block.key_value.weight).chunk(2, dim=-1)
            turned = [
                rotate(part.unflatten(-1, (HEADS, -1)), where).transpose(0, 1)
                for part, where in ((queries, at), (keys, places[:position]))
            ]
            hidden = finished(block, hidden, F.scaled_dot_product_attention(*turned, by_head(values)))
        torch.testing.assert_close(found[target], hidden, rtol=1e-4, atol=1e-4)
