"""A small GPT-2 as a generator of this project, with the weights and names of Hugging Face's."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from models.generator import DecodeState, Generator
from models.kernels.jagged_attention import jagged_attention
from models.layers.shared_prompt_attention import (
    PromptKeyValues,
    PromptLayout,
    SuffixKeyValues,
    shared_prompt_attention,
)
from models.recommender import LossSum, StepContext
from models.tables import Ids, Rows, TableSpec


@dataclass(frozen=True, kw_only=True)
class GPTShape:
    width: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_codes: int = 256
    """Prompt tokens and the codes of every level are the same words, so all softmaxes run over the same words."""
    num_levels: int = 3
    max_positions: int


def random_weights(shape: GPTShape, seed: int = 0) -> dict[str, Tensor]:
    """Weights that spread the scores: those of a fresh GPT-2 leave all items nearly tied."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    width, weights = shape.width, {}
    weights["transformer.wte.weight"] = draw(shape.num_codes, width)
    weights["transformer.wpe.weight"] = draw(shape.max_positions, width)
    weights["lm_head.weight"] = 0.15 * draw(shape.num_codes, width)
    norms = [f"h.{layer}.{name}" for layer in range(shape.num_layers) for name in ("ln_1", "ln_2")]
    for name in (*norms, "ln_f"):
        weights[f"transformer.{name}.weight"] = 1 + 0.1 * draw(width)
        weights[f"transformer.{name}.bias"] = 0.1 * draw(width)
    sizes = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
    for layer in range(shape.num_layers):
        for name, (rows, columns) in sizes.items():
            weight = draw(rows * width, columns * width) / (rows * width) ** 0.5
            weights[f"transformer.h.{layer}.{name}.weight"] = weight
            weights[f"transformer.h.{layer}.{name}.bias"] = 0.1 * draw(columns * width)
    return weights


class SmallGPT(Generator):
    def __init__(self, shape: GPTShape, weights: dict[str, Tensor]):
        super().__init__()
        self.code_sizes = (shape.num_codes,) * shape.num_levels
        self.words = nn.Embedding.from_pretrained(weights["transformer.wte.weight"])
        self.positions = nn.Embedding.from_pretrained(weights["transformer.wpe.weight"])
        self.blocks = nn.ModuleList(
            Block(shape, {key.removeprefix(prefix): value for key, value in weights.items() if prefix in key})
            for prefix in (f"transformer.h.{layer}." for layer in range(shape.num_layers))
        )
        self.final_norm = _norm(weights, "transformer.ln_f")
        self.head = nn.Linear(shape.width, shape.num_codes, bias=False)
        self.head.weight = nn.Parameter(weights["lm_head.weight"])
        self.eval()

    def tables(self) -> list[TableSpec]:
        return []

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        return {}

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        raise NotImplementedError("this model is only searched with")

    def prompt_ids(self, batch: SequenceBatch) -> Ids:
        return {}

    def prefill(self, rows: Rows, batch: SequenceBatch) -> DecodeState:
        items = batch.items
        layout, last = PromptLayout.build(items), items.offsets[1:] - 1
        within = torch.arange(batch.num_tokens) - items.offsets[items.row_index()]
        hidden, prompt = self.words(items.values) + self.positions(within), []
        for block in self.blocks[:-1]:
            queries, keys, values = block.project(hidden)
            prompt.append(PromptKeyValues.build(keys, values, layout))
            hidden = block.finish(hidden, jagged_attention(queries, keys, values, layout.cells))
        # Of the last block only its keys, its values and the last event's output are ever read.
        queries, keys, values = self.blocks[-1].project(hidden)
        prompt.append(PromptKeyValues.build(keys, values, layout))
        attended = shared_prompt_attention(queries[last][:, None], prompt[-1])
        return DecodeState(
            last_hidden=self.blocks[-1].finish(hidden[last], attended[:, 0]),
            lengths=items.lengths,
            prompt=tuple(prompt),
            suffix=(None,) * len(prompt),
        )

    def step(
        self, state: DecodeState, level: int, codes: Tensor | None, parents: Tensor | None
    ) -> tuple[Tensor, DecodeState]:
        if level == 0:
            return self.head(self.final_norm(state.last_hidden))[:, None], state
        state, suffixes = state.reorder(parents), []
        hidden = self.words(codes) + self.positions(state.lengths + level - 1)[:, None]
        for block, prompt, before in zip(self.blocks, state.prompt, state.suffix, strict=True):
            queries, keys, values = block.project(hidden)
            suffixes.append(SuffixKeyValues.append(before, keys, values))
            hidden = block.finish(hidden, shared_prompt_attention(queries, prompt, suffixes[-1]))
        return self.head(self.final_norm(hidden)), state.with_suffix(suffixes)


class Block(nn.Module):
    def __init__(self, shape: GPTShape, weights: dict[str, Tensor]):
        super().__init__()
        self.num_heads = shape.num_heads
        self.attention_norm, self.feedforward_norm = _norm(weights, "ln_1"), _norm(weights, "ln_2")
        self.query_key_value = _linear(weights, "attn.c_attn")
        self.attention_output = _linear(weights, "attn.c_proj")
        self.expand, self.contract = _linear(weights, "mlp.c_fc"), _linear(weights, "mlp.c_proj")

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shapes: [..., D] -> 3 x [..., heads, D / heads]."""
        projected = self.query_key_value(self.attention_norm(hidden))
        return projected.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Shapes: [..., D], [..., heads, D / heads] -> [..., D]."""
        hidden = hidden + self.attention_output(attended.flatten(-2))
        expanded = F.gelu(self.expand(self.feedforward_norm(hidden)), approximate="tanh")
        return hidden + self.contract(expanded)


def _linear(weights: dict[str, Tensor], name: str) -> nn.Linear:
    weight = weights[f"{name}.weight"].T.contiguous()
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(weights[f"{name}.bias"])
    return linear


def _norm(weights: dict[str, Tensor], name: str) -> nn.LayerNorm:
    norm = nn.LayerNorm(weights[f"{name}.weight"].shape)
    norm.weight = nn.Parameter(weights[f"{name}.weight"])
    norm.bias = nn.Parameter(weights[f"{name}.bias"])
    return norm
