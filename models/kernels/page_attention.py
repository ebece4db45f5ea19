"""Causal attention over a user's history and over many pages that each know a part of it.

The tokens of a history see it up to themselves. The tokens of a page see the history before the page, and their page
up to themselves, but no other page: so one copy of the history serves all pages of a user. `page_attention` works on
length buckets; what is hidden has a weight of exactly zero. `reference_page_attention` computes token by token and is
what it is tested against.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from data_streams.jagged import Jagged
from models.kernels.jagged_attention import jagged_attention
from models.kernels.length_buckets import BucketLayout, bucket_layout, to_cells, to_tokens
from models.kernels.masked_attention import reference_masked_attention
from models.kernels.softmax_cells import attend_cells, hidden_bias


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """How histories and pages lie in buckets; made once per batch for all layers.

    Shapes: H history tokens and G page tokens, which stand behind them in the stream of H + G tokens.
    """

    num_history: int
    history: BucketLayout
    """Histories, a row per user."""
    own: BucketLayout
    """Pages, a row per page."""
    users: BucketLayout
    """The tokens of all pages, a row per user."""
    keys: tuple[Tensor, ...]
    """By bucket of `users`: [users, length] int64, the history tokens of each user, any where there are fewer."""
    hidden: tuple[Tensor, ...]
    """By bucket of `users`: [users, 1, queries, length], `hidden_bias` of what a page token may not see."""

    @staticmethod
    def build(history: Jagged, pages: Jagged, visible: Jagged) -> "PageLayout":
        """`visible` says for each page of each user how many tokens of the history it sees, at least one.

        Shapes: history H tokens in B rows, pages G tokens in P rows, visible [P] in B rows.
        """
        of_users = Jagged(
            values=pages.values,
            offsets=pages.offsets[visible.offsets],
            max_length=pages.max_length * visible.max_length,
        )
        users = bucket_layout(of_users)
        of_token = torch.stack((visible.values[pages.row_index()], of_users.row_index()), dim=1)
        keys, hidden = [], []
        for cells in to_cells(of_token, users):
            # Padding cells of a row hold some token's user: its first cell is always real.
            who = cells[:, 0, 1]
            lengths = history.lengths[who]
            longest = int(lengths.max()) if history.offsets.device.type == "cpu" else history.max_length
            places = torch.arange(longest, device=who.device)
            keys.append(
                torch.minimum(history.offsets[who, None] + places, history.offsets[who + 1, None] - 1)
            )
            hidden.append(hidden_bias(places >= cells[:, None, :, :1]))
        return PageLayout(
            num_history=history.values.shape[0],
            history=bucket_layout(history),
            own=bucket_layout(pages),
            users=users,
            keys=tuple(keys),
            hidden=tuple(hidden),
        )


def page_attention(queries: Tensor, keys: Tensor, values: Tensor, layout: PageLayout) -> Tensor:
    """Shapes: queries, keys, values [H + G, heads, D] -> [H + G, heads, D]."""
    cut = (layout.num_history, queries.shape[0] - layout.num_history)
    (hq, pq), (hk, pk), (hv, pv) = (part.split(cut) for part in (queries, keys, values))
    in_history = jagged_attention(hq, hk, hv, layout.history)
    if cut[1] == 0:
        return in_history
    return torch.cat((in_history, attend_pages((pq, pk, pv), (hk, hv), layout)))


def attend_pages(pages: tuple[Tensor, ...], history: tuple[Tensor, ...], layout: PageLayout) -> Tensor:
    """What the tokens of the pages see, of which there must be some.

    Shapes: queries, keys, values [G, heads, D] of pages, keys, values [H, heads, D] of histories -> [G, heads, D].
    """
    own, own_weight = _attend_own(*pages, layout.own)
    before, before_weight = _attend_history(pages[0], *history, layout)
    total = torch.logaddexp(own_weight, before_weight)
    share = (own_weight - total).exp()[..., None], (before_weight - total).exp()[..., None]
    return (own * share[0] + before * share[1]).to(pages[0].dtype)


def _attend_own(queries: Tensor, keys: Tensor, values: Tensor, layout: BucketLayout) -> tuple[Tensor, Tensor]:
    """Each page token over its page up to itself.

    Shapes: [G, heads, D] each -> [G, heads, D], logarithm of the weights' sum [G, heads].
    """
    blocks = []
    for cells in to_cells(torch.stack((queries, keys, values), dim=1), layout):
        places = torch.arange(cells.shape[1], device=cells.device)
        blocks.append(_attend(*cells.unbind(2), hidden_bias(places > places[:, None])))
    return _split_weight(to_tokens(blocks, layout))


def _attend_history(
    queries: Tensor, keys: Tensor, values: Tensor, layout: PageLayout
) -> tuple[Tensor, Tensor]:
    """Each page token over the history before its page; shapes as above, keys and values [H, heads, D]."""
    blocks = []
    for number, cells in enumerate(to_cells(queries, layout.users)):
        index = layout.keys[number]
        blocks.append(_attend(cells, keys[index], values[index], layout.hidden[number]))
    return _split_weight(to_tokens(blocks, layout.users))


def _attend(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """Softmax attention, and behind each result the logarithm of the sum of its weights.

    Shapes: queries [u, Q, heads, D], keys and values [u, K, heads, D], hidden as of `attend_cells`
    -> [u, Q, heads, D + 1] fp32.
    """
    attended, weight = attend_cells(*(part.transpose(1, 2) for part in (queries, keys, values)), hidden)
    return torch.cat((attended.float(), weight), dim=-1).transpose(1, 2)


def _split_weight(tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens[..., :-1], tokens[..., -1]


def reference_page_attention(
    queries: Tensor, keys: Tensor, values: Tensor, history: Jagged, pages: Jagged, visible: Jagged
) -> Tensor:
    """The same, token by token and written out. Shapes: [H + G, heads, D] -> [H + G, heads, D]."""
    num_history, sees = history.values.shape[0], []
    for start, stop in pairwise(history.offsets.tolist()):
        sees += [list(range(start, token + 1)) for token in range(start, stop)]
    users, first = visible.row_index().tolist(), history.offsets.tolist()
    for page, (start, stop) in enumerate(pairwise(pages.offsets.tolist())):
        before = first[users[page]]
        known = list(range(before, before + int(visible.values[page])))
        sees += [known + [num_history + t for t in range(start, token + 1)] for token in range(start, stop)]
    return reference_masked_attention(queries, keys, values, sees)
