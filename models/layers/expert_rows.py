"""Bringing tokens into the order of the experts they chose, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.kernels.length_buckets import round_up

FILLED_SLOTS = 16
"""Groups are small, so they are filled up to less than the rows of `layers.linear`."""


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """N choices in P slots, those of one expert side by side; P > N where groups are filled up."""

    ends: Tensor
    """[E] int32: slot after the last one of each expert."""
    slots: Tensor
    """[N] int64: slot of each choice."""
    choices: Tensor
    """[P] int64: choice in each slot; 0 where a slot is filling."""

    @property
    def is_filled(self) -> bool:
        return len(self.choices) > len(self.slots)


def group_rows(experts: Tensor, num_experts: int, *, fill: bool) -> Grouping:
    """Order choices by expert, and within one as they came; `fill` makes groups of few different sizes.

    Shapes: experts [N] -> Grouping.
    Cost: a host sync where groups are filled up.
    """
    ordered, order = experts.sort(stable=True)
    numbers = torch.arange(num_experts, device=experts.device)
    ends = torch.searchsorted(ordered, numbers, right=True)
    places = torch.arange(len(order), device=order.device)
    choices = order
    if fill:
        sizes = ends.diff(prepend=ends.new_zeros(1))
        filled_ends = torch.tensor([_filled(size) for size in sizes.tolist()]).cumsum(0)
        shifts = (filled_ends - filled_ends.diff(prepend=ends.new_zeros(1))) - (ends - sizes)
        places = places + shifts[ordered]
        choices = order.new_zeros(int(filled_ends[-1])).index_copy_(0, places, order)
        ends = filled_ends
    slots = torch.empty_like(order).index_copy_(0, order, places)
    return Grouping(ends=ends.to(torch.int32), slots=slots, choices=choices)


def _filled(size: int) -> int:
    """A multiple of 16, and of about a thirtieth of the size. Example: 33 -> 48, 1030 -> 1088."""
    return -(-round_up(size) // FILLED_SLOTS) * FILLED_SLOTS


def dispatch_rows(rows: Tensor, grouping: Grouping) -> Tensor:
    """Copy each token to the slots of its choices; the k choices of a token follow one another.

    Filling slots hold some token, and no gradient comes back from them.
    Shapes: [T, D] -> [P, D], N = T k.
    """
    return _Dispatch.apply(rows, grouping)


def collect_rows(rows: Tensor, grouping: Grouping) -> Tensor:
    """Bring the slots back into the order of choices. Shapes: [P, D] -> [N, D]."""
    return _Collect.apply(rows, grouping)


class _Dispatch(torch.autograd.Function):
    """Both directions gather: scattering is slower, and on CUDA adds in no fixed order."""

    @staticmethod
    def forward(ctx, rows: Tensor, grouping: Grouping) -> Tensor:
        ctx.grouping, ctx.num_rows = grouping, len(rows)
        tokens = grouping.choices
        if len(grouping.slots) > len(rows):
            tokens = tokens // (len(grouping.slots) // len(rows))
        return rows.index_select(0, tokens)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        slots = ctx.grouping.slots
        each = max(len(slots) // max(ctx.num_rows, 1), 1)
        first, *others = (slots[number::each] for number in range(each))
        by_token = gradient.index_select(0, first)
        for choice in others:
            by_token += gradient.index_select(0, choice)
        return by_token, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, grouping: Grouping) -> Tensor:
        ctx.grouping = grouping
        return rows.index_select(0, grouping.slots)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        grouping = ctx.grouping
        if not grouping.is_filled:
            return gradient.index_select(0, grouping.choices), None
        filled = gradient.new_zeros(len(grouping.choices), gradient.shape[1])
        return filled.index_copy_(0, grouping.slots, gradient), None
