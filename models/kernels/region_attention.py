"""Attention of a prefix language model: regions that are read both ways, and prompts behind them, read forward only.

A token of a region sees the first so many tokens of its region: all of it, or what its own segment ends with. A token
of a prompt sees the beginning of its region that the prompt knows, and its prompt up to itself; no other prompt. So one
copy of a region serves all of its prompts. What is hidden has a weight of exactly zero. `reference_region_attention`
computes token by token and is what it is tested against.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from data_streams.jagged import Jagged
from models.kernels.masked_attention import masked_attention, prefix_masks, reference_masked_attention
from models.kernels.page_attention import PageLayout, attend_pages


@dataclass(frozen=True, kw_only=True)
class RegionLayout:
    """How regions and prompts lie in buckets; made once per batch for all layers."""

    pages: PageLayout
    masks: tuple[Tensor, ...]
    """By bucket of the regions: [regions, length, length], what each token of a region sees of it."""

    @staticmethod
    def build(regions: Jagged, limits: Tensor, prompts: Jagged, visible: Jagged) -> "RegionLayout":
        """`limits` says how many tokens of its region each token of it sees, `visible` the same for each prompt.

        Shapes: regions H tokens in R rows, limits [H], prompts G tokens in P rows, visible [P] in R rows, at least 1.
        """
        pages = PageLayout.build(regions, prompts, visible)
        return RegionLayout(pages=pages, masks=tuple(prefix_masks(limits, pages.history)))


def region_attention(queries: Tensor, keys: Tensor, values: Tensor, layout: RegionLayout) -> Tensor:
    """Shapes: queries, keys, values [H + G, heads, D], regions in front -> [H + G, heads, D]."""
    num_region = layout.pages.num_history
    cut = (num_region, queries.shape[0] - num_region)
    (rq, pq), (rk, pk), (rv, pv) = (part.split(cut) for part in (queries, keys, values))
    in_regions = masked_attention(rq, rk, rv, layout.masks, layout.pages.history)
    if cut[1] == 0:
        return in_regions
    return torch.cat((in_regions, attend_pages((pq, pk, pv), (rk, rv), layout.pages)))


def reference_region_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    regions: Jagged,
    limits: Tensor,
    prompts: Jagged,
    visible: Jagged,
) -> Tensor:
    """The same, token by token and written out. Shapes: [H + G, heads, D] -> [H + G, heads, D]."""
    num_region, sees = regions.values.shape[0], []
    for start, stop in pairwise(regions.offsets.tolist()):
        sees += [list(range(start, start + limit)) for limit in limits[start:stop].tolist()]
    owners, first = visible.row_index().tolist(), regions.offsets.tolist()
    for prompt, (start, stop) in enumerate(pairwise(prompts.offsets.tolist())):
        known = list(range(first[owners[prompt]], first[owners[prompt]] + int(visible.values[prompt])))
        sees += [known + [num_region + t for t in range(start, token + 1)] for token in range(start, stop)]
    return reference_masked_attention(queries, keys, values, sees)
