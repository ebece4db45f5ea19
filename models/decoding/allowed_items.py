"""Which items each user may be given: the rest of the catalogue after allow and deny lists, which may be nothing."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cluster.errors import DataError
from data_streams.jagged import Jagged
from models.decoding.trie import PrefixTrie


@dataclass(frozen=True, kw_only=True)
class AllowedItems:
    """Counts and finds a user's allowed items among places of the trie, in logarithmic time and without [B, N].

    Places that a list for everyone leaves are renumbered; each user's own list is kept as sorted keys
    user * (N + 1) + place. The allowed items below any node then are `before(stop) - before(start)`, at any depth.

    Shapes: B users, N items, n places that the list for everyone leaves, S entries of the users' own lists.
    """

    num_users: int
    num_items: int
    left_before: Tensor | None
    """[N + 1] int32: places before each place that the list for everyone leaves; None where there is none."""
    left: Tensor | None
    """[n] the places it leaves."""
    own: Literal["allow", "deny", "none"]
    """What the users' own lists say."""
    keys: Tensor
    """[S] int64 ascending."""
    starts: Tensor
    """[B + 1] int64: where each user's keys begin."""

    @staticmethod
    def build(
        trie: PrefixTrie,
        *,
        num_users: int,
        allow: Jagged | Tensor | None = None,
        deny: Jagged | Tensor | None = None,
    ) -> "AllowedItems":
        """Lists of item rows: a tensor [n] holds for everyone, a Jagged has a list for each user (seen items, say).

        An item is allowed if it is in the allow list, where there is one, and not in the deny list. A user's own list
        may leave nothing to this user, whose slots a search then leaves empty.

        Raises: DataError for rows that are no items, for lists of other users, and where nothing is left for everyone.
        """
        _check_lists(trie, num_users, allow, deny)
        left = _left_for_everyone(trie, allow, deny)
        before = None if left is None else _counts_before(left)
        keys = {
            name: _user_keys(trie, entries, left, before)
            for name, entries in (("allow", allow), ("deny", deny))
            if isinstance(entries, Jagged)
        }
        own = next(iter(keys), "none")
        nothing = torch.zeros(0, dtype=torch.int64, device=trie.items.device)
        listed = keys.get(own, nothing)
        if len(keys) == 2:
            listed = listed[~torch.isin(listed, keys["deny"], assume_unique=True)]
        stride = trie.num_items + 1
        borders = torch.arange(num_users + 1, device=trie.items.device) * stride
        return AllowedItems(
            num_users=num_users,
            num_items=trie.num_items,
            left_before=before,
            left=None if left is None else left.nonzero()[:, 0],
            own=own,
            keys=listed,
            starts=torch.searchsorted(listed, borders),
        )

    def totals(self) -> Tensor:
        """Number of items allowed to each user. Shapes: [B] int64."""
        ends = torch.full((self.num_users, 1), self.num_items, device=self.keys.device)
        return self.before(ends)[:, 0]

    def before(self, places: Tensor) -> Tensor:
        """Number of places before each place that the user may have. Shapes: [B, ...] -> [B, ...] int64."""
        places = places if self.left_before is None else self.left_before[places]
        places = places.long()
        if self.own == "none":
            return places
        own_before = torch.searchsorted(self.keys, places + self._key_base(places))
        own_before = own_before - self._per_user(self.starts[:-1], places)
        return own_before if self.own == "allow" else places - own_before

    def select(self, ranks: Tensor) -> Tensor:
        """The place of the user's allowed item number `rank`, the inverse of `before`. Shapes: [B, ...] -> [B, ...].

        Ranks at or beyond the user's total give some valid place.
        """
        places = ranks
        if self.own == "allow" and len(self.keys):
            at = (self._per_user(self.starts[:-1], ranks) + ranks).clamp(max=len(self.keys) - 1)
            places = (self.keys[at] - self._key_base(ranks)).clamp(min=0)
        elif self.own == "deny":
            # Before the i-th denied place d_i lie d_i - i allowed ones; so it precedes every rank from that on.
            users = torch.arange(self.num_users, device=ranks.device)
            users = users.repeat_interleave(self.starts.diff(), output_size=len(self.keys))
            within = torch.arange(len(self.keys), device=ranks.device) - self.starts[users]
            denied = torch.searchsorted(self.keys - within, ranks + self._key_base(ranks), right=True)
            places = ranks + denied - self._per_user(self.starts[:-1], ranks)
        if self.left is None:
            return places.clamp(max=self.num_items - 1)
        return self.left[places.clamp(max=len(self.left) - 1)]

    def _key_base(self, like: Tensor) -> Tensor:
        users = torch.arange(self.num_users, device=like.device)
        return self._per_user(users * (self.num_items + 1), like)

    def _per_user(self, values: Tensor, like: Tensor) -> Tensor:
        return values.view(-1, *[1] * (like.ndim - 1))


def _left_for_everyone(
    trie: PrefixTrie, allow: Jagged | Tensor | None, deny: Jagged | Tensor | None
) -> Tensor | None:
    """Which places the lists that hold for everyone leave, [N] bool, or None where all are left."""
    if not isinstance(allow, Tensor) and not isinstance(deny, Tensor):
        return None
    shape, device = trie.items.shape, trie.items.device
    left = torch.zeros(shape, dtype=torch.bool, device=device)
    if isinstance(allow, Tensor):
        left[trie.place_of_item[allow]] = True
    else:
        left.fill_(True)
    if isinstance(deny, Tensor):
        left[trie.place_of_item[deny]] = False
    if not left.any():
        raise DataError(
            "the allow and deny lists that hold for everyone must leave at least one item, and they leave none of "
            f"{trie.num_items}; shorten the deny list, or lengthen the allow list"
        )
    return left


def _counts_before(left: Tensor) -> Tensor:
    counts = torch.zeros(len(left) + 1, dtype=torch.int32, device=left.device)
    torch.cumsum(left, 0, dtype=torch.int32, out=counts[1:])
    return counts


def _user_keys(trie: PrefixTrie, entries: Jagged, left: Tensor | None, before: Tensor | None) -> Tensor:
    """Distinct keys of the users' listed places among those left for everyone, ascending."""
    users, places = entries.row_index(), trie.place_of_item[entries.values].long()
    if left is not None:
        kept = left[places]
        users, places = users[kept], before[places[kept]].long()
    return (users * (trie.num_items + 1) + places).unique()


def _check_lists(
    trie: PrefixTrie, num_users: int, allow: Jagged | Tensor | None, deny: Jagged | Tensor | None
) -> None:
    for name, entries in (("allow", allow), ("deny", deny)):
        if isinstance(entries, Jagged) and entries.num_rows != num_users:
            raise DataError(
                f"the {name} lists must be those of the batch's {num_users} users, and {entries.num_rows} "
                "lists were given"
            )
        rows = entries.values if isinstance(entries, Jagged) else entries
        if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < trie.num_items:
            raise DataError(
                f"the {name} lists must hold item rows 0..{trie.num_items - 1}, and they hold "
                f"{int(rows.min())}..{int(rows.max())}; they belong to another catalogue"
            )
