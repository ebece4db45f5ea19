"""A small decoder-only generator with random weights, and the same model computed path by path without any cache."""

import torch
from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.decoding.distribution import CodeDistribution
from models.generator import DecodeState, Generator
from models.kernels.jagged_attention import jagged_attention
from models.layers.shared_prompt_attention import (
    PromptKeyValues,
    PromptLayout,
    SuffixKeyValues,
    shared_prompt_attention,
)
from models.recommender import LossSum, StepContext
from models.tables import Ids, LookedUp, Rows, TableSpec

MAX_LENGTH = 16


class TinyGenerator(Generator):
    def __init__(self, code_sizes: tuple[int, ...], num_items: int, width: int = 16, num_blocks: int = 2):
        super().__init__()
        self.code_sizes, self.num_items, self.width = code_sizes, num_items, width
        self.positions = nn.Embedding(MAX_LENGTH + len(code_sizes), width)
        self.codes = nn.ModuleList(nn.Embedding(size, width) for size in code_sizes[:-1])
        self.blocks = nn.ModuleList(TinyBlock(width) for _ in range(num_blocks))
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in code_sizes)

    def tables(self) -> list[TableSpec]:
        return [TableSpec(name="item", num_rows=self.num_items, dim=self.width, features=("history",))]

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        return self.prompt_ids(batch)

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        raise NotImplementedError("only decodes")

    def prompt_ids(self, batch: SequenceBatch) -> Ids:
        return {"history": batch.items.values}

    def prefill(self, rows: Rows, batch: SequenceBatch) -> DecodeState:
        items, layers = batch.items, []
        within = torch.arange(batch.num_tokens) - items.offsets[items.row_index()]
        hidden = rows["history"].rows + self.positions(within)
        layout = PromptLayout.build(items)
        for block in self.blocks:
            queries, keys, values = block.project(hidden)
            layers.append(PromptKeyValues.build(keys, values, layout))
            hidden = block.finish(hidden, jagged_attention(queries, keys, values, layout.cells))
        return DecodeState(
            last_hidden=hidden[items.offsets[1:] - 1],
            lengths=items.lengths,
            prompt=tuple(layers),
            suffix=(None,) * len(layers),
        )

    def step(
        self, state: DecodeState, level: int, codes: Tensor | None, parents: Tensor | None
    ) -> tuple[Tensor, DecodeState]:
        if level == 0:
            return self.heads[0](state.last_hidden[:, None]), state
        state, suffixes = state.reorder(parents), []
        hidden = self.codes[level - 1](codes) + self.positions(state.lengths + level - 1)[:, None]
        for block, prompt, before in zip(self.blocks, state.prompt, state.suffix, strict=True):
            queries, keys, values = block.project(hidden)
            suffixes.append(SuffixKeyValues.append(before, keys, values))
            hidden = block.finish(hidden, shared_prompt_attention(queries, prompt, suffixes[-1]))
        return self.heads[level](hidden), state.with_suffix(suffixes)

    def path_logits_one_by_one(self, history: Tensor, path: Tensor) -> list[Tensor]:
        """Scores of every level for one user and one path, all tokens in one pass. Shapes: [n, D], [L] -> L x [K]."""
        length = len(history)
        codes = [self.codes[level](code) for level, code in enumerate(path[:-1])]
        hidden = (
            torch.cat((history, *(code[None] for code in codes)))
            + self.positions.weight[: length + len(codes)]
        )
        later = torch.ones(len(hidden), len(hidden), dtype=torch.bool).triu(1)
        for block in self.blocks:
            queries, keys, values = (part.transpose(0, 1) for part in block.project(hidden))
            scores = queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5
            attended = scores.masked_fill(later, float("-inf")).softmax(-1) @ values
            hidden = block.finish(hidden, attended.transpose(0, 1))
        return [head(hidden[length - 1 + level]) for level, head in enumerate(self.heads)]


class TinyBlock(nn.Module):
    def __init__(self, width: int, num_heads: int = 2):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shapes: [..., D] -> 3 x [..., heads, D / heads]."""
        projected = self.query_key_value(self.norm(hidden)).unflatten(-1, (3, self.num_heads, -1))
        return projected.unbind(-3)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        return hidden + self.output(attended.flatten(-2)).tanh()


def make_generator(code_sizes: tuple[int, ...], num_items: int, seed: int = 0) -> TinyGenerator:
    """Weights large enough that users and prefixes differ clearly."""
    torch.manual_seed(seed)
    model = TinyGenerator(code_sizes, num_items)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


def make_codes(num_items: int, code_sizes: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(size, (num_items,), generator=generator) for size in code_sizes]
    return torch.stack(columns, dim=1)


def make_users(
    lengths: list[int], num_items: int, width: int = 16, seed: int = 0
) -> tuple[Rows, SequenceBatch]:
    """Users with random histories, and the rows of their items."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(num_items, width, generator=generator)
    values = torch.randint(num_items, (sum(lengths),), generator=generator)
    batch = SequenceBatch(
        user_ids=torch.arange(len(lengths)), items=Jagged.from_lengths(values, torch.tensor(lengths))
    )
    return {"history": LookedUp(ids=values, rows=table[values])}, batch


def one_user(rows: Rows, batch: SequenceBatch, user: int) -> tuple[Rows, SequenceBatch]:
    alone = batch.select(user, user + 1)
    first = int(batch.items.offsets[user])
    found = rows["history"].rows[first : first + alone.num_tokens]
    return {"history": LookedUp(ids=alone.items.values, rows=found)}, alone


@torch.no_grad()
def logits_one_by_one(
    model: TinyGenerator, rows: Rows, batch: SequenceBatch, codes: Tensor
) -> list[list[list[Tensor]]]:
    """Scores [K] by user, item and level."""
    histories = [one_user(rows, batch, user)[0]["history"].rows for user in range(batch.num_users)]
    return [[model.path_logits_one_by_one(history, path) for path in codes] for history in histories]


def brute_force(logits: list[list[list[Tensor]]], codes: Tensor, distribution: CodeDistribution) -> Tensor:
    """Log-probability of every item's path for every user, by naive loops. Shapes: codes [N, L] -> [B, N]."""
    catalogue = {tuple(path) for path in codes.tolist()}
    result = torch.zeros(len(logits), len(codes))
    for item, path in enumerate(codes.tolist()):
        for level, code in enumerate(path):
            siblings = sorted({other[level] for other in catalogue if other[:level] == tuple(path[:level])})
            for user, of_items in enumerate(logits):
                scaled = of_items[item][level] / distribution.temperature
                normaliser = scaled[siblings] if distribution.over == "allowed" else scaled
                result[user, item] += scaled[code] - normaliser.logsumexp(0)
    return result
