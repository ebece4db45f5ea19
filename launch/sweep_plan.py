"""Which runs a sweep is made of: every point with every value of every axis and every seed."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from cluster.errors import ConfigError

_OWN = ("--run-dir", "--seed")
"""Options of a run that the sweep gives."""
_LONGEST_NAME = 120


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """One run of a sweep."""

    settings: dict[str, str]
    """What sets it apart from the others: values by option, as they were written."""
    seed: int
    words: list[str]
    """Behind `grail pretrain RECIPE`."""


def plan_runs(
    points: Sequence[str], axes: Sequence[str], seeds: Sequence[int], common: Sequence[str]
) -> dict[str, SweptRun]:
    """The runs by the name of their folder.

    A point holds settings that go together, such as "model.width=64 model.num-blocks=2"; an axis one option with its
    values, such as "train.learning-rate=1e-3,2e-3". `common` are words of all runs.

    Raises: ConfigError for what is neither, and for two runs alike.
    """
    if given := [word for word in common if word.split("=")[0] in _OWN]:
        raise ConfigError(
            f"a sweep names its runs and their seeds itself, got {given[0]}; leave it out, see --seeds"
        )
    choices = [[_settings(point) for point in points or [""]], *map(_axis, axes)]
    settings = [dict(pair for part in chosen for pair in part) for chosen in product(*choices)]
    short = short_names(name for chosen in settings for name in chosen)
    runs: dict[str, SweptRun] = {}
    for chosen, seed in product(settings, seeds):
        name = _folder({**{short[option]: value for option, value in chosen.items()}, "seed": str(seed)})
        if name in runs:
            raise ConfigError(f"all runs of a sweep must differ, and two are {name}; take one of them out")
        runs[name] = SweptRun(settings=chosen, seed=seed, words=_all_words(chosen, seed, common))
    return runs


def _all_words(settings: dict[str, str], seed: int, common: Sequence[str]) -> list[str]:
    """Behind a word that chooses the kind of a section only the section's own options may stand."""
    sections = tuple(f"{option.partition(':')[0]}." for option in settings if ":" in option)
    first, last = [], []
    for option, value in settings.items():
        words = last if ":" in option or (sections and option.startswith(sections)) else first
        words += _words(option, value)
    if (
        twice := {word.split("=")[0] for word in common}
        & {*first, *last}
        & {f"--{name}" for name in settings}
    ):
        raise ConfigError(f"{min(twice)} is an option of the sweep and of all runs; leave either out")
    return ["--seed", str(seed), *first, *common, *last]


def _settings(point: str) -> list[tuple[str, str]]:
    """A word without a value is a switch, such as model.no-item-features, or chooses the kind of a section."""
    return [tuple(word.removeprefix("--").partition("=")[::2]) for word in point.split()]


def _axis(text: str) -> list[list[tuple[str, str]]]:
    name, equals, values = text.removeprefix("--").partition("=")
    if not (equals and values.strip(",") and re.fullmatch(r"[\w.-]+", name)):
        raise ConfigError(
            f"--over must be an option and its values, such as train.learning-rate=1e-3,2e-3, got '{text}'"
        )
    return [[(name, value)] for value in values.split(",") if value]


def _words(option: str, value: str) -> list[str]:
    if ":" in option:
        return [option]
    return [f"--{option}", value] if value else [f"--{option}"]


def short_names(options: Iterable[str]) -> dict[str, str]:
    """The last part of an option where no other option ends in the same one."""
    options = dict.fromkeys(options)
    ends = Counter(option.rpartition(".")[2] for option in options)
    return {option: end if ends[end := option.rpartition(".")[2]] == 1 else option for option in options}


def _folder(settings: dict[str, str]) -> str:
    """Example: {"width": "64", "seed": "0"} -> "width-64_seed-0"."""
    parts = (f"{name}-{value}" if value else name for name, value in settings.items())
    name = "_".join(re.sub(r"[^\w.+-]+", "-", part) for part in parts)
    if len(name) > _LONGEST_NAME:
        raise ConfigError(
            f"the settings of a run must fit into a folder's name of {_LONGEST_NAME} characters, and {name} has "
            f"{len(name)}; give the options that all runs share behind the recipe, and not in --points"
        )
    return name
