"""What a build is told, and which of it fits together."""

from dataclasses import dataclass, field
from typing import Literal

from cluster.configuration import ClusterConfig
from cluster.errors import ConfigError
from data_streams.schema import EXPOSURE
from data_streams.splits import SplitName

MOMENT_OPTIONS = (
    ("valid_from_s", "test_from_s"),
    ("valid_days", "test_days"),
    ("train_share", "valid_share"),
)


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Options of a build beside those of its source; `check_options` tells which go together."""

    out: str
    """Folder or address the data set is written to."""
    overwrite: bool = False
    """Replace what is at `out`."""
    split: SplitName = "leave-last-out"
    """leave-last-out holds out each user's last two events, leave-one-out the last for validation and test alike;
    by-time the first ones after two moments, by-session the last one of users who end after them."""
    valid_from_s: int | None = None
    """First second of the validation period of a split by time, since 1970."""
    test_from_s: int | None = None
    """First second of the test period of a split by time, since 1970."""
    valid_days: float | None = None
    """Length of the validation period that ends where the test begins, instead of a moment."""
    test_days: float | None = None
    """Length of the test period that ends with the last event, instead of a moment."""
    train_share: float | None = None
    """Share of all events that lies before the validation period, instead of a moment."""
    valid_share: float | None = None
    """Share of all events in the validation period, instead of a moment; the rest is the test."""
    sequence_actions: tuple[str, ...] = ()
    """Actions that make up a user's sequence; left out, what the source proposes, else all but exposures."""
    split_actions: tuple[str, ...] = ()
    """Actions that can be held out, and by which items are counted; left out, all but exposures."""
    keep_exposures: bool = False
    """Keep exposures among the events, for models that learn from what was shown and not chosen."""
    page_actions: tuple[str, ...] = ()
    """Actions that are kept beside the sequence, as exposures are, to tell how the items of a page were answered, such
    as purchase after click; they are never held out."""
    min_user_events: int = 1
    """Users with fewer events are left out."""
    min_item_events: int = 0
    """Items with fewer events are left out with their events; 1 leaves out those that nobody chose."""
    filter_passes: int | None = None
    """How often users and then items are counted and left out; left out, until all have enough (a k-core)."""
    max_events_per_user: int = 10_000
    """Longer users are cut to their latest events."""
    chunk_users: int = 512
    """Users that lie together in a chunk."""
    partitions: int | None = None
    """User partitions, each the work of one task; left out, one for every 2 million events."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """What an event without ids or time, or of an unknown item, does: end it or be counted and skipped."""
    ray: Literal["auto", "always", "never"] = "auto"
    """Whether the work is spread by Ray tasks; auto does where there is more than one partition."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the tasks run."""

    @property
    def beside(self) -> tuple[str, ...]:
        """Actions that are kept and are no part of a user's sequence."""
        return (*((EXPOSURE,) if self.keep_exposures else ()), *self.page_actions)


def check_options(config: BuildConfig) -> None:
    """Raises: ConfigError for options that do not fit each other."""
    _check_moments(config)
    if EXPOSURE in config.sequence_actions:
        raise ConfigError(
            "--sequence-actions are what users chose; to keep exposures beside them say --keep-exposures"
        )
    both = set(config.sequence_actions) & set(config.page_actions)
    if both:
        raise ConfigError(
            f"--page-actions lie beside the sequence, yet {', '.join(sorted(both))} are also among "
            "--sequence-actions; leave them out of one of the two"
        )
    held_out = set(config.split_actions) & {EXPOSURE, *config.page_actions}
    if held_out:
        raise ConfigError(
            f"--split-actions are held out of the sequence, and {', '.join(sorted(held_out))} lie beside it "
            "(exposures, and what --page-actions name); leave them out, or make them part of it with --sequence-actions"
        )
    if config.filter_passes is not None and not config.min_item_events:
        raise ConfigError(
            f"--filter-passes {config.filter_passes} says how often users and items are counted, which only "
            "--min-item-events makes them; give that too, or leave it out"
        )
    for name in ("partitions", "chunk_users", "max_events_per_user", "min_user_events", "filter_passes"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, given {value}")


def _check_moments(config: BuildConfig) -> None:
    """A split by time is told its two moments in one of three ways."""
    pairs = {names: tuple(getattr(config, name) for name in names) for names in MOMENT_OPTIONS}
    given = {names: pair for names, pair in pairs.items() if pair != (None, None)}
    said = (
        ", ".join(
            f"--{name.replace('_', '-')} {value}"
            for names, pair in given.items()
            for name, value in zip(names, pair, strict=True)
        )
        or "none of them"
    )
    if not config.split.startswith("by-"):
        if given:
            raise ConfigError(
                f"moments belong to --split by-time and by-session, given --split {config.split} and {said}"
            )
        return
    if len(given) != 1 or None in next(iter(given.values())):
        raise ConfigError(
            f"--split {config.split} needs --valid-from-s and --test-from-s (seconds since 1970), or --valid-days "
            f"and --test-days, or --train-share and --valid-share; given {said}"
        )
    ((names, (first, second)),) = given.items()
    fits = {
        "valid_from_s": first <= second,
        "valid_days": first >= 0 and second > 0,
        "train_share": 0 < first < 1 and 0 <= second and first + second < 1,
    }[names[0]]
    if not fits:
        raise ConfigError(
            f"the validation period of --split {config.split} must lie between training and test, given {said}; "
            "let it begin before the test, or give days or shares above 0 (shares that sum to less than 1)"
        )
