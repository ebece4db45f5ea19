"""What rankers share that learn from exposures: what they need of the data, and which answers they predict."""

from collections.abc import Sequence

from cluster.errors import ConfigError

EXPOSURE = "exposure"


class AnswersConfig:
    """What the configuration of a ranker says that learns how users answer what they are shown."""

    event_columns: tuple[str, ...] = ("action", "page_id")
    """Event columns it reads."""
    needs_actions = True
    """Whether `build` is to be given the names of the codes in the column `action`."""
    needs_exposures = True
    """Whether histories must hold what was only shown."""
    has_own_objective = True
    """Whether the loss is the model's own."""
    selection_metrics = ("auc", "gauc")
    """What validation can choose the best step by."""


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
