"""What models read that know items and users by text: tokens of the whole catalogue, kept on the host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.errors import ConfigError
from data_streams.jagged import Jagged


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which texts are read, and how much of each."""

    columns: tuple[str, ...] = ("title", "brand", "categories")
    """Columns of the item table that are read, of title, price, brand and categories, where the data has them."""
    max_tokens: int = 32
    """Tokens of an item's text, or of a user's, that are read; the rest is cut off, counted and logged."""
    vocabulary_size: int = 2048
    """Tokens of the tokenizer that is trained on the items' texts where no language model brings one."""
    profiles: bool = True
    """Read what the data's user table says of each user, where it says anything."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"model.text.max-tokens must be at least 1, got {self.max_tokens}")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Shapes: N items, U users; tokens int32, 0 .. vocabulary_size - 1."""

    items: Jagged | None
    """A row of tokens per item row; None where they are not read."""
    users: Jagged | None
    """A row per user row; None where nothing is known of users, or it is not to be read."""
    vocabulary_size: int
    fingerprint: str
    """Of the tokenizer."""
    encode: Callable[[Sequence[str]], Jagged] | None = None
    """Further texts in the same tokens, a row for each, cut off as those of items are; None where there are none to
    read. Host side."""
