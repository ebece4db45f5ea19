"""Softmax attention over users of unequal length in which each query says which events it may see.

`masked_attention` works on length buckets, `attend_last` answers a few queries of each user over all of its events.
Where a query may see nothing, the result is zero. What is hidden has a weight of exactly zero, so that no bit of the
result depends on it. `reference_masked_attention` computes query by query and is what both are tested against.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_streams.jagged import Jagged
from models.kernels.length_buckets import BucketLayout, to_cells, to_tokens
from models.kernels.softmax_cells import HIDDEN, attend_cells, hidden_bias


@dataclass(frozen=True, kw_only=True)
class Extra:
    """A key of its own for each query, which it always sees. Shapes: N queries."""

    keys: Tensor
    """[N, heads, D]."""
    values: Tensor
    """[N, heads, D]."""


def prefix_masks(visible: Tensor, layout: BucketLayout) -> list[Tensor]:
    """The first events of the user that each query may see. Shapes: [T] -> [users, length, length] per bucket."""
    return [
        torch.arange(cells.shape[1], device=cells.device) < cells
        for cells in to_cells(visible[:, None], layout)
    ]


def matching_masks(
    masks: Sequence[Tensor], wanted: Tensor, offered: Tensor, layout: BucketLayout
) -> list[Tensor]:
    """Of what a query sees, the events that offer what it wants; all of it where none does.

    Shapes: masks as of `prefix_masks`, wanted [T], offered [T, m], -1 for none.
    """
    both = torch.cat((wanted[:, None], offered), dim=1)
    narrowed = []
    for mask, cells in zip(masks, to_cells(both, layout), strict=True):
        narrowed.append(narrow_mask(mask, cells[:, :, 0], cells[:, :, 1:]))
    return narrowed


def narrow_mask(mask: Tensor, wanted: Tensor, offered: Tensor) -> Tensor:
    """Shapes: mask [users, Q, L], wanted [users, Q], offered [users, L, m] -> [users, Q, L]."""
    fits = torch.zeros_like(mask)
    for place in range(offered.shape[-1]):
        fits |= wanted[:, :, None] == offered[:, None, :, place]
    fits &= mask
    return torch.where(fits.any(-1, keepdim=True), fits, mask)


def masked_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    masks: Sequence[Tensor],
    layout: BucketLayout,
    *,
    bias: Sequence[Tensor] | None = None,
    extra: Extra | None = None,
) -> Tensor:
    """As many queries of each user as it has events.

    Shapes: queries, keys, values [T, heads, D]; masks [users, length, length] and bias, broadcast to
    [users, heads, length, length], per bucket -> [T, heads, D].
    """
    if queries.shape[0] == 0:
        nothing = queries * keys * values
        return nothing if extra is None else nothing + extra.keys * extra.values
    parts = (queries, keys, values) if extra is None else (queries, keys, values, extra.keys, extra.values)
    blocks = []
    for number, cells in enumerate(to_cells(torch.stack(parts, dim=1), layout)):
        q, k, v, *own = cells.permute(2, 0, 3, 1, 4)
        attended = _attend(q, k, v, masks[number], None if bias is None else bias[number], own)
        blocks.append(attended.transpose(1, 2))
    return to_tokens(blocks, layout)


def attend_last(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sequences: Jagged,
    layout: BucketLayout,
    *,
    wanted: Tensor,
    offered: Tensor,
    bias: Sequence[Tensor] | None = None,
    extra: Extra | None = None,
) -> Tensor:
    """P queries of each user over all of its events, each narrowed to the events that offer what it wants.

    Shapes: queries [B, P, heads, D], keys and values [T, heads, D], wanted [B, P], offered [T, m]; bias
    [users, heads, 1, length] per bucket; extra [B * P, heads, D] -> [B, P, heads, D]. Users without events get zeros.
    """
    result = torch.zeros_like(queries)
    if keys.shape[0] == 0:
        return result
    users = users_of_buckets(sequences, layout)
    flat = torch.cat((keys.flatten(1), values.flatten(1)), dim=1).unflatten(1, (2, *keys.shape[1:]))
    own = (
        None
        if extra is None
        else [part.unflatten(0, queries.shape[:2]) for part in (extra.keys, extra.values)]
    )
    for number, (cells, offers) in enumerate(
        zip(to_cells(flat, layout), to_cells(offered, layout), strict=True)
    ):
        who = users[number]
        k, v = cells.permute(2, 0, 3, 1, 4)
        there = torch.arange(cells.shape[1], device=cells.device) < sequences.lengths[who][:, None]
        mask = narrow_mask(there[:, None].expand(-1, queries.shape[1], -1), wanted[who], offers)
        q, *more = (part[who].transpose(1, 2) for part in (queries, *(own or ())))
        attended = _attend(q, k, v, mask, None if bias is None else bias[number], more)
        result[who] = (attended.transpose(1, 2) * there[:, :1, None, None]).to(result)
    return result


def users_of_buckets(sequences: Jagged, layout: BucketLayout) -> list[Tensor]:
    """Which users lie in each bucket, in the order of its cells. Shapes: [users] int64 per bucket."""
    found, first = [], 0
    for users, length in layout.buckets:
        cells = first + length * torch.arange(users, device=layout.token_of_cell.device)
        tokens = layout.token_of_cell[cells]
        # Only where all users lie in their own order is there one without events, whose cells hold another's token.
        is_own = layout.cell_of_token[tokens] == cells
        found.append(torch.where(is_own, sequences.row_index()[tokens], (cells - first) // length))
        first += users * length
    return found


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, extra: Sequence[Tensor]
) -> Tensor:
    """Shapes: queries [users, heads, Q, D], keys and values [users, heads, L, D], mask [users, Q, L]."""
    attended, weight = attend_cells(queries, keys, values, hidden_bias(~mask)[:, None], bias)
    if not extra:
        return (attended * (weight > HIDDEN / 2)).to(queries.dtype)
    own_key, own_value = (part.float() for part in extra)
    own = (queries.float() * own_key).sum(-1, keepdim=True) * queries.shape[-1] ** -0.5
    share = (weight - own).sigmoid()
    return (attended * share + own_value * (1 - share)).to(queries.dtype)


def reference_masked_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sees: Sequence[Sequence[int]],
    *,
    bias: Sequence[Tensor] | None = None,
    extra: Extra | None = None,
) -> Tensor:
    """The same, query by query and written out; `sees` are the tokens each query sees, `bias` [heads, seen] each.

    Shapes: queries [N, heads, D], keys and values [T, heads, D] -> [N, heads, D].
    """
    outputs = torch.zeros_like(queries)
    for number, seen in enumerate(sees):
        k, v = keys[list(seen)], values[list(seen)]
        scores_HL = torch.einsum("hd,lhd->hl", queries[number], k) / queries.shape[-1] ** 0.5
        if bias is not None:
            scores_HL = scores_HL + bias[number]
        if extra is not None:
            own = (queries[number] * extra.keys[number]).sum(-1, keepdim=True) / queries.shape[-1] ** 0.5
            scores_HL, v = torch.cat((scores_HL, own), dim=1), torch.cat((v, extra.values[number][None]))
        if scores_HL.shape[1]:
            outputs[number] = torch.einsum("hl,lhd->hd", scores_HL.softmax(-1), v)
    return outputs
