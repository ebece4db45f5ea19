"""Which runs a sweep is made of: every point with every value of every axis and every seed."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from cluster.errors import ConfigError

_OWN = {"run-dir", "seed"}
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

    Raises: ConfigError for what is neither, for an option that is given twice, and for two runs alike.
    """
    choices = [[_settings(point) for point in points or [""]], *map(_axis, axes)]
    combined = [[pair for part in chosen for pair in part] for chosen in product(*choices)]
    _require_once(combined, common)
    settings = list(map(dict, combined))
    short = short_names(name for chosen in settings for name in chosen)
    runs: dict[str, SweptRun] = {}
    for chosen, seed in product(settings, seeds):
        name = _folder({**{short[option]: value for option, value in chosen.items()}, "seed": str(seed)})
        if name in runs:
            raise ConfigError(f"all runs of a sweep must differ, and two are {name}; take one of them out")
        runs[name] = SweptRun(settings=chosen, seed=seed, words=_all_words(chosen, seed, common))
    return runs


def _require_once(combined: Iterable[Sequence[tuple[str, str]]], common: Sequence[str]) -> None:
    """Of an option that is given twice only the last value would count, and runs would not be what they are called.

    Raises: ConfigError for such an option, and for those that the sweep gives.
    """
    shared = {_plain(word.partition("=")[0]): word for word in common if word.startswith("--")}
    for pairs in combined:
        names = [name for name, _ in pairs]
        if own := [shared.get(name, f"--{name}") for name in _OWN if name in shared or name in names]:
            raise ConfigError(
                f"a sweep names its runs and their seeds itself, got {min(own)}; leave it out, see --seeds"
            )
        if both := shared.keys() & set(names):
            raise ConfigError(f"--{min(both)} is an option of the sweep and of all runs; leave either out")
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ConfigError(
                f"each run must be given an option once, and --{twice[0]} comes twice; take one out"
            )


def _all_words(settings: dict[str, str], seed: int, common: Sequence[str]) -> list[str]:
    """Behind a word that chooses the kind of a section only the section's own options may stand."""
    sections = tuple(f"{word.partition(':')[0]}." for word in (*settings, *common) if ":" in word)
    first, last = [], []
    for option, value in settings.items():
        words = last if ":" in option or (sections and option.startswith(sections)) else first
        words += _words(option, value)
    return ["--seed", str(seed), *first, *common, *last]


def _plain(option: str) -> str:
    """Example: "--train.max_steps" -> "train.max-steps"."""
    return option.removeprefix("--").replace("_", "-")


def _settings(point: str) -> list[tuple[str, str]]:
    """A word without a value is a switch, such as model.no-item-features, or chooses the kind of a section."""
    parts = (word.partition("=") for word in point.split())
    return [(_plain(name), value) for name, _, value in parts]


def _axis(text: str) -> list[list[tuple[str, str]]]:
    name, _, listed = text.partition("=")
    values = list(filter(None, map(str.strip, listed.split(","))))
    if not (values and re.fullmatch(r"[\w.-]+", name)):
        raise ConfigError(
            f"--over must be an option and its values, such as train.learning-rate=1e-3,2e-3, got '{text}'"
        )
    return [[(_plain(name), value)] for value in values]


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
