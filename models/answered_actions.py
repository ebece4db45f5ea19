"""Which answers to exposures a ranker predicts."""

from collections.abc import Sequence

from cluster.errors import ConfigError

EXPOSURE = "exposure"


def answered_actions(given: Sequence[str], codes: Sequence[str], recipe: str) -> tuple[str, ...]:
    """The given actions, or all of the data (`codes`) but exposures, click first.

    Raises: ConfigError where the data has no exposures, or no such answers.
    """
    answers = [name for name in codes if name != EXPOSURE]
    actions = tuple(given) or tuple(sorted(answers, key=lambda name: (name != "click", name)))
    missing = [name for name in (EXPOSURE, *actions) if name not in codes]
    if EXPOSURE in given or len(set(given)) < len(given):
        raise ConfigError(
            f"model.actions of {recipe} must be answers to exposures, each once, got {', '.join(given)}"
        )
    if missing or not actions:
        raise ConfigError(
            f"{recipe} learns from exposures and the answers to them, and the data has the actions "
            f"{', '.join(codes)} but no {', '.join(missing) or 'answers'}; build it with --keep-exposures and "
            "--sequence-actions for the answers"
        )
    return actions
