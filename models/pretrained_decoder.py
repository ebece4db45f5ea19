"""A decoder of Hugging Face transformers from a folder on disk, over our packed pages and shared prompts.

Its layers, norms and rotary positions stay as they are; only what attends to what is ours, through transformers'
attention interface: all tokens of a step are one sequence without padding, and the layout that travels with them says
what each sees. Weights are read from safetensors alone, and no code that comes with a model is run.

Needs the extra `hf`. The vectors of the text's tokens are kept only where a model reads text.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cluster.errors import ConfigError
from models.generator import DecodeState
from models.kernels.jagged_attention import jagged_attention
from models.kernels.page_attention import PageLayout, page_attention
from models.layers.attention_plan import Plan
from models.layers.page_decoder import PageDecoder
from models.layers.shared_prompt_attention import (
    PromptKeyValues,
    PromptLayout,
    SuffixKeyValues,
    shared_prompt_attention,
)
from models.layers.vocabulary import Vocabulary

ATTENTION = "grail_shared_history"


@runtime_checkable
class DecoderShape(Protocol):
    """What a model's Config says of its decoder."""

    pretrained: str
    width: int
    num_blocks: int
    num_heads: int
    feedforward_width: int
    dropout: float


def build_decoder(
    shape: DecoderShape, num_positions: int, *, num_words: int = 0
) -> "PageDecoder | PretrainedDecoder":
    """From the folder that is named, whose own sizes and words then hold, or from scratch, which knows no words."""
    if shape.pretrained:
        return PretrainedDecoder(shape.pretrained, num_words=num_words)
    return PageDecoder(
        width=shape.width,
        num_blocks=shape.num_blocks,
        num_heads=shape.num_heads,
        feedforward_width=shape.feedforward_width,
        num_positions=num_positions,
        dropout=shape.dropout,
    )


@dataclass(frozen=True)
class Packed(Plan):
    """Histories and the pages behind them."""

    layout: PageLayout

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return page_attention(queries, keys, values, self.layout)


@dataclass(frozen=True)
class Remembering(Plan):
    """Histories alone, whose keys and values are kept."""

    layout: PromptLayout
    kept: list[PromptKeyValues] = field(default_factory=list)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.kept.append(PromptKeyValues.build(keys, values, self.layout))
        return jagged_attention(queries, keys, values, self.layout.cells)


@dataclass(frozen=True)
class Extending(Plan):
    """One more token for each of W prefixes per user, B * W tokens."""

    state: DecodeState
    width: int
    kept: list[SuffixKeyValues] = field(default_factory=list)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows = (self.state.num_users, self.width)
        queries, keys, values = (part.unflatten(0, rows) for part in (queries, keys, values))
        self.kept.append(SuffixKeyValues.append(self.state.suffix[layer], keys, values))
        return shared_prompt_attention(queries, self.state.prompt[layer], self.kept[-1]).flatten(0, 1)


@dataclass(frozen=True)
class Nobody(Plan):
    """A single token in place of none, which transformers' layers cannot compute: all weights keep their gradients."""

    plan: Plan

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.plan.attend(layer, queries[:0], keys[:0], values[:0])
        return queries * keys * values


