"""Puts the rewards of a run together: names become options, and named runs their configurations."""

from collections.abc import Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from cluster.plugins import plugin_config
from launch.run_directory import absolute, load_config

if TYPE_CHECKING:
    from rl.reward_mix import RewardTerm
    from rl.rewards import RewardSetting

REWARDS = "rl.rewards"


def reward_term(name: str, *, weight: float = 1.0, direct: bool = False, **options: Any) -> "RewardTerm":
    """A reward by the name of its file. Raises: ConfigError if there is none of that name."""
    from rl.reward_mix import RewardTerm

    return RewardTerm(name=name, reward=plugin_config(REWARDS, name)(**options), weight=weight, direct=direct)


def terms_form(terms: Sequence["RewardTerm"]) -> Any:
    """The terms as a dataclass whose fields are their names: what the command line shows of them."""
    import tyro

    from rl.reward_mix import RewardTerm

    flat = tyro.conf.arg(name="")
    forms = []
    for term in terms:
        options = ("options", Annotated[type(term.reward), flat], field(default=term.reward))
        shown = [
            (entry.name, entry.type, field(default=getattr(term, entry.name)))
            for entry in fields(RewardTerm)
            if entry.name in ("weight", "direct")
        ]
        form = make_dataclass("Term", [*shown, options], frozen=True, kw_only=True)
        # tyro shows an underscore as a dash.
        forms.append((term.name.replace("-", "_"), form, field(default_factory=form)))
    return make_dataclass("Rewards", forms, frozen=True, kw_only=True)()


def terms_of(form: Any) -> tuple["RewardTerm", ...]:
    """The terms of a form that was filled in."""
    from rl.reward_mix import RewardTerm

    filled = {entry.name: getattr(form, entry.name) for entry in fields(form)}
    return tuple(
        RewardTerm(name=name.replace("_", "-"), reward=term.options, weight=term.weight, direct=term.direct)
        for name, term in filled.items()
    )


PATHS = ("run", "vectors")
"""Options of rewards that name a folder or file."""


def located(term: "RewardTerm") -> "RewardTerm":
    """The term with its folders and files from the root on, since workers may stand in another folder."""
    return replace(term, reward=_located(term.reward))


def _located(options: Any) -> Any:
    changed = {}
    for entry in fields(options):
        value = getattr(options, entry.name)
        if is_dataclass(value):
            changed[entry.name] = _located(value)
        elif entry.name in PATHS and value:
            changed[entry.name] = absolute(value)
    return replace(options, **changed)


def reward_setting(
    terms: Sequence["RewardTerm"], *, data_path: str, semantic_ids: str = "", seed: int = 0
) -> "RewardSetting":
    """What the rewards are built from, with the configuration of every trained run they name.

    Raises: ConfigError where a reward needs a run and names none; CheckpointError where there is no such run.
    """
    from rl.rewards import RewardSetting

    names = {name for term in terms for name in term.reward.run_names()}
    runs = {name: load_config(name) for name in sorted(names)}
    return RewardSetting(
        data_path=absolute(data_path), semantic_ids=absolute(semantic_ids), seed=seed, runs=runs
    )
