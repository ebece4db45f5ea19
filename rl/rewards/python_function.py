"""Any Python function, named on the command line by its import path; never by data or by a checkpoint.

The function gets a list of groups (`rl.types.Group`) and returns an array [G] (or [G, L]) for each; it may be async.

Example: `--rewards python-function --rewards.python-function.path my_rewards:freshness` calls `freshness(groups)` of
`my_rewards.py`, which must lie on PYTHONPATH.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.errors import ConfigError
from rl.rewards import RewardFunction, RewardOptions, RewardSetting
from rl.types import Group, Reward


class PythonFunction(RewardFunction):
    """Shapes: [G] or [G, L] per group, as the function returns them."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardOptions):
        path: str = ""
        """The function as MODULE:NAME."""
        of_codes: bool = False
        """Whether it returns a value for every prefix, [G, L], instead of one for each completion, [G]."""

        @property
        def rewards_codes(self) -> bool:
            return self.of_codes

        def prepared(self, setting: RewardSetting) -> "PythonFunction.Config":
            find_function(self.path)
            return self

        def build(self, setting: RewardSetting) -> "PythonFunction":
            return PythonFunction(self, find_function(self.path))

    def __init__(self, config: Config, function: Callable):
        self.of_codes, self.function = config.of_codes, function

    async def score(self, groups: Sequence[Group]) -> list[Reward]:
        found = self.function(groups)
        values = await found if inspect.isawaitable(found) else found
        return [Reward.of(of_group) for of_group in values]


def find_function(path: str) -> Callable:
    """Raises: ConfigError unless the path names a function that can be imported."""
    module, separator, name = path.partition(":")
    if not (module and separator and name):
        raise ConfigError(
            f"a reward function is named MODULE:NAME, such as my_rewards:freshness; got {path!r}"
        )
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the reward function {path} cannot be imported ({error}); its module must lie on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ConfigError(f"the reward function {path} must be callable, and is a {type(function).__name__}")
    return function