class OnlyThemselves(Plan):
    """Tokens that see nothing else."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return values


class PretrainedDecoder(nn.Module):
    """The same three calls as `PageDecoder`, and those of `models.layers.text_decoder.TextDecoder`."""

    def __init__(self, folder: str, *, num_words: int = 0):
        """`vocabulary` embeds and predicts text, where there are words to know.

        Raises: ConfigError where transformers is missing, or the folder holds no decoder that can be used.
        """
        super().__init__()
        self.model = _load(folder)
        embedding = self.model.get_input_embeddings()
        vocabulary = embedding.weight.detach()
        self.vocabulary_mean, self.vocabulary_spread = vocabulary.mean(0), float(vocabulary.std(0).mean())
        self.width = vocabulary.shape[1]
        self.model.set_input_embeddings(nn.Identity())
        if num_words:
            _check_words(num_words, len(vocabulary), folder)
            self.vocabulary = Vocabulary(vocabulary.clone())
            # Cohere's decoders multiply the scores of words by a number of their own.
            is_scaled = getattr(self.model.config, "logit_scale", None) not in (None, 1.0)
            self.is_tied = self.model.config.tie_word_embeddings and not is_scaled
            _check_layers(self.model, folder)
            self._check_alike(embedding, folder)

    def forward(self, tokens: Tensor, places: Tensor, layout: PageLayout) -> Tensor:
        """The states after all tokens of histories and, behind them, pages. Shapes: [N, D], [N] -> [N, D]."""
        return self._run(tokens, places, Packed(layout))

    def remember(
        self, tokens: Tensor, places: Tensor, layout: PromptLayout
    ) -> tuple[Tensor, tuple[PromptKeyValues, ...]]:
        """The same over histories alone, with their keys and values by layer. Shapes: [H, D], [H] -> [H, D]."""
        plan = Remembering(layout)
        return self._run(tokens, places, plan), tuple(plan.kept)

    def extend(self, tokens: Tensor, places: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
        """One more token for each of W prefixes per user. Shapes: [B, W, D], [B, W] -> [B, W, D]."""
        plan = Extending(state, tokens.shape[1])
        hidden = self._run(tokens.flatten(0, 1), places.flatten(), plan)
        return hidden.view_as(tokens), state.with_suffix(plan.kept)

    @property
    def num_layers(self) -> int:
        return len(self.model.layers)

    def feedforwards(self) -> list[nn.Module]:
        """The feed-forward part of each layer."""
        return [layer.mlp for layer in self.model.layers]

    def run_layers(self, hidden: Tensor, places: Tensor, plan: Plan, first: int, stop: int) -> Tensor:
        """Layers first..stop (exclusive) alone, over at least one token. Shapes: [N, D], [N] -> [N, D]."""
        hidden = hidden[None]
        turns = self.model.rotary_emb(hidden, places[None])
        for number in range(first, stop):
            hidden = self.model.layers[number](
                hidden,
                attention_mask=None,
                position_ids=places[None],
                position_embeddings=turns,
                use_cache=False,
                grail_plan=plan,
            )
        return hidden[0]

    def finish(self, hidden: Tensor) -> Tensor:
        """The norm behind the last layer. Shapes: [n, D] -> [n, D]."""
        return self.model.norm(hidden)

    def initialise_like_vocabulary(self, vectors: nn.Embedding) -> None:
        """New tokens begin around the mean of the old ones, as far apart as these are."""
        nn.init.normal_(vectors.weight, std=self.vocabulary_spread)
        with torch.no_grad():
            vectors.weight += self.vocabulary_mean

    @torch.no_grad()
    def _check_alike(self, embedding: nn.Module, folder: str) -> None:
        """Raises: ConfigError where words, or layers one by one, give other states than the model as a whole."""
        words = torch.arange(2, device=embedding.weight.device)
        tokens, plan = self.vocabulary(words), OnlyThemselves()
        whole, by_layers = (
            self._run(tokens, words, plan),
            self.run_layers(tokens, words, plan, 0, self.num_layers),
        )
        alike = torch.allclose(embedding(words), tokens)
        if not alike or not torch.allclose(self.finish(by_layers), whole, rtol=1e-3, atol=1e-4):
            raise ConfigError(
                f"model.pretrained must read words by their vectors as they are to read text, and the "
                f"{type(self.model).__name__} in {folder} scales them or does more than its layers; take another, "
                "such as Llama or Qwen"
            )

    def _run(self, tokens: Tensor, places: Tensor, plan: Plan) -> Tensor:
        if not len(tokens):
            return self._run(tokens.new_zeros(1, self.width), places.new_zeros(1), Nobody(plan))[:0]
        found = self.model(
            inputs_embeds=tokens[None], position_ids=places[None], use_cache=False, grail_plan=plan
        )
        return found.last_hidden_state[0]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Any,
    *,
    scaling: float,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer. Shapes: query [1, heads, N, D] -> [1, N, heads, D]."""
    groups = query.shape[1] // key.shape[1]
    queries = query[0].transpose(0, 1) * (scaling * query.shape[-1] ** 0.5)
    keys, values = (part[0].transpose(0, 1).repeat_interleave(groups, dim=1) for part in (key, value))
    return options["grail_plan"].attend(module.layer_idx, queries, keys, values)[None], None


def _check_words(wanted: int, known: int, folder: str) -> None:
    if known < wanted:
        raise ConfigError(
            f"model.pretrained must know all {wanted} tokens of the run's tokenizer, and {folder} has vectors for "
            f"{known}; give a model and a tokenizer that belong together"
        )


def _check_layers(model: nn.Module, folder: str) -> None:
    """Raises: ConfigError where the layers cannot be run some at a time."""
    missing = [name for name in ("layers", "rotary_emb", "norm") if not hasattr(model, name)]
    if missing:
        raise ConfigError(
            f"model.pretrained must be a decoder with rotary positions whose layers can be run one by one (such as "
            f"Llama, Mistral or Qwen) to read text, and the {type(model).__name__} in {folder} has no "
            f"{', '.join(missing)}; take another"
        )


def _load(folder: str) -> nn.Module:
    try:
        from transformers import AttentionInterface, AutoConfig, AutoModel
    except ImportError as error:
        raise ConfigError(
            "model.pretrained needs Hugging Face transformers; install the extra: pip install -e '.[hf]'"
        ) from error
    if not any(Path(folder).glob("*.safetensors")):
        raise ConfigError(
            f"model.pretrained must be a folder with a decoder's config.json and *.safetensors, and {folder} has none; "
            "weights in other formats are not read, since loading them can run code"
        )
    AttentionInterface.register(ATTENTION, _attend)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ConfigError(
            f"model.pretrained must attend to the whole history, and {folder} has sliding windows"
        )
    return AutoModel.from_pretrained(
        folder,
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation=ATTENTION,
        dtype=torch.float32,
    )
