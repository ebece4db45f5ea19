"""GenRec: a decoder-only transformer that learns to write the whole page a request returned, and serves item by item.

The history is merged, one token per item, and followed by the codes of the page's items, the strongest answers first.
All pages of a user share one copy of the history: a page sees what lies before it, and itself.

Source: GenRec (JD.com, 2026), arXiv 2604.14878. RECONSTRUCTED: the history is in the order of time; no separator stands
between the items of a page, and an end token behind the last one, which is no choice before the first; positions count
on over the merged history; ties in the order of display, at most ten items (docs/pages.md). From scratch or, as
the paper does, from a language model on disk (`models.pretrained_decoder`).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cluster.errors import DataError
from data_streams.batch import CLICKED, Pages, SequenceBatch
from data_streams.jagged import Jagged
from models.generator import DecodeState, Generator, next_code_loss
from models.kernels.page_attention import PageLayout
from models.layers.code_embedding import CodeEmbedding
from models.layers.initialise import initialise
from models.layers.linear import Linear
from models.layers.shared_prompt_attention import PromptLayout
from models.layers.token_merger import TokenMerger
from models.pretrained_decoder import build_decoder
from models.recommender import LossSum, StepContext
from models.semantic_ids import SemanticIds
from models.tables import Ids, Rows, TableSpec


class GenRec(Generator):
    """A generator over one stream of tokens: all histories, and behind them all pages."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        needs_semantic_ids: ClassVar[bool] = True
        """Whether `build` is to be given the catalogue's semantic IDs."""
        has_own_objective: ClassVar[bool] = True
        """Whether the loss is the model's own."""

        target: Literal["page", "item"] = "page"
        """page: the whole page, list-wise. item: every chosen item of it by itself (point-wise, the baseline), or,
        where the data is read without pages, the next item after each event."""
        page_items: int = 10
        """Most items of a page; as data.page-items."""
        merge: bool = True
        """Make one token of the codes of an item of the history."""
        separators: bool = False
        """Put a separator behind each item of the history."""
        pretrained: str = ""
        """Folder of a Hugging Face decoder (config.json, *.safetensors) to start from, whose own sizes then hold,
        without dropout; left out, from scratch with those below. Needs the extra `hf` and the folder in every use."""
        width: int = 192
        """Size of the residual stream."""
        num_blocks: int = 4
        """Blocks on top of each other."""
        num_heads: int = 4
        """Attention heads per block."""
        feedforward_width: int = 512
        """Hidden size of the feed-forward part."""
        dropout: float = 0.2
        """Dropout on the input and on what blocks add."""
        init_scale: float = 0.02
        """Standard deviation of the initial weights."""

        @property
        def needs_pages(self) -> bool:
            """Whether batches must come with pages."""
            return self.target == "page"

        def build(self, **parts: Any) -> "GenRec":
            return GenRec(self, **parts)

    def __init__(
        self,
        config: Config,
        *,
        num_items: int,
        max_length: int,
        item_feature_dim: int,
        semantic_ids: SemanticIds,
    ):
        super().__init__()
        self.config, self.code_sizes = config, semantic_ids.code_sizes
        num_levels = len(self.code_sizes)
        self.tokens_per_item = (1 if config.merge else num_levels) + config.separators
        self.register_buffer("item_codes", semantic_ids.codes, persistent=False)
        num_positions = max_length * self.tokens_per_item + config.page_items * num_levels
        self.decoder = build_decoder(config, num_positions)
        width = self.decoder.width
        self.codes = CodeEmbedding(self.code_sizes, width)
        if config.merge:
            self.merger = TokenMerger(num_levels, width)
        if config.separators:
            self.separator = nn.Embedding(1, width)
        self.heads = nn.ModuleList(Linear(width, size) for size in self.code_sizes)
        if config.target == "page":
            self.end = Linear(width, 1)
        self._initialise_all()

    def _initialise_all(self) -> None:
        """All but what a pretrained decoder brings along."""
        is_pretrained = bool(self.config.pretrained)
        for part in self.children():
            if part is not self.decoder or not is_pretrained:
                part.apply(partial(initialise, scale=self.config.init_scale))
        if is_pretrained:
            self.decoder.initialise_like_vocabulary(self.codes.vectors)
        if self.config.merge:
            self.merger.initialise()

    def tables(self) -> list[TableSpec]:
        return []

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        return {}

    def prompt_ids(self, batch: SequenceBatch) -> Ids:
        return {}

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        pages = batch.pages
        if self.config.target == "item":
            return replace(batch, pages=next_items(batch) if pages is None else single_items(pages))
        if pages is None or pages.items.max_length > self.config.page_items:
            given = "without any" if pages is None else f"with up to {pages.items.max_length}"
            raise DataError(
                f"batches must come with pages of at most model.page-items {self.config.page_items} items, and they "
                f"come {given}; give --data.pages, and --data.page-items as large as --model.page-items"
            )
        return batch

    def num_targets(self, batch: SequenceBatch) -> int:
        return batch.pages.items.values.shape[0]

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        pages, paths = batch.pages, self.item_codes[batch.pages.items.values]
        history, written = self.encode_pages(batch, paths)
        ends = pages.history_ends(batch.items) * self.tokens_per_item - 1
        begin, first = history[ends[pages.items.row_index()]], pages.items.places() == 0
        if self.config.target == "page":
            begin = torch.where(first[:, None], begin, written[:, -1].roll(1, 0))
        states = (begin, *written.unbind(1))
        logits = [head(state) for head, state in zip(self.heads, states[: len(self.heads)], strict=True)]
        if self.config.target == "item":
            return next_code_loss(logits, paths)
        return self._page_loss(logits, paths, begin, written[:, -1], pages)

    def _page_loss(
        self, logits: list[Tensor], paths: Tensor, begin: Tensor, after: Tensor, pages: Pages
    ) -> LossSum:
        """-log p of all codes and of the end of each page, which is a choice where a further item may begin.

        Shapes: begin and after [E, D], the states before and after each item.
        """
        first = pages.items.places()[:, None] == 0
        could_end = self.end(begin).masked_fill(first, float("-inf"))
        logits[0] = torch.cat((logits[0], could_end), dim=1)
        codes = next_code_loss(logits, paths)
        last = after[pages.items.offsets[1:] - 1]
        choices = torch.cat((self.heads[0](last), self.end(last)), dim=1).float()
        end = (choices.logsumexp(1) - choices[:, -1]).sum()
        return LossSum(
            sum=codes.sum + end, count=codes.count, metrics={**codes.metrics, "loss_end": end.detach()}
        )

    def encode_pages(self, batch: SequenceBatch, paths: Tensor) -> tuple[Tensor, Tensor]:
        """The states after all tokens. Shapes: paths [E, L] of the pages' items -> [H, D], [E, tokens per item, D].

        The last code of a page is read where it is to be told that the page ends.
        """
        pages = batch.pages
        given = paths if self.config.target == "page" else paths[:, :-1]
        (history, history_places), per_item = self._history_tokens(batch), given.shape[1]
        places = pages.history_lengths.values * self.tokens_per_item
        places = places[pages.items.row_index()] + pages.items.places() * per_item
        places = places[:, None] + torch.arange(per_item, device=places.device)
        written = Jagged(
            values=self.codes(given).flatten(0, 1),
            offsets=pages.items.offsets * per_item,
            max_length=pages.items.max_length * per_item,
        )
        visible = pages.history_lengths.with_values(pages.history_lengths.values * self.tokens_per_item)
        hidden = self.decoder(
            torch.cat((history.values, written.values)),
            torch.cat((history_places, places.flatten())),
            PageLayout.build(history, written, visible),
        )
        of_history, of_pages = hidden.split((len(history.values), len(written.values)))
        return of_history, of_pages.unflatten(0, given.shape)

    def prefill(self, rows: Rows, batch: SequenceBatch) -> DecodeState:
        tokens, places = self._history_tokens(batch)
        hidden, prompt = self.decoder.remember(tokens.values, places, PromptLayout.build(tokens))
        return DecodeState(
            last_hidden=hidden[tokens.offsets[1:] - 1],
            lengths=tokens.lengths,
            prompt=prompt,
            suffix=(None,) * len(prompt),
        )

    def step(
        self, state: DecodeState, level: int, codes: Tensor | None, parents: Tensor | None
    ) -> tuple[Tensor, DecodeState]:
        if level == 0:
            return self.heads[0](state.last_hidden)[:, None], state
        tokens = self.codes(codes[..., None], level - 1)[..., 0, :]
        places = (state.lengths + level - 1)[:, None].expand_as(codes)
        hidden, state = self.decoder.extend(tokens, places, state.reorder(parents))
        return self.heads[level](hidden.flatten(0, 1)).unflatten(0, codes.shape), state

    def _history_tokens(self, batch: SequenceBatch) -> tuple[Jagged, Tensor]:
        """The tokens of the users' histories, and their positions. Shapes: [H, D], [H]."""
        items, per_item = batch.items, self.tokens_per_item
        tokens = self.codes(self.item_codes[items.values])
        if self.config.merge:
            tokens = self.merger(tokens)[:, None]
        if self.config.separators:
            index = torch.zeros(len(tokens), 1, dtype=torch.int64, device=tokens.device)
            tokens = torch.cat((tokens, self.separator(index)), dim=1)
        history = Jagged(
            values=tokens.flatten(0, 1),
            offsets=items.offsets * per_item,
            max_length=items.max_length * per_item,
        )
        return history, history.places()


def single_items(pages: Pages) -> Pages:
    """Every chosen item as a page of its own, all of a page after the same history; host side."""
    chosen = pages.strengths >= CLICKED
    page = pages.items.row_index()[chosen]
    users = pages.history_lengths.row_index()[page]
    per_user = torch.zeros_like(pages.history_lengths.lengths)
    per_user.index_add_(0, users, torch.ones_like(users))
    return Pages(
        items=_one_each(pages.items.values[chosen]),
        strengths=pages.strengths[chosen],
        positions=pages.positions[chosen],
        history_lengths=Jagged.from_lengths(pages.history_lengths.values[page], per_user),
        times_s=pages.times_s[page],
    )


def next_items(batch: SequenceBatch) -> Pages:
    """The item after each event as a page of its own; host side."""
    unknown = torch.full_like(batch.targets, -1)
    return Pages(
        items=_one_each(batch.targets),
        strengths=torch.full_like(batch.targets, CLICKED),
        positions=unknown,
        history_lengths=batch.items.with_values(batch.items.places() + 1),
        times_s=unknown,
    )


def _one_each(items: Tensor) -> Jagged:
    return Jagged.from_lengths(items, torch.ones_like(items))
